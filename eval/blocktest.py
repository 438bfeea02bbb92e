"""Whether one side's mean is lower, where the records of a block (patient) are not independent of each other."""

import numpy as np

from defenses.seeding import derive

_CELLS = 2**22  # of the largest array
_ROUNDING = 1e-12  # relative; the same difference summed in another order


def lower_mean_p_value(
    values: np.ndarray, member: np.ndarray, block: np.ndarray, permutations: int, seed: int
) -> float | None:
    """One-sided p-value of mean(non-members) - mean(members) when whole blocks change sides at random.

    Exact in level wherever blocks are exchangeable, whatever their sizes: the number of blocks on a side stays. p = (1 + number
    of permutations that reach the observed difference) / (1 + permutations) (Davison and Hinkley 1997, equation 4.11).

    Args:
        values: float64 [N].
        member: bool [N].
        block: int64 [N]; no block has members and non-members.

    Returns:
        p, or None where a side is empty.

    Raises:
        ValueError: a block has both.
    """
    _, unit = np.unique(block, return_inverse=True)
    size, inside = np.bincount(unit), np.bincount(unit, weights=member)
    if not np.isin(inside / size, (0, 1)).all():
        raise ValueError("a block has members and non-members")
    if member.all() or not member.any():
        return None
    sums, mine = np.bincount(unit, weights=values), inside > 0

    def difference(sides: np.ndarray) -> np.ndarray:
        """For sides bool [B, blocks], True: members; float64 [B]."""
        first = (sides @ sums) / (sides @ size)
        return (~sides @ sums) / (~sides @ size) - first

    observed = difference(mine[None])[0]
    least = observed - _ROUNDING * np.abs(values).max()
    random, reached = np.random.default_rng(derive(seed, "attack/blocktest")), 0
    batch = max(1, _CELLS // len(mine))
    for start in range(0, permutations, batch):
        sides = np.tile(mine, (min(batch, permutations - start), 1))
        reached += int((difference(random.permuted(sides, axis=1)) >= least).sum())
    return (1 + reached) / (1 + permutations)
