"""The prompted protocol (Carlini et al. 2023, section 4.2): generations of one prompt that agree with each other.

Training pictures are looked at only after the candidates are chosen.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses.errors import UserError
from defenses.exact import centred, l2_of, squared_differences
from defenses.neighbours import VIEWS, SearchResult, search, search_sharded
from defenses.ranks import together
from eval.cliques import largest_clique
from eval.control import Rule, control
from eval.extraction import Extraction, ExtractionConfig, PictureFindings, at_l2, counts, match_rows, tier_of
from eval.pictures import Pictures
from eval.promptrecords import NearestGenerations, PromptFinding, blank_row

SILENCED = "a defense withheld so many images that too few for a clique are left of every prompt"
_GRID = 4  # tiles along each side: 16 tiles, as in the paper

Images = np.ndarray | Callable[[], np.ndarray]  # uint8 [N, C, H, W], or what reads them
Prompt = tuple[str, Sequence[str], Images]  # name, names of the generations, and these


def prompted(
    prompts: Iterable[Prompt],
    training: Pictures,
    heldout: Pictures | None,
    config: ExtractionConfig,
    accelerator: Any = None,
    *,
    exchangeable: bool,
    seed: int,
    asked: Sequence[int] | None = None,
) -> Extraction:
    """Flags prompts by the largest clique of their generations and verifies one candidate of each, on all ranks.

    Args:
        prompts: name, names of the generations, and their images (or a function that reads them: only the rank that works
            on the prompt calls it, so that one prompt at a time is in memory).
        asked: images that were drawn of each prompt; more than its generations where a defense withheld some. None: as many.

    Raises:
        UserError: of no prompt enough were drawn for a clique.
    """
    prompts = list(prompts)
    asked = [len(names) for _, names, _ in prompts] if asked is None else asked
    refuse_hopeless(config, asked)
    results, best = examine(prompts, training, config, accelerator, asked)
    places = zip(best.prompt.tolist(), best.place.tolist(), strict=True)
    nearest = [results[prompt].matches[place]["generation"] if prompt >= 0 else None for prompt, place in places]
    return conclude(
        results, asked, best.distance, nearest, training, heldout, config, accelerator,
        exchangeable=exchangeable, seed=seed,
    )  # fmt: skip


def examine(
    prompts: list[Prompt], training: Pictures, config: ExtractionConfig, accelerator: Any, asked: Sequence[int]
) -> tuple[list[PromptFinding], NearestGenerations]:
    """Cliques and nearest pictures of all prompts, on all ranks, each of which gets the same; see `prompted`."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else "cpu"
    best = NearestGenerations.none(len(training.ids))

    def work() -> list[PromptFinding]:
        found = []
        for index in range(rank, len(prompts), world):
            name, names, images = prompts[index]
            images = images() if callable(images) else images
            result, near = attack_prompt(index, name, names, images, training, config, device, asked[index])
            if near is not None:
                best.add(index, near)
            found.append(result)
        return found

    results = work() if world == 1 else gather_object(together(accelerator, work))
    best = NearestGenerations.merged([best] if world == 1 else gather_object([best]))
    results.sort(key=lambda result: result.index)
    return results, best


def candidates_of(results: list[PromptFinding]) -> dict[str, np.ndarray]:
    """The candidates by the names of their prompts, the tightest clique first, uint8 [C, H, W]."""
    return {result.row["prompt"]: result.image for result in tightest(results)}


def tightest(results: list[PromptFinding]) -> list[PromptFinding]:
    """The flagged prompts, the tightest clique first."""
    return sorted((r for r in results if r.row["flagged"]), key=lambda r: (r.row["mean_distance"], r.index))


def nearest_rule(config: ExtractionConfig) -> Rule:
    """Carlini et al. 2023, section 4.2: a candidate is its nearest picture if that lies within ``verify_l2``."""
    return Rule(1, lambda distance: distance[:, 0].astype(np.float64) / config.verify_l2)


def conclude(
    results: list[PromptFinding],
    asked: Sequence[int],
    best: np.ndarray,
    nearest: list[str | None],
    training: Pictures,
    heldout: Pictures | None,
    config: ExtractionConfig,
    accelerator: Any = None,
    *,
    exchangeable: bool,
    seed: int,
) -> Extraction:
    """Verifies the candidates of all prompts, on all ranks.

    Args:
        results: of all prompts, in their order, the same on every rank; those that no image is left of are not flagged.
        asked: images that were drawn of each, those that a defense withheld among them.
        best: l2 of each distinct picture to its nearest generation, float64 [P].
        nearest: name of that generation.
    """
    flagged = tightest(results)
    candidates = (
        np.stack([r.image for r in flagged]) if flagged else np.zeros((0, *training.images.shape[1:]), np.uint8)
    )
    rule = nearest_rule(config)
    found = search_sharded(candidates, training.images, training.picture, 1, accelerator=accelerator)
    for result, passed in zip(flagged, rule.passed(found.distinct), strict=True):
        result.row["verified"] = result.matches[result.medoid]["verified"] = bool(passed)
    matches = [match for result in results for match in result.matches]
    verified = rule.verified(found.distinct)
    variants = {"identity_view": rule.verified(found.identity), "paper_rule": None}  # the same rule: it has no mean
    for result, drawn in zip(results, asked, strict=True):
        result.row["withheld"] = drawn - result.row["generations"]
    report = {
        "protocol": "prompted",
        "tier": tier_of(sum(asked), len(asked), min(asked, default=0)),  # what it cost, whatever came back
        "settings": _settings(config, results),
        "generations": sum(result.row["generations"] for result in results),
        "prompts": len(results),
        "withheld": _withheld(results, config),
        "candidates": len(flagged),
        **counts(training, verified, variants, seed),
        "at_l2": at_l2(best),
        "control": control(
            candidates, training, heldout, rule, accelerator,
            exchangeable=exchangeable, permutations=config.permutations, seed=seed,
        ),
        "by_copies": training.by_copies(verified),
    }  # fmt: skip
    rest = [result for result in results if not result.row["flagged"]]
    pictures = PictureFindings(best, nearest, None, np.isin(training.ids, verified))
    return Extraction(report, matches, pictures, [result.row for result in flagged + rest], candidates_of(results))


def tiled_l2(images: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Largest l2 over 4 x 4 tiles of every pair of images, float64 [N, N] (Carlini et al. 2023, section 4.2).

    Two pictures that share a flat background are close in plain l2, but not in the tile that differs. Sides that 4 does
    not divide are cut as `numpy.array_split` does; sides below 4 have fewer tiles.
    """
    largest = np.zeros((len(images), len(images)))
    height, width = (np.array_split(np.arange(side), min(_GRID, side)) for side in images.shape[-2:])
    for y in height:
        for x in width:
            tile = centred(images[..., y[0] : y[-1] + 1, x[0] : x[-1] + 1], device)
            squared = squared_differences(tile, tile).cpu().numpy()
            largest = np.maximum(largest, l2_of(squared, tile.shape[1]))
    return largest


def clique_size(config: ExtractionConfig, generations: int) -> int:
    """Generations in a clique that flags a prompt: 10, or fewer for fewer than 100 generations (design: max(4, N/10))."""
    if config.clique_size is not None:
        return config.clique_size
    return 10 if generations >= 100 else max(4, math.ceil(generations / 10))


def attack_prompt(
    index: int,
    prompt: str,
    names: Sequence[str],
    images: np.ndarray,
    training: Pictures,
    config: ExtractionConfig,
    device: Any,
    asked: int,
) -> tuple[PromptFinding, SearchResult | None]:
    """Clique and nearest pictures of one prompt's generations, uint8 [N, C, H, W]; nothing is verified yet. N = 0, where a defense
    withheld them all, flags nothing.

    The size of a clique that flags follows ``asked``, the images that were drawn, and not what a defense left of them: one that withholds
    more of the training captions' images would otherwise make these the easier to flag than those of the control.

    Where only those of flagged prompts are held against the pictures (``config.nearest``), another one has no matches.
    """
    if not len(images):
        return PromptFinding(index, blank_row(prompt), [], -1, None), None
    distance = tiled_l2(images, device)
    joined = distance <= config.edge_threshold
    clique = largest_clique(joined, seconds=config.clique_seconds)
    inside = distance[np.ix_(clique.nodes, clique.nodes)]
    medoid = clique.nodes[int(inside.sum(axis=1).argmin())]  # the lowest of equals
    size = len(clique.nodes)
    flagged = size >= clique_size(config, asked)
    result, matches = None, []
    if flagged or config.nearest == "all":
        result = search(images, training.images, training.picture, 1, device=device)
        matches = match_rows(names, training, result.distinct, None, np.zeros(len(images), dtype=bool))
    for node in clique.nodes if flagged else []:
        matches[node]["clique"] = prompt
    row = blank_row(prompt) | {
        "generations": len(images),
        "edges": (int(joined.sum()) - len(images)) // 2,
        "clique_size": size,
        "flagged": flagged,
        "exact": clique.exact,
        "mean_distance": float(inside.sum() / (size * (size - 1))) if size > 1 else None,
        "medoid": names[medoid] if flagged else None,
        "record_id": matches[medoid]["record_id"] if flagged else None,
        "l2": matches[medoid]["l2"] if flagged else None,
    }
    return PromptFinding(index, row, matches, medoid, np.asarray(images[medoid]) if flagged else None), result


def refuse_hopeless(config: ExtractionConfig, sizes: Sequence[int]) -> None:
    """Refuses prompts of which too few images are drawn for any clique that would flag one.

    Raises:
        UserError: attack.extraction.clique_size.
    """
    if sizes and all(size < clique_size(config, size) for size in sizes):
        need = min(clique_size(config, size) for size in sizes)
        raise UserError(
            "attack.extraction.clique_size",
            f"a clique of {need} cannot exist among {max(sizes)} images of a prompt",
            "generate more images per prompt (generate.per_prompt)",
        )


def _withheld(results: list[PromptFinding], config: ExtractionConfig) -> dict[str, Any] | None:
    """What a defense between the model and its user held back; None: nothing.

    Returns:
        ``images``; ``prompts``: those of which it left too few for a clique, which therefore are not flagged; ``reason`` why there is no
        candidate, None where prompts are left that could give one.
    """
    few = [r.row["generations"] < clique_size(config, _drawn(r)) for r in results]
    gone = [result.row["withheld"] for result in results]
    if not any(gone):
        return None
    silenced = sum(short and held > 0 for short, held in zip(few, gone, strict=True))
    return {"images": sum(gone), "prompts": silenced, "reason": SILENCED if all(few) else None}


def _drawn(finding: PromptFinding) -> int:
    return finding.row["generations"] + finding.row["withheld"]


def _settings(config: ExtractionConfig, results: list[PromptFinding]) -> dict[str, Any]:
    sizes = [result.row["generations"] for result in results]
    least = sorted({clique_size(config, _drawn(result)) for result in results})
    return {
        "edge_threshold": config.edge_threshold,
        "tiles": f"{_GRID}x{_GRID}",
        "clique_size": least[0] if len(least) == 1 else least,
        "clique_seconds": config.clique_seconds,
        "inexact_cliques": sum(not result.row["exact"] for result in results),
        "generations_per_prompt": [min(sizes, default=0), max(sizes, default=0)],
        "verify_l2": config.verify_l2,
        "nearest": config.nearest,
        "views": list(VIEWS),
        "alpha": None,
        "n": None,
        "permutations": config.permutations,
    }
