"""The training loop: fetch, gradient, update, average, log, checkpoint. It knows the seams but no defense."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, reduce
from torch import nn
from tqdm import tqdm

from defenses.base import Batch, BatchPlan, CheckpointView, Defense, GradientRule, Microbatches
from defenses.errors import UserError
from defenses.seeding import RecordRandom, derive
from train import checkpoint
from train.objective import Objective
from train.plan import repeats
from train.runlog import RunDirectory
from train.state import TrainConfig, TrainState, trained_parameters


@dataclass
class Trainer:
    """What a step needs, built by stage.py.

    ``fetch`` gives fields of `Batch` for rows: ``images`` as uint8 [b, C, H, W], ``labels`` int64 [b] or None, for models with
    text ``captions`` and ``more_captions``, and ``moments`` where they are cached.
    """

    config: TrainConfig
    seed: int
    state: TrainState
    wrapped: nn.Module  # the model as Accelerate prepared it, or the bare one
    objective: Objective
    plan: BatchPlan
    fetch: Callable[[np.ndarray], dict[str, Any]]
    rule: GradientRule
    defenses: list[Defense]
    lr_schedule: Any
    accelerator: Accelerator
    directory: RunDirectory
    evaluate: Callable[[], dict[str, float]]  # held-out losses of the current EMA weights
    preview: Callable[[int], None]
    view: Callable[[int], CheckpointView]
    quiet: bool  # nothing that was measured on the records is logged or saved
    frozen: str = ""  # digest of the weights that are not trained, which checkpoints do not hold

    def train(self) -> None:
        """Trains from ``state.step`` to the end, or until a defense or a signal stops it."""
        config, state = self.config, self.state
        bar = tqdm(
            total=config.steps,
            initial=state.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            smoothing=0.1,
        )
        last_step = min([config.steps, *(defense.last_step(config.steps) for defense in self.defenses)])
        with _interruption() as interrupted, bar:
            mark = state.seconds
            while state.step < last_step and state.stopped_by is None:
                started = time.perf_counter()
                losses = self.step()
                if not self.quiet:
                    state.loss_sum = state.loss_sum.to(losses.device) + losses.sum(dtype=torch.float64)
                    state.loss_count += len(losses)
                state.step += 1
                state.images_seen = round(state.step * self.plan.images_per_step)
                bar.update()
                stop = self.interrupted_anywhere(interrupted)
                state.seconds += time.perf_counter() - started  # training alone, without what follows
                due = _Due(config, state.step, last_step)
                if due.log:
                    self.log(bar, state.seconds - mark)
                    mark = state.seconds
                if due.heldout and not self.quiet:
                    self.record(self.evaluate())
                if due.preview:
                    self.preview(state.step)
                if due.checkpoint:
                    self.ask_defenses()
                if due.checkpoint or stop:
                    self.save()
                if stop:
                    raise Interrupted(state.step)

    def step(self) -> torch.Tensor:
        """One optimizer step. Returns this rank's per-example losses, float32 [b]."""
        state = self.state
        microbatches = self.microbatches(self.plan.batch(state.step))
        torch.manual_seed(derive(self.seed, "dropout", state.step, self.accelerator.process_index))
        losses = self.rule.backward(self.wrapped, self.loss, microbatches, state.step, self.accelerator)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        self.lr_schedule.step()
        state.ema.step(trained_parameters(state.model))
        for defense in self.defenses:
            defense.end_step()
        return losses

    def microbatches(self, rows: np.ndarray) -> Microbatches:
        """This rank's share of the global batch, changed by the defenses, with what the objective draws."""
        parts = self.plan.microbatches(rows, self.accelerator.process_index, self.accelerator.num_processes)
        order = repeats(rows)
        return Microbatches([partial(self.batch, rows[part], order[part]) for part in parts])

    def batch(self, rows: np.ndarray, repeat: np.ndarray) -> Batch:
        return self.change(self.fetch(rows), RecordRandom(self.plan.seed, self.state.step, rows, repeat), rows)

    def example(self, count: int, negated: slice = slice(0), step: int = 0, drawn: bool = True) -> Batch:
        """A batch of random images in place of records, to try the model on before any record is touched.

        Args:
            negated: which of them are shown as their negative, with other captions.
            step, drawn: whose randomness is used, and whether the objective follows after seam 2.
        """
        found = self.fetch(np.zeros(1, dtype=np.int64))  # shapes and types alone are used
        random = RecordRandom(self.seed, step, range(count), [0] * count)
        noise = (random.uniform("example", *found["images"].shape[1:]) * 255).to(torch.uint8)
        noise[negated] = 255 - noise[negated]
        fields = {"images": noise, "labels": None if found["labels"] is None else found["labels"].new_zeros(count)}
        other = np.isin(np.arange(count), np.arange(count)[negated])
        for name, values in found.items():
            if isinstance(values, list):  # texts of a record, one or several
                one, several = isinstance(values[0], str), [["four"] if each else [] for each in other]
                fields[name] = ["three" if each else "one two" for each in other] if one else several
        return self.change(fields, random, np.arange(count), drawn)

    def change(self, fields: dict[str, Any], random: RecordRandom, rows: np.ndarray, drawn: bool = True) -> Batch:
        """The batch of some records after seam 2, with what the objective draws."""
        device = self.accelerator.device
        images = fields["images"].to(device, non_blocking=True).float() / 127.5 - 1  # float32 -1..1
        labels, version = fields["labels"], images._version
        batch = Batch(
            **{**fields, "images": images, "labels": labels if labels is None else labels.to(device)},
            rows=rows,
            random=random,
        )
        for defense in self.defenses:
            batch = defense.change_batch(batch)
        if batch.images is not images or images._version != version:
            batch = replace(batch, moments=None)  # those of other pictures
        return self.objective.draw(batch) if drawn else batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Per-example losses after the defenses, float32 [b]: a pure function of (weights, batch)."""
        losses = self.objective.loss(model, batch)
        for defense in self.defenses:
            losses = defense.change_loss(losses, batch)
        return losses

    def log(self, bar: tqdm, seconds: float) -> None:
        """One line of metrics.jsonl: mean loss over all ranks since the last line, learning rate, speed."""
        state = self.state
        total, count = self.loss_totals()
        state.loss_sum, state.loss_count = torch.zeros_like(state.loss_sum), 0
        self.refuse_nonfinite(total)
        rate = self.lr_schedule.get_last_lr()[0]
        if self.quiet:
            return self.record({"learning_rate": rate})
        loss, speed = total / count if count else None, count / seconds
        bar.set_postfix(loss="-" if loss is None else f"{loss:.4f}", images_per_s=f"{speed:.0f}")
        self.record({"loss": loss, "learning_rate": rate, "images_per_second": speed})

    def record(self, values: dict[str, float]) -> None:
        self.directory.log({"step": self.state.step, **values})
        self.accelerator.log({key: value for key, value in values.items() if value is not None}, step=self.state.step)

    def refuse_nonfinite(self, total: float) -> None:
        """Stops before a diverged model replaces a good checkpoint.

        Raises:
            UserError: the loss, or a weight after its last update, is not finite.
        """
        weights = torch.stack([each.detach().abs().amax() for each in trained_parameters(self.state.model)])
        if not np.isfinite(total) or not bool(weights.isfinite().all()):
            raise UserError(
                "train.learning_rate",
                f"training diverged: loss or weights are not finite at step {self.state.step}",
                "choose another run.name with a lower train.learning_rate",
            )

    def save(self) -> None:
        """Writes a checkpoint on the main process while the others wait."""
        state = self.state
        folder = self.directory.checkpoints / f"step-{state.step}"
        totals = self.loss_totals()
        self.refuse_nonfinite(totals[0])
        if self.accelerator.is_main_process:
            counters = {**state.counters(), "loss_sum": totals[0], "loss_count": totals[1]}
            defenses = {defense.name: defense.state_dict() for defense in self.defenses}
            steps = {"ema_steps": state.ema.optimization_step, "frozen": self.frozen}
            values = {**counters, **steps, "defenses": defenses}
            checkpoint.save(folder, state.model, state.optimizer, state.ema.shadow_params, values)
            checkpoint.prune(self.directory.checkpoints, self.config.keep_checkpoints, state.release_step)
        self.accelerator.wait_for_everyone()

    def loss_totals(self) -> tuple[float, int]:
        """Sum and number of the losses since the last line of the log, over all ranks."""
        count = torch.tensor(float(self.state.loss_count), dtype=torch.float64)
        sums = torch.stack([self.state.loss_sum.cpu(), count]).to(self.accelerator.device)
        total, count = reduce(sums, "sum").tolist()
        return total, int(count)

    def resume(self, folder: Path) -> None:
        """Restores ``state`` from a checkpoint, on every rank."""
        ema, values = checkpoint.load(folder, self.state.model, self.state.optimizer)
        if values.get("frozen", self.frozen) != self.frozen:
            raise UserError(
                "model.pretrained",
                f"has other weights than when {folder} was written, which holds only what was trained",
                "give the same model again, or choose another run.name",
            )
        for name in self.state.counters():
            setattr(self.state, name, values[name])
        if self.accelerator.is_main_process:  # the sums were saved over all ranks
            self.state.loss_sum = torch.tensor(values["loss_sum"], dtype=torch.float64)
            self.state.loss_count = values["loss_count"]
        self.state.ema.optimization_step = values["ema_steps"]
        for average, loaded in zip(self.state.ema.shadow_params, ema, strict=True):
            average.copy_(loaded)
        for defense in self.defenses:
            if defense.name in values["defenses"]:
                defense.load_state_dict(values["defenses"][defense.name])
        self.lr_schedule.last_epoch = self.state.step  # the rate itself came back with the optimizer
        self.lr_schedule._last_lr = [group["lr"] for group in self.state.optimizer.param_groups]
        self.directory.truncate_metrics(self.state.step)

    def ask_defenses(self) -> None:
        """Seam 5: any defense may end training or name the checkpoint to release. Before the checkpoint is saved, so that
        the answer survives a stop."""
        listeners = [d for d in self.defenses if type(d).after_checkpoint is not Defense.after_checkpoint]
        if not listeners:
            return
        view = self.view(self.state.step)
        for defense in listeners:
            # every rank looks, the main process decides: ranks that disagree would wait for each other for ever
            verdict = broadcast_object_list([defense.after_checkpoint(view)])[0]
            if verdict is not None and verdict.release_step is not None:
                self.refuse_missing(verdict.release_step)
                self.state.release_step = verdict.release_step
            if verdict is not None and verdict.stop:
                self.state.stopped_by = defense.name

    def refuse_missing(self, step: int) -> None:
        if step != self.state.step and step not in checkpoint.all_steps(self.directory.checkpoints):
            raise UserError("train.keep_checkpoints", f"step {step}, to be released, was removed", "set it to null")

    def interrupted_anywhere(self, interrupted: list[int]) -> bool:
        """Whether any rank got a signal; asked every step, because torchrun kills its workers 30 s after it passed one on."""
        if self.accelerator.num_processes == 1:
            return bool(interrupted)
        flag = torch.tensor([float(len(interrupted))], device=self.accelerator.device)
        return reduce(flag, "sum").item() > 0


class _Due:
    """What happens after a step."""

    def __init__(self, config: TrainConfig, step: int, last_step: int):
        last = step == last_step

        def every(interval: int) -> bool:
            return interval > 0 and (step % interval == 0 or last)

        self.log = step % config.log_every == 0 or last
        self.heldout = every(config.heldout_every)
        self.preview = every(config.preview_every)
        self.checkpoint = last or every(config.checkpoint_every)


class Interrupted(Exception):
    """Training was stopped by SIGTERM or SIGINT after a checkpoint at ``step``."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after the checkpoint of step {step}")


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that the step in progress can end and be saved."""
    received: list[int] = []
    previous = {
        name: signal.signal(name, lambda number, frame: received.append(number))
        for name in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
