"""Membership inference: which pictures a model was trained on, by attacks with access to its weights."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from defenses.errors import UserError
from defenses.references import Rows
from eval import captions
from eval.clid import KEPT, MIX, PLACES, clid
from eval.entries import Scores, curves, entries, risks
from eval.exchangeable import blind_check, not_checked
from eval.gradients import equally_spaced, gradient_features
from eval.lira import LiraConfig, shadow_attacks
from eval.members import Candidates, candidates, conditions, told, told_alike
from eval.scores import Probe, loss_values, pia, secmi, sima, standardised
from eval.setlevel import set_report
from eval.suite import Finding, Scene

ATTACKS = (
    "loss", "loss-strong", "loss-grid", "secmi", "pia", "pian", "sima", "gsa-norm", "clid", "loss-strong-null",
)  # fmt: skip
CAPTIONED = ("clid", "loss-strong-null")  # for models with captions alone
PLACE = 0.1  # of the schedule, where a single loss tells most (Carlini et al. 2023, section 5.2: t = 100 of 1000)
PIA_PLACE, PIA_PLACE_LATENT = 0.2, 0.5  # Kong et al. 2023: t = 200 for DDPM, 500 for Stable Diffusion
SECMI_STEP = 0.01  # of the schedule
SECMI_LEAST = 20  # timesteps of the schedule; on a shorter one its steps do not exist


@dataclass(kw_only=True)
class MembershipConfig:
    """Section ``attack.membership``."""

    attacks: list[str] | None = None  # names; null: all that apply to the model
    records: int = 1000  # distinct pictures of either side at most, drawn at random, patients whole
    draws: int = 4  # of the noise, for loss-strong; the paper takes 20
    # whether loss-strong also asks about the mirror image; null: where the run mirrored its training pictures. For a model that
    # never saw them mirrored the second view only adds noise (docs/membership.md)
    flips: bool | None = None
    # places of the schedule for loss-grid and the set test, in [0, 1)
    grid: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.6, 0.8])
    gradient_timesteps: int = 2  # for gsa-norm, equally spaced; each costs three passes
    set_test: bool = True  # how many pictures of one owner it takes to be recognised together
    batch_size: int = 64  # images in one pass of the network
    lira: LiraConfig | None = None  # attacks with shadow models, which are trained for it; null: none

    def __post_init__(self):
        unknown = sorted(set(self.attacks or ()) - set(ATTACKS))
        if unknown or self.attacks == []:
            what = f"knows no {unknown[0]}" if unknown else "is empty"
            raise UserError("attack.membership.attacks", what, f"choose from {', '.join(ATTACKS)}, or null for all")
        for key in ("records", "draws", "gradient_timesteps", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"attack.membership.{key}", f"{getattr(self, key)} is less than 1", "raise it")
        if not self.grid or not all(0 <= place < 1 for place in self.grid):
            raise UserError("attack.membership.grid", f"{self.grid}", "give places in [0, 1), e.g. [0.1,0.5]")

    def chosen(self, kind: str) -> list[str]:
        """Attacks that apply to a model of this kind, in the order of ATTACKS."""
        return [
            name
            for name in ATTACKS
            if (self.attacks is None or name in self.attacks) and (kind == "caption" or name not in CAPTIONED)
        ]


def check(config: SimpleNamespace) -> None:
    """Refuses the attack where it is known beforehand that there are no non-members.

    Raises:
        UserError: attack.membership.
    """
    data = config.data
    if getattr(config, "pipeline", None) is not None and data.heldout_source is None:
        raise UserError(
            "attack.membership",
            "needs pictures that the model never saw",
            "give data.heldout_source, or set it to null",
        )
    none = data.heldout_source is None and data.split_key is None
    if none and (data.phantom.heldout if data.source == "phantom" else data.heldout_fraction) == 0:
        key = "data.phantom.heldout" if data.source == "phantom" else "data.heldout_fraction"
        raise UserError(
            "attack.membership", "needs pictures that the model never saw", f"raise {key}, or set it to null"
        )


def run(scene: Scene) -> Finding | None:
    """Scores members and non-members by every attack, on all ranks; each returns the same.

    Returns:
        ``report``: `entries` of every attack, or None where one side is empty; ``beside``: ``membership_check``, the i.i.d.
        check, and ``set_test`` (`eval.setlevel`); ``tables``: membership.csv and roc.csv. None without white-box access.
    """
    if scene.denoiser is None:
        return None
    settings, seed = scene.config.attack.membership, scene.config.run.seed
    dataset = captions.for_losses(scene.target, scene.config)
    who = candidates(dataset, settings.records, seed)
    if who.member.all() or not who.member.any():
        side = "held-out" if who.member.all() else "training"
        return Finding(None, beside={"membership_check": not_checked(f"there are no {side} pictures")})
    images = Rows(dataset.images, who.rows)
    checked = blind_check(images, who, scene.config.data.exchangeable(), seed, scene.accelerator)
    if not told_alike(scene.denoiser, who):
        note = "labels or captions that the model knows are missing on one side more often than on the other"
        checked |= {"passed": False, "note": "; ".join(filter(None, (checked["note"], note)))}
    flips = mirrors(scene) if settings.flips is None else settings.flips
    known = conditions(scene.denoiser, who.records)
    probe = Probe(scene.denoiser, images, known, who.rows, seed, scene.accelerator, settings.batch_size)
    measured, features = measure(probe, replace(settings, flips=flips), told(scene.denoiser, who.records))
    if settings.lira is not None:
        measured += _with_shadows(scene, who, settings, flips)
    sides = (who.block[who.member], who.block[~who.member]) if who.grouped else None
    usable = settings.set_test and np.isfinite(features).all()
    together = set_report(features[who.member], features[~who.member], sides, seed=seed) if usable else None
    return Finding(
        report=[entry for scores in measured for entry in entries(scores, who)],
        tables={"membership.csv": risks(measured, who), "roc.csv": curves(measured, who)},
        beside={"membership_check": checked, "set_test": together},
    )


def mirrors(scene: Scene) -> bool:
    """Whether the run showed the model mirror images; False for a model that somebody else trained."""
    augment = getattr(scene.config.defenses, "augment", None) if scene.target.run is not None else None
    return augment is not None and augment.flip_probability > 0


def _with_shadows(scene: Scene, who: Candidates, settings: MembershipConfig, flips: bool) -> list[Scores]:
    """LiRA and GSA, with their comparison against the plain threshold (`eval.lira`)."""
    draws, views = settings.draws, 2 if flips else 1
    shadows = shadow_attacks(
        scene, scene.denoiser, who, settings.lira, draws=draws, flips=flips, batch=settings.batch_size
    )
    single = {"lira": 1, "lira-offline": 1, "gsa": shadows.settings["gradient_timesteps"]}
    return [
        Scores(
            name, values, single.get(name, draws * views), shadows.settings, "weights and shadow models",
            {"vs_loss": shadows.vs_loss[name]},
        )
        for name, values in shadows.scores.items()
    ]  # fmt: skip


def measure(probe: Probe, settings: MembershipConfig, condition: str = "own") -> tuple[list[Scores], np.ndarray]:
    """Scores of all chosen attacks, in the order of ATTACKS, and the features for the set test, float64 [N, F].

    Features are the losses of the grid, each by itself, and the other scores.

    Args:
        condition: what the model is told of each record (`eval.members.told`).

    Raises:
        UserError: none of the attacks asked for applies to this model.
    """
    captioned = probe.denoiser.kind == "caption" and any(probe.conditions)
    chosen = settings.chosen("caption" if captioned else "none")
    if probe.denoiser.timesteps < SECMI_LEAST:
        chosen = [name for name in chosen if name != "secmi"]
    if not chosen:
        raise UserError("attack.membership.attacks", "none of them applies to this model", "null takes all that do")
    found: dict[str, Scores] = {}
    works = [work for names, work in FAMILIES if set(names) & set(chosen)]
    for work in tqdm(works, desc="membership", disable=not probe.accelerator.is_main_process):
        found |= {scores.attack: scores for scores in work(probe, settings)}
    for scores in found.values():
        scores.settings = {"condition": condition} | scores.settings
    every = [found[name] for name in chosen]
    columns = [each.values[:, None] if each.parts is None else -each.parts for each in every]
    return every, np.concatenate(columns, axis=1)


def _losses(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    """One draw as the plain threshold attack, and the mean over draws and views (Carlini et al. 2023, section 5.2)."""
    losses, facts = _at_place(probe, settings)
    single = {"timesteps": facts["timesteps"], "draws": 1, "views": 1}
    return [
        Scores("loss", -losses[:, 0, 0], 1, single),
        Scores("loss-strong", -losses.mean((1, 2)), losses[0].size, facts),
    ]


def _null(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    """The same mean under the empty caption: what can be told without knowing a picture's caption."""
    losses, facts = _at_place(replace(probe, conditions=[""] * len(probe.rows)), settings)
    return [Scores("loss-strong-null", -losses.mean((1, 2)), losses[0].size, facts | {"condition": "null"})]


def _at_place(probe: Probe, settings: MembershipConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses float64 [N, draws, views] at PLACE, and the settings that gave them."""
    timesteps = [probe.denoiser.timestep(PLACE)]
    losses = _ask(probe, timesteps, settings.draws, settings.flips)[:, 0]
    return losses, {"timesteps": timesteps, "draws": settings.draws, "views": losses.shape[2]}


def _ask(probe: Probe, timesteps: list[int], draws: int, flips: bool) -> np.ndarray:
    return loss_values(
        probe.denoiser, probe.images, probe.conditions, probe.rows, timesteps=timesteps, draws=draws, flips=flips,
        seed=probe.seed, accelerator=probe.accelerator, batch=probe.batch,
    )  # fmt: skip


def _grid(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    timesteps = [probe.denoiser.timestep(place) for place in settings.grid]
    losses = _ask(probe, timesteps, 1, False)[:, :, 0, 0]
    facts = {"timesteps": timesteps, "draws": 1, "views": 1, "scaled": "over members and non-members together"}
    return [Scores("loss-grid", standardised(losses), len(timesteps), facts, parts=losses)]


def _secmi(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    end = max(1, probe.denoiser.timestep(PLACE))
    step = max(1, round(end * SECMI_STEP / PLACE))
    steps = end // step
    return [Scores("secmi", secmi(probe, steps * step, step), steps + 2, {"t_sec": steps * step, "step": step})]


def _pia(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    timestep = probe.denoiser.timestep(PIA_PLACE_LATENT if probe.denoiser.latent else PIA_PLACE)
    both = pia(probe, timestep)
    return [Scores(name, both[:, place], 2, {"t": timestep, "norm": 4}) for place, name in enumerate(("pia", "pian"))]


def _sima(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    timestep = probe.denoiser.timestep(PLACE)
    return [Scores("sima", sima(probe, timestep), 1, {"t": timestep, "norm": 4})]


def _gradient(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    """Minus the norm of the gradient: at what the model was fitted to, the loss is flat."""
    timesteps = equally_spaced(probe.denoiser.timesteps, settings.gradient_timesteps)
    norms = gradient_features(
        probe.denoiser, probe.images, probe.conditions, probe.rows,
        timesteps=timesteps, seed=probe.seed, accelerator=probe.accelerator, batch=probe.batch,
    )  # fmt: skip
    facts = {"timesteps": timesteps, "draws": 1, "backward_passes": len(timesteps)}
    return [Scores("gsa-norm", -np.sqrt((norms**2).sum(1)), len(timesteps), facts)]


def _clid(probe: Probe, settings: MembershipConfig) -> list[Scores]:
    timesteps = [probe.denoiser.timestep(place) for place in PLACES]
    facts = {"timesteps": timesteps, "words_kept": list(KEPT), "mix": MIX}
    return [Scores("clid", clid(probe), len(timesteps) * (1 + len(KEPT)), facts)]


# the attacks that share passes of the network, and what computes them
FAMILIES: tuple[tuple[tuple[str, ...], Callable[[Probe, MembershipConfig], list[Scores]]], ...] = (
    (("loss", "loss-strong"), _losses),
    (("loss-grid",), _grid),
    (("secmi",), _secmi),
    (("pia", "pian"), _pia),
    (("sima",), _sima),
    (("gsa-norm",), _gradient),
    (("clid",), _clid),
    (("loss-strong-null",), _null),
)
