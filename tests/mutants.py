"""Planted bugs: every known way to break DP-SGD without an error message, and the test that notices it.

    python tests/mutants.py [name ...]     without names: all of them

Every bug is a small change of the source, made in a copy of the tree; the tests named beside it must then fail, and pass without
it. The status is 1 if a bug survives, if a change no longer fits the source, or if a test fails by itself.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("defenses", "train", "eval", "tests", "configs", "launch", "pyproject.toml")
LONGEST = 600  # seconds for one bug

MECHANISM, POISSON, PROCESSES = "tests/test_mechanism.py", "tests/test_poisson.py", "tests/test_noise_processes.py"
DPSGD, LEDGER, RESUME = "tests/test_dpsgd.py", "tests/test_ledger.py", "tests/test_dp_resume.py"
ACCOUNTING, GRADIENTS, CHECK = "tests/test_accounting.py", "tests/test_persample.py", "tests/test_gradcheck.py"


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` occurs once in ``file`` and becomes ``new``; then each of ``tests`` (pytest ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def bug(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tests)


BINOMIAL = f"{POISSON}::test_every_unit_is_drawn_binomially_and_independently"
ANEW = f"{MECHANISM}::test_a_new_start_counts_what_was_booked_and_draws_anew"
FRESH = f"{MECHANISM}::test_noise_is_fresh_in_every_step_tensor_and_run"
SCALE = f"{MECHANISM}::test_noise_has_the_declared_scale_whatever_the_batch"
REFERENCE = f"{MECHANISM}::test_without_noise_it_is_the_clipped_sum_however_it_is_cut[loop]"
BOUND = f"{MECHANISM}::test_no_unit_moves_the_sum_by_more_than_the_clip_norm"
CANARY = f"{MECHANISM}::test_a_canary_moves_the_sum_by_the_clip_norm"
EMPTY = f"{MECHANISM}::test_an_empty_batch_is_noise_and_is_booked"
ALL_EMPTY = f"{MECHANISM}::test_without_any_record_training_goes_on_as_noise"
VIEWS = f"{MECHANISM}::test_views_of_a_unit_are_one_contribution[loop]"
OWN_NOISE = f"{MECHANISM}::test_every_view_of_every_record_has_its_own_timestep_and_noise"
NEIGHBOURS = f"{MECHANISM}::test_neighbours_differ_by_one_clipped_contribution_and_nothing_else"
ON_DISK = f"{MECHANISM}::test_nothing_secret_is_on_disk_after_a_private_run"
CONSTANTS = f"{MECHANISM}::test_sampling_clipping_noise_and_ledger_have_one_set_of_constants"
WATCH = f"{MECHANISM}::test_watch_accepts_what_should_move_and_refuses_what_should_not"

SELECTED = 'np.flatnonzero(self._random(step, "units").random(len(self._units)) < self.sample_rate)'
NOISE = 'derive_wide(self.secret, "noise", step)'
DRAWN = "random.standard_normal(like.numel(), dtype=np.float32)"
ADD_NOISE = "        if accelerator.is_main_process:\n            flat += self.noise(flat, step)\n"
ADD_CLIPPED = "add_clipped(gradients, self.clip_norm, totals)"
STANDARD_DEVIATION = "drawn * (self.noise_multiplier * self.clip_norm)"
BOOK = "        if accelerator.is_main_process:\n            self.book(step)\n"
SPENT = "self.spent = sum(segment.steps for segment in self._before)"

SAMPLING = [
    bug(
        "shuffled batches of constant size",
        "defenses/poisson.py",
        SELECTED,
        'np.sort(self._random(step, "units").permutation(len(self._units))[: round(self.sample_rate * len(self._units))])',
        BINOMIAL,
    ),
    bug(
        "shuffled epochs",
        "defenses/poisson.py",
        SELECTED,
        'np.sort(np.array_split(self._random(step // 10, "units").permutation(len(self._units)), 10)[step % 10])',
        BINOMIAL,
    ),
    bug(
        "the same batch in every step",
        "defenses/poisson.py",
        SELECTED,
        SELECTED.replace("(step,", "(step // 2,"),
        BINOMIAL,
    ),
    bug(
        "the rate of the sampling is not the one that is booked",
        "defenses/poisson.py",
        "        self.sample_rate = sample_rate",
        "        self.sample_rate = min(1.0, 1.5 * sample_rate)",
        CONSTANTS,
    ),
    bug(
        "group cap ignored",
        "defenses/poisson.py",
        "if len(unit) <= self._cap",
        "if True",
        f"{POISSON}::test_a_group_gives_at_most_cap_images_each_as_often_as_the_others",
    ),
    bug(
        "every rank takes the whole batch",
        "defenses/poisson.py",
        "[rank::world_size]",
        "[:]",
        f"{POISSON}::test_ranks_are_disjoint_and_complete_and_units_stay_whole",
        f"{PROCESSES}::test_ranks_share_the_plan_without_overlap",
    ),
    bug(
        "ranks leave records out",
        "defenses/poisson.py",
        "[rank::world_size]",
        "[rank :: world_size + 1]",
        f"{POISSON}::test_ranks_are_disjoint_and_complete_and_units_stay_whole",
    ),
    bug(
        "every rank has its own secret",
        "defenses/mechanism.py",
        "return broadcast_object_list([drawn])[0]",
        "return drawn",
        f"{PROCESSES}::test_ranks_stay_together",
    ),
]

RANDOMNESS = [
    bug("the same noise in every step", "defenses/mechanism.py", NOISE, NOISE.replace(", step", ""), FRESH),
    bug(
        "noise from a known seed",
        "defenses/mechanism.py",
        NOISE,
        NOISE.replace("self.secret", "0"),
        FRESH,
        f"{MECHANISM}::test_noise_does_not_follow_the_seed_of_the_run",
    ),
    bug(
        "tensors share their noise",
        "defenses/mechanism.py",
        DRAWN,
        "np.tile(random.standard_normal(like.numel() // 2, dtype=np.float32), 2)",
        FRESH,
    ),
    bug(
        "uniform noise of the right variance",
        "defenses/mechanism.py",
        DRAWN,
        "((random.random(like.numel(), dtype=np.float32) - 0.5) * np.float32(12**0.5))",
        SCALE,
    ),
    bug(
        "noise and batches follow run.seed",
        "defenses/dpsgd.py",
        "shared_secret(context.accelerator, config.test_seed)",
        "shared_secret(context.accelerator, context.seed)",
        ANEW,
        f"{RESUME}::test_noise_and_batches_are_fresh_after_a_resume",
    ),
    bug(
        "a secret of 32 bits",
        "defenses/mechanism.py",
        "secrets.randbits(256)",
        "secrets.randbits(32)",
        f"{MECHANISM}::test_the_secret_is_new_unless_it_is_given",
    ),
]

NOISE_SCALE = [
    bug(
        "noise on every rank",
        "defenses/mechanism.py",
        ADD_NOISE,
        "        flat += self.noise(flat, step)\n",
        f"{PROCESSES}::test_noise_does_not_depend_on_the_number_of_processes",
    ),
    bug(
        "mean over the ranks",
        "defenses/mechanism.py",
        'reduce(flat, "sum")',
        'reduce(flat, "mean")',
        f"{PROCESSES}::test_the_sum_does_not_depend_on_the_number_of_processes",
    ),
    bug(
        "the model is wrapped by DDP, which averages raw gradients",
        "defenses/mechanism.py",
        "prepares_model = False",
        "prepares_model = True",
        f"{PROCESSES}::test_ranks_stay_together",
    ),
    bug(
        "noise in every micro-batch",
        "defenses/mechanism.py",
        "            units = group_views(batch",
        "            flat += self.noise(flat, step)\n            units = group_views(batch",
        f"{SCALE}[2]",
    ),
    bug("no noise", "defenses/mechanism.py", STANDARD_DEVIATION, "drawn * 0", f"{SCALE}[1]"),
    bug(
        "noise without the clip norm",
        "defenses/mechanism.py",
        STANDARD_DEVIATION,
        "drawn * self.noise_multiplier",
        f"{SCALE}[1]",
    ),
    bug(
        "noise after the division",
        "defenses/mechanism.py",
        ADD_NOISE + '        flat = reduce(flat, "sum") / self.divisor\n',
        '        flat = reduce(flat, "sum") / self.divisor\n' + ADD_NOISE,
        f"{SCALE}[1]",
    ),
]

CLIPPING = [
    bug(
        "the batch is clipped, not its units",
        "defenses/mechanism.py",
        ADD_CLIPPED,
        "add_clipped([gradient.sum(0, keepdim=True) for gradient in gradients], self.clip_norm, totals)",
        REFERENCE.replace("loop", "vmap"),  # by the loop every unit comes alone
    ),
    bug("no clipping", "defenses/mechanism.py", ADD_CLIPPED, "add_clipped(gradients, 1e9, totals)", REFERENCE, CANARY),
    bug(
        "every tensor is clipped by itself",
        "defenses/mechanism.py",
        ADD_CLIPPED,
        "[add_clipped([g], self.clip_norm, [t]) for g, t in zip(gradients, totals, strict=True)]",
        REFERENCE,
        CANARY,
    ),
    bug(
        "small gradients are scaled up",
        "defenses/mechanism.py",
        ".clamp(min=1e-30)).clamp(max=1.0)",
        ".clamp(min=1e-30))",
        BOUND,
    ),
    bug(
        "the sum is kept in bfloat16",
        "defenses/mechanism.py",
        "for parameter in parameters), dtype=torch.float32, device=device)",
        "for parameter in parameters), dtype=torch.bfloat16, device=device)",
        REFERENCE,
    ),
    bug(
        "a broken record is only multiplied by zero",
        "defenses/mechanism.py",
        "gradients = [torch.where(_column(finite, gradient), gradient, 0.0) for gradient in gradients]",
        "pass",
        BOUND,
        f"{MECHANISM}::test_a_broken_record_adds_exactly_nothing[vmap-nan]",
    ),
    bug(
        "views are clipped one by one",
        "defenses/mechanism.py",
        "group_views(batch, self.unit_of_row[batch.rows])",
        "group_views(batch, np.arange(len(batch)))",
        VIEWS,
    ),
    bug(
        "views are summed, not averaged",
        "defenses/persample.py",
        "np.where(real, 1 / views[:, None], 0)",
        "np.where(real, 1.0, 0)",
        f"{GRADIENTS}::test_views_of_a_unit_are_averaged_and_padding_counts_nothing",
    ),
    bug(
        "padding counts as a view",
        "defenses/persample.py",
        "np.where(real, 1 / views[:, None], 0)",
        "np.where(real, 1 / views[:, None], 1 / views[:, None])",
        f"{GRADIENTS}::test_views_of_a_unit_are_averaged_and_padding_counts_nothing",
    ),
    bug(
        "the layout defect of Opacus",
        "defenses/persample.py",
        "[activations[0].contiguous()]",
        "[activations[0]]",
        f"{GRADIENTS}::test_backends_agree_with_the_loop[UNet2DModel-channels_last]",
        f"{CHECK}::test_right_backends_pass_on_fresh_models[UNet2DModel-hooks]",
    ),
    bug(
        "no start-up check",
        "defenses/mechanism.py",
        "        check(self.backend, self.reference, model, loss, units, self.tolerance)\n",
        "",
        f"{MECHANISM}::test_the_rule_checks_its_backend_against_one_by_one_gradients",
        f"{MECHANISM}::test_models_that_couple_examples_are_refused_by_the_rule",
    ),
    bug(
        "BatchNorm is accepted",
        "defenses/gradcheck.py",
        "if isinstance(module, nn.modules.batchnorm._BatchNorm):",
        "if False:",
        f"{CHECK}::test_coupling_layers_are_refused",
        f"{DPSGD}::test_models_that_couple_records_are_refused",
    ),
    bug(
        "one timestep for the whole batch",
        "train/diffusion.py",
        "batch.timesteps = timesteps.to(clean.device)",
        "batch.timesteps = timesteps[:1].expand(len(batch)).to(clean.device)",
        OWN_NOISE,
    ),
    bug(
        "one noise for the whole batch",
        "train/diffusion.py",
        'batch.random.normal("noise", *clean.shape[1:])',
        'batch.random.normal("noise", *clean.shape[1:])[:1].repeat(len(batch), 1, 1, 1)',
        OWN_NOISE,
    ),
    bug(
        "views share timestep and noise",
        "train/loop.py",
        "order = repeats(rows)",
        "order = np.zeros_like(rows)",
        OWN_NOISE,
    ),
]

DIVISOR = [
    bug(
        "mean over the realised batch",
        "defenses/mechanism.py",
        'reduce(flat, "sum") / self.divisor',
        'reduce(flat, "sum") / max(1, sum(map(len, losses)))',
        f"{MECHANISM}::test_twice_the_batch_is_twice_the_sum",
    ),
    bug(
        "the divisor follows the number of records",
        "defenses/dpsgd.py",
        "float(expected or rate * drawn)",
        "float(rate * len(self._units))",
        NEIGHBOURS,
    ),
    bug(
        "the noise follows the number of records",
        "defenses/dpsgd.py",
        "noise_multiplier=mechanism.noise_multiplier,",
        "noise_multiplier=mechanism.noise_multiplier * len(self._units) / 28,",
        NEIGHBOURS,
    ),
    bug(
        "an empty batch is skipped by the rule",
        "defenses/mechanism.py",
        "        losses = [torch.zeros(0, device=device)]\n",
        "        losses = [torch.zeros(0, device=device)]\n        if not len(microbatches):\n            return losses[0]\n",
        f"{SCALE}[0]",
        ALL_EMPTY,
    ),
    bug(
        "an empty batch is not booked",
        "defenses/mechanism.py",
        BOOK,
        BOOK.replace("is_main_process:", "is_main_process and len(microbatches):"),
        EMPTY,
        ALL_EMPTY,
    ),
    bug(
        "an empty batch does not advance the learning rate",
        "train/loop.py",
        "        self.lr_schedule.step()\n",
        "        if len(microbatches):\n            self.lr_schedule.step()\n",
        ALL_EMPTY,
    ),
    bug(
        "an empty batch does not advance the average",
        "train/loop.py",
        "        state.ema.step(trained_parameters(state.model))\n",
        "        if len(microbatches):\n            state.ema.step(trained_parameters(state.model))\n",
        ALL_EMPTY,
    ),
    bug(
        "learning rate stepped once per process",
        "train/stage.py",
        "lr_schedule=build_schedule(settings.optimizer, optimizer, settings.steps),",
        "lr_schedule=accelerator.prepare_scheduler(build_schedule(settings.optimizer, optimizer, settings.steps)),",
        f"{PROCESSES}::test_the_learning_rate_does_not_depend_on_the_number_of_processes",
    ),
]

BOOKS = [
    bug("a resume starts a new account", "defenses/dpsgd.py", SPENT, "self.spent = 0", ANEW),
    bug(
        "a resume overwrites the ledger",
        "defenses/ledger.py",
        'open("ab")',
        'open("wb")',
        f"{LEDGER}::test_every_step_is_one_line_that_can_be_read_back",
    ),
    bug(
        "spent is what the checkpoint has seen",
        "defenses/dpsgd.py",
        "left = max(0, steps - self.spent)\n        if not left and",
        "left = max(0, steps - self._released)\n        if not left and",
        ANEW,
        f"{RESUME}::test_killed_between_ledger_line_and_checkpoint_at_every_step",
    ),
    bug(
        "a ledger that lost lines is accepted",
        "defenses/dpsgd.py",
        "if self.spent < self._released:",
        "if False:",
        f"{RESUME}::test_a_ledger_shorter_than_the_checkpoint_is_refused",
    ),
    bug(
        "booked after the release",
        "defenses/mechanism.py",
        BOOK + "        accelerator.wait_for_everyone()\n",
        "        book_later = self.book\n        accelerator.wait_for_everyone()\n",
        f"{MECHANISM}::test_a_step_is_booked_before_anything_is_computed",
    ),
    bug(
        "a line is not forced to the disk",
        "defenses/ledger.py",
        "os.fsync(file.fileno())",
        "pass",
        f"{LEDGER}::test_a_line_is_on_disk_when_append_returns",
    ),
    bug(
        "a torn line costs nothing",
        "defenses/ledger.py",
        "return [line or _dearer(_around(found, place)) for place, line in enumerate(found) if place >= start]",
        "return [line for line in found if line is not None]",
        f"{LEDGER}::test_a_torn_last_line_counts_like_its_neighbour",
    ),
    bug(
        "changed constants open no segment",
        "defenses/ledger.py",
        "if runs and runs[-1][1] == mechanism:",
        "if runs:",
        f"{LEDGER}::test_every_constant_separates_segments",
    ),
    bug(
        "two clip norms",
        "defenses/dpsgd.py",
        "clip_norm=mechanism.clip_norm,",
        "clip_norm=2 * mechanism.clip_norm,",
        CONSTANTS,
    ),
    bug(
        "a known seed is not told",
        "defenses/dpsgd.py",
        "test=config.test_seed is not None,",
        "test=False,",
        f"{RESUME}::test_a_test_seed_in_the_middle_makes_the_whole_run_not_private",
    ),
    bug(
        "another sampling rate is accounted",
        "defenses/ledger.py",
        "Spend(s.mechanism.noise_multiplier, s.mechanism.sample_rate, s.steps)",
        "Spend(s.mechanism.noise_multiplier, s.mechanism.sample_rate / 1.5, s.steps)",
        f"{DPSGD}::test_the_claimed_epsilon_is_within_the_budget_and_rounded_up",
    ),
    bug(
        "PRV with another sampling rate",
        "defenses/accounting.py",
        "(s.noise_multiplier, s.sample_rate, s.steps) for s in segments",
        "(s.noise_multiplier, s.sample_rate / 1.5, s.steps) for s in segments",
        f"{ACCOUNTING}::TestGoldenTable::test_prv",
    ),
    bug(
        "PLD without its subsampling's copies",
        "defenses/accounting.py",
        "    if copies == 1:\n        return dp_event.PoissonSampledDpEvent",
        "    if copies:\n        return dp_event.PoissonSampledDpEvent",
        f"{ACCOUNTING}::test_patient_table",
    ),
    bug(
        "epsilon is rounded down",
        "defenses/accounting.py",
        "rounding=ROUND_CEILING",
        'rounding="ROUND_FLOOR"',
        f"{ACCOUNTING}::TestRoundUp",
    ),
    bug(
        "accountants that contradict each other are believed",
        "defenses/accounting.py",
        "if (math.isfinite(least) and epsilon < least - slack) or epsilon > other + slack:",
        "if False:",
        f"{ACCOUNTING}::TestBill::test_two_accountants_must_agree",
    ),
    bug(
        "delta may be one over the units",
        "defenses/dpsgd.py",
        "if config.delta >= 1 / self.units:",
        "if False:",
        f"{DPSGD}::test_what_the_data_do_not_allow_names_its_key",
    ),
]

SIDE_DOORS = [
    bug(
        "the rule returns private losses",
        "defenses/mechanism.py",
        "return torch.cat(losses) if self.returns_losses else losses[0]",
        "return torch.cat(losses)",
        REFERENCE,
    ),
    bug(
        "losses are logged",
        "train/combinations.py",
        "quiet = any(defense.private for defense in defenses) and not config.report.nonprivate_metrics",
        "quiet = False",
        f"{DPSGD}::test_the_log_holds_public_values_only",
    ),
    bug(
        "speed, which follows the batch, is logged",
        "train/loop.py",
        'return self.record({"learning_rate": rate})',
        'return self.record({"learning_rate": rate, "images_per_second": 1 / seconds})',
        ON_DISK,
        f"{DPSGD}::test_the_log_holds_public_values_only",
    ),
    bug(
        "the label histogram is written",
        "train/combinations.py",
        "return np.ones_like(frequency) if is_quiet(config, defenses) else frequency",
        "return frequency",
        f"{DPSGD}::test_the_sidecar_holds_no_measurement_of_the_records",
    ),
    bug(
        "the drawn number of images is written",
        "train/loop.py",
        "state.images_seen = round(state.step * self.plan.images_per_step)",
        "state.images_seen += len(self.plan.batch(state.step - 1))",
        f"{DPSGD}::test_images_seen_is_the_expected_number_not_the_drawn_one",
    ),
    bug(
        "a defense looks at records after checkpoints",
        "train/combinations.py",
        "if quiet and watchers:",
        "if False:",
        f"{DPSGD}::test_a_defense_that_looks_at_records_is_refused_beside_it",
    ),
    bug(
        "clipping in the trainer is accepted",
        "train/combinations.py",
        'elif settings.optimizer.max_grad_norm not in (None, "auto"):',
        "elif False:",
        f"{DPSGD}::test_clipping_in_the_trainer_is_refused",
    ),
    bug(
        "fp16 is accepted",
        "train/state.py",
        'if self.precision not in ("bf16", "fp32"):',
        "if False:",
        f"{DPSGD}::test_values_that_cannot_be_name_their_key[train.precision=fp16-train.precision]",
    ),
    bug(
        "raw gradients stay in p.grad",
        "defenses/mechanism.py",
        "if any(parameter.grad is not None for parameter in parameters):",
        "if False:",
        f"{MECHANISM}::test_a_gradient_left_from_elsewhere_is_refused",
    ),
    bug(
        "the optimizer trains other tensors",
        "train/stage.py",
        "build_optimizer(settings.optimizer, trained_parameters(model), settings.learning_rate)",
        "build_optimizer(settings.optimizer, [torch.nn.Parameter(p.detach().clone()) for p in trained_parameters(model)], 1e-3)",
        f"{DPSGD}::test_only_trained_tensors_change",
    ),
    bug(
        "frozen tensors are noised",
        "defenses/mechanism.py",
        "for part, parameter in zip(parts, parameters, strict=True):\n            parameter.grad",
        "for parameter in model.parameters():\n            parameter.grad = torch.zeros_like(parameter)\n        for part, parameter in zip(parts, parameters, strict=True):\n            parameter.grad",
        f"{CANARY}[LoRA-vmap-default]",
    ),
    bug("frozen tensors may move", "defenses/mechanism.py", "        if frozen:\n", "        if False:\n", WATCH),
    bug("all weights may stand still", "defenses/mechanism.py", "        if not moved:", "        if False:", WATCH),
    bug(
        "one trained tensor is not in the optimizer",
        "train/stage.py",
        "build_optimizer(settings.optimizer, trained_parameters(model), settings.learning_rate)",
        "build_optimizer(settings.optimizer, trained_parameters(model)[1:], settings.learning_rate)",
        ALL_EMPTY,
    ),
    bug(
        "ranks may drift apart",
        "defenses/mechanism.py",
        "if any(other != now for other in gather_object([now])):",
        "if False:",
        f"{MECHANISM}::test_watch_refuses_ranks_that_drifted_apart",
    ),
    bug(
        "the secret is in the checkpoint",
        "defenses/dpsgd.py",
        'return {"released": self._released}',
        'return {"released": self._released, "secret": self._secret}',
        ON_DISK,
        f"{DPSGD}::test_checkpoints_hold_no_loss",
    ),
    bug(
        "the seed of the plan is in the ledger",
        "defenses/dpsgd.py",
        "self._ledger.append(self.mechanism, self._segment, step, self._process)",
        'self._ledger.append(self.mechanism, self._segment, step, f"{self._plan.seed:x}")',
        ON_DISK,
    ),
    bug(
        "the state of a generator is in the checkpoint",
        "train/loop.py",
        "values = {**counters, **steps",
        'values = {**counters, "generator": torch.get_rng_state().tolist(), **steps',
        ON_DISK,
    ),
]

MUTANTS = [*SAMPLING, *RANDOMNESS, *NOISE_SCALE, *CLIPPING, *DIVISOR, *BOOKS, *SIDE_DOORS]


def main(names: Sequence[str]) -> int:
    """Runs the named bugs, or all; returns the exit status."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"no such bug: {', '.join(sorted(unknown))}")
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    import_libraries()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder) / "tree")
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        status, seconds = run(tests, tree, Path(folder) / "log")
        print(f"{'pass' if status == 0 else 'FAIL':10} without a bug: {len(tests)} tests, {seconds:.0f} s", flush=True)
        if status != 0:
            print((Path(folder) / "log").read_text()[-4000:])
            return 1
        for mutant in chosen:
            verdict, seconds = judged(mutant, tree, Path(folder) / "log")
            print(f"{verdict:10} {mutant.name}, {seconds:.0f} s", flush=True)
            if verdict != "caught":
                bad.append(mutant.name)
                print((Path(folder) / "log").read_text()[-1500:])
    print(f"{len(chosen) - len(bad)} of {len(chosen)} caught" + "".join(f"\n  {name}" for name in bad))
    return 1 if bad else 0


def judged(mutant: Mutant, tree: Path, log: Path) -> tuple[str, float]:
    """Plants one bug, asks each of its tests, and takes it out again: (verdict, seconds)."""
    file = tree / mutant.file
    right, total = file.read_text(), 0.0
    if right.count(mutant.old) != 1:
        log.write_text(f"{mutant.file} holds this {right.count(mutant.old)} times, not once:\n{mutant.old}\n")
        return "NO FIT", 0.0
    file.write_text(right.replace(mutant.old, mutant.new))
    try:
        for test in mutant.tests:
            status, seconds = run([test], tree, log)
            total += seconds
            if status == 0:
                log.write_text(f"passes all the same: {test}\n")
                return "SURVIVED", total
            if status != 1:  # 1: tests failed; anything else: they did not run
                return "BROKEN", total
    finally:
        file.write_text(right)
    return "caught", total


def copied(tree: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    return tree


def import_libraries() -> None:
    """Once, before forking: they take longer than most tests. None of ours, which differ from bug to bug."""
    import accelerate.utils  # noqa: F401
    import diffusers  # noqa: F401
    import opacus.grad_sample  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)


def run(tests: Sequence[str], tree: Path, log: Path) -> tuple[int, float]:
    """pytest in a fork of this process, inside ``tree``: (exit status, seconds). A signal or a timeout gives 128 or more."""
    started, child = time.perf_counter(), os.fork()
    if child == 0:
        inside(tests, tree, log)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:  # interrupted: the child is in a group of its own, so that it can be ended with its children
        os.killpg(child, signal.SIGKILL)
        raise
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), time.perf_counter() - started


def inside(tests: Sequence[str], tree: Path, log: Path) -> None:
    """Of the forked process; does not return."""
    code = 3
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # with what the tests have started
        signal.alarm(LONGEST)
        os.chdir(tree)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins complain that libraries are imported already
        sys.path[:] = [
            str(tree),
            *(path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")),
        ]
        import defenses

        assert Path(defenses.__file__).is_relative_to(tree), defenses.__file__
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
