"""What is watched during training, on all ranks: held-out losses and sample grids of the averaged weights."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import nn

from defenses.base import Batch
from defenses.seeding import RecordRandom, derive
from train import families
from train.data import Dataset
from train.diffusion import Schedule, autocast
from train.objective import Objective
from train.records import labels_of
from train.sampling import SamplerConfig, blocks, class_of_sample
from train.state import TrainState, averaged_weights


def heldout_batches(
    config: SimpleNamespace,
    dataset: Dataset,
    names: list[str],
    objective: Objective,
    accelerator: Accelerator,
    captions: list[str] | None = None,
) -> dict[str, list[Batch]]:
    """Batches without chance (for diffusion: fixed noise, evenly spread timesteps): this rank's share of held-out and of training records.

    Args:
        captions: of every record, for models with text.
    """
    settings = config.train
    if not settings.heldout_every:
        return {}
    result = {}
    for name, rows in (("heldout_loss", dataset.rows("heldout")), ("train_loss", dataset.rows("train", kept=True))):
        order = np.random.Generator(np.random.Philox(derive(0, name))).permutation(rows)[: settings.heldout_records]
        share, batches = order[accelerator.process_index :: accelerator.num_processes], []
        for start in range(0, len(share), settings.batch_size):
            part = share[start : start + settings.batch_size]
            images = torch.from_numpy(dataset.images[part]).float() / 127.5 - 1
            random = RecordRandom(0, 0, part, np.zeros(len(part), dtype=int))
            # One stratum of the schedule per record: the spread over timesteps is even for any number of records.
            position = (np.searchsorted(np.sort(order), part) + 0.5) / len(order)
            batch = Batch(images, part, labels_of(dataset, part, names), random)
            batch.captions = None if captions is None else [captions[row] for row in part]
            batches.append(objective.fix(batch, position))
        if len(order):
            result[name] = batches
    return result


def heldout_losses(
    config: SimpleNamespace,
    state: TrainState,
    objective: Objective,
    batches: dict[str, list[Batch]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Deterministic mean losses of the EMA weights; the gap between the two is the onset of memorisation."""
    device, result = accelerator.device, {}
    with averaged_weights(state) as model:
        for name, parts in batches.items():
            sums = torch.zeros(2, device=device)
            for part in parts:
                with autocast(device, config.train.precision):
                    losses = objective.heldout_loss(model, part.to(device))
                sums += torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=device)])
            total, count = reduce(sums, "sum").tolist()
            result[name] = total / count
    return result


def sample_on_all_ranks(
    config: SimpleNamespace,
    model: nn.Module,
    schedule: Schedule,
    frequency: np.ndarray,
    indices: Sequence[int],
    accelerator: Accelerator,
    prompts: Callable[[Sequence[int]], list[str]] | None = None,
) -> torch.Tensor:
    """Images of ``model`` for sample indices, drawn in whole blocks by all ranks, float32 [n, C, H, W] in [0, 1].

    Args:
        frequency: weight of every class, int64 [classes]; empty for unconditional models.
        prompts: sample indices -> prompts, for models with text.
    """
    steps = min(25, config.train.diffusion.timesteps)
    # small blocks, so that every rank has some
    name = "euler" if config.train.diffusion.prediction == "flow" else "ddim"
    sampler = SamplerConfig(sampler=name, steps=steps, batch_size=8, guidance_scale=config.generate.guidance_scale)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    drawn, family = [], families.of(config.model)
    for block in blocks(len(indices), sampler.batch_size, accelerator.process_index, accelerator.num_processes):
        chosen = [indices[i] for i in block]
        labels = torch.from_numpy(class_of_sample(chosen, frequency, config.run.seed)) if len(frequency) else None
        images = family.sample(
            family.released(model),
            schedule,
            sampler,
            chosen,
            shape,
            seed=config.run.seed,
            labels=labels,
            prompts=prompts(chosen) if prompts is not None else None,
            precision=config.train.precision,
        )
        drawn.append((block.start, images))
    gathered = sorted(gather_object(drawn), key=lambda pair: pair[0])
    return torch.cat([images for _, images in gathered])
