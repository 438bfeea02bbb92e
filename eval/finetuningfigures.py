"""What the images of each weight give away of the fine-tuning pictures, and whether that is more than the model alone gives."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from defenses.knn import nearest_sharded
from defenses.neighbours import SearchResult, search_sharded
from defenses.references import Rows
from defenses.seeding import derive
from eval.blocktest import lower_mean_p_value
from eval.clusters import Clusters
from eval.control import Rule, control
from eval.extraction import at_l2, counts
from eval.pairedtests import holm, sign_flip_p_value, unit_differences
from eval.pictures import Pictures
from eval.sscd import Descriptors, load_sscd
from eval.suite import Scene

CANDIDATES = ["weight", "cluster", "size", "mean_distance", "generation", "record_id", "l2", "verified"]
PICTURES = ["record_id", "member", "weight", "l2"]
SIMILAR = (0.6, 0.7)  # SSCD above which the paper counts a picture as extracted
_EXAMPLES = 12  # verified candidates that the report shows, at most


@dataclass
class Arm:
    """The images of one weight.

    Attributes:
        names: files of the images, below the folder of the weight.
        images: uint8 [N, C, H, W].
        wanted: clusters that were looked for.
        chosen: the candidate of each cluster, an index of ``images``.
        tight: mean distance inside each cluster.
    """

    weight: float
    names: list[str]
    images: np.ndarray
    wanted: int
    clusters: Clusters
    chosen: list[int]
    tight: list[float]


@dataclass
class Near:
    """l2 of every distinct picture to the nearest image of one weight.

    Attributes:
        training: float64 [P].
        heldout: float64 [H]; None without held-out pictures.
        verified: ids of the training pictures that a candidate is taken to be.
    """

    training: np.ndarray
    heldout: np.ndarray | None
    verified: np.ndarray


@dataclass(frozen=True)
class Chance:
    """How chance is measured.

    Attributes:
        exchangeable: whether held-out pictures are drawn like training pictures; otherwise there are no p-values against them.
        permutations: of each test.
    """

    exchangeable: bool
    permutations: int
    seed: int

    def lower(
        self, inside: np.ndarray, outside: np.ndarray | None, training: Pictures, heldout: Pictures | None
    ) -> float | None:
        """One-sided p-value of a lower mean over training than over held-out pictures; None where there is no test.

        Args:
            inside, outside: float64 of every distinct picture.
        """
        if outside is None or not self.exchangeable:
            return None
        blocks = training.block[training.first], heldout.block[heldout.first]
        unseen = ~np.isin(blocks[1], blocks[0])  # a split that the user made may leave a patient on both sides
        values, block = np.concatenate([inside, outside[unseen]]), np.concatenate([blocks[0], blocks[1][unseen]])
        member = np.arange(len(values)) < len(inside)
        return lower_mean_p_value(values, member, block, self.permutations, derive(self.seed, "attack/finetuning"))


def judged(
    arms: list[Arm], training: Pictures, heldout: Pictures | None, scene: Scene
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[float, Near]]:
    """The figures of every weight, on all ranks; each returns the same.

    Args:
        arms: the first is the baseline, the fine-tuned model alone.

    Returns:
        ``weights`` and ``examples`` of the report, rows of finetuning.csv, and distances by weight.
    """
    settings, config = scene.config.attack.finetuning, scene.config
    chance = Chance(config.data.exchangeable(), settings.permutations, config.run.seed)
    similarity = _similarity(training, heldout, scene)
    entries, rows, near = [], [], {}
    for arm in arms:
        entry, found, near[arm.weight] = _arm(arm, training, heldout, chance, scene)
        entry["sscd"] = similarity(arm.images[arm.chosen]) if similarity and len(arm.chosen) else None
        entry["versus_baseline"] = None
        if arm is not arms[0]:
            entry["versus_baseline"] = versus(near[arms[0].weight], near[arm.weight], training, heldout, chance)
        entries.append(entry)
        rows += found
    adjusted = holm([(entry["control"] or {}).get("p_value") for entry in entries])
    for entry, p_value in zip(entries, adjusted, strict=True):
        entry["p_value_holm"] = p_value
    shown = sorted((row for row in rows if row["verified"]), key=lambda row: (row["l2"], row["weight"]))
    best: dict[str, dict[str, Any]] = {}
    for row in shown:  # the nearest candidate of each picture
        best.setdefault(row["record_id"], {key: row[key] for key in ("weight", "record_id", "l2", "generation")})
    return {"weights": entries, "examples": list(best.values())[:_EXAMPLES]}, rows, near


def _arm(
    arm: Arm, training: Pictures, heldout: Pictures | None, chance: Chance, scene: Scene
) -> tuple[dict[str, Any], list[dict[str, Any]], Near]:
    accelerator, limit = scene.accelerator, scene.config.attack.finetuning.verify_l2
    rule = Rule(1, lambda distance: distance[:, 0].astype(np.float64) / limit)
    candidates = arm.images[arm.chosen]
    found = search_sharded(candidates, training.images, training.picture, 1, accelerator=accelerator)
    verified, passed = rule.verified(found.distinct), rule.passed(found.distinct)
    every = _searched(arm.images, training, accelerator)
    others = None if heldout is None else _searched(arm.images, heldout, accelerator).best_distance
    near = Near(every.best_distance, others, verified)
    sizes = [len(nodes) for nodes in arm.clusters.cliques]
    entry = {
        "weight": arm.weight,
        "generations": len(arm.images),
        "clusters": {
            "wanted": arm.wanted,
            "threshold": arm.clusters.threshold,
            "reached": arm.clusters.reached,
            "exact": arm.clusters.exact,
            "largest": max(sizes, default=0),
        },
        "candidates": len(arm.chosen),
        **counts(training, verified, {"identity_view": rule.verified(found.identity)}, chance.seed),
        "at_l2": at_l2(near.training),
        "mean_l2": float(near.training.mean()),
        "mean_l2_candidates": float(found.best_distance.mean()) if len(candidates) else None,
        "mean_l2_heldout": None if others is None else float(others.mean()),
        "nearer_p_value": chance.lower(near.training, others, training, heldout),
        "control": control(
            candidates, training, heldout, rule, accelerator,
            exchangeable=chance.exchangeable, permutations=chance.permutations, seed=chance.seed,
        ),
    }  # fmt: skip
    rows = [
        {
            "weight": arm.weight,
            "cluster": place,
            "size": sizes[place],
            "mean_distance": arm.tight[place],
            "generation": f"w-{arm.weight:g}/{arm.names[chosen]}",
            "record_id": training.record_id[int(found.distinct.row[place, 0])],
            "l2": float(found.distinct.distance[place, 0]),
            "verified": bool(passed[place]),
        }
        for place, chosen in enumerate(arm.chosen)
    ]
    return entry, rows, near


def _searched(images: np.ndarray, pictures: Pictures, accelerator: Any) -> SearchResult:
    return search_sharded(images, pictures.images, pictures.picture, 1, accelerator=accelerator)


def versus(baseline: Near, other: Near, training: Pictures, heldout: Pictures | None, chance: Chance) -> dict[str, Any]:
    """Whether another weight gives more away than the fine-tuned model alone.

    Images of both share their start noise, and every picture is compared with itself: ``nearer`` and ``farther`` count
    independent units (patients, else pictures) whose pictures have come nearer on average, with the exact two-sided sign test.
    Images that are nearer to any picture, blurred ones for example, would pass it: ``gain``, the mean decrease of the training
    pictures' distances less that of held-out pictures, is what tells memory, with the one-sided test in which whole units change
    sides.
    """
    decrease, block = baseline.training - other.training, training.block[training.first]
    _, unit = np.unique(block, return_inverse=True)
    signs = np.sign(np.bincount(unit, weights=decrease)).astype(np.int64)
    gain = p_value = None
    if heldout is not None:
        outside = baseline.heldout - other.heldout
        gain = float(decrease.mean() - outside.mean())
        p_value = chance.lower(-decrease, -outside, training, heldout)
    unit_of = dict(zip(training.ids.tolist(), block.tolist(), strict=True))
    pair = (frozenset(other.verified.tolist()), frozenset(baseline.verified.tolist()))
    return {
        "decrease": float(decrease.mean()),
        "nearer": int((signs > 0).sum()),
        "farther": int((signs < 0).sum()),
        "sign_p_value": sign_flip_p_value(signs),
        "gain": gain,
        "gain_p_value": p_value,
        "verified_only_here": len(pair[0] - pair[1]),
        "verified_only_baseline": len(pair[1] - pair[0]),
        "verified_p_value": sign_flip_p_value(list(unit_differences([pair], unit_of).values())),
    }


def _similarity(training: Pictures, heldout: Pictures | None, scene: Scene) -> Any:
    """What gives ``sscd`` of candidates, uint8 [K, C, H, W]; None without weights (attack.copy_metrics.sscd_weights)."""
    metrics = scene.config.attack.copy_metrics
    if metrics is None or metrics.sscd_weights is None:
        return None
    extract = load_sscd(metrics.sscd_weights, metrics.sscd_weights_sha256, scene.accelerator.device)
    sscd = Descriptors(extract, scene.accelerator)

    def largest(pictures: Pictures, references: np.ndarray) -> np.ndarray:
        """Largest cosine of every distinct picture to a candidate, float64 [P]."""
        queries = sscd.of(Rows(pictures.images, pictures.first))
        row = nearest_sharded(queries, references, 1, accelerator=scene.accelerator).row[:, 0]
        return np.einsum("nd,nd->n", queries.astype(np.float64), references[row]).clip(-1, 1)

    def figures(candidates: np.ndarray) -> dict[str, Any]:
        """Average similarity and extraction success rates (Wu et al. 2025), the same of pictures that were never shown beside."""
        references = sscd.of(candidates)
        best = largest(training, references)
        return {
            "average_similarity": float(best.mean()),
            "average_similarity_heldout": None if heldout is None else float(largest(heldout, references).mean()),
            **{f"success_rate_{level}": float((best > level).mean()) for level in SIMILAR},
        }

    return figures


def per_picture(near: dict[float, Near], training: Pictures, heldout: Pictures | None) -> list[dict[str, Any]]:
    """Rows of finetuning_pictures.csv: every distinct picture at every weight."""
    rows = []
    for weight, found in near.items():
        for member, pictures, distance in ((True, training, found.training), (False, heldout, found.heldout)):
            if pictures is not None:
                rows += [
                    {"record_id": pictures.record_id[row], "member": member, "weight": weight, "l2": float(value)}
                    for row, value in zip(pictures.first.tolist(), distance.tolist(), strict=True)
                ]
    return rows
