"""Started by test_noise_processes.py: what one, two and four processes draw, sum and release.

Usage: distributed_noise.py FOLDER. For every world size W the main process writes FOLDER/W.json and FOLDER/W.npy. The ranks are
forked with the variables that torchrun sets: importing the libraries seven times would take most of the time.
"""

import hashlib
import json
import multiprocessing.connection
import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses import dpclaim
from defenses.mechanism import NoisyClippedSum, shared_secret
from tests.small import opened
from train.stage import build_trainer

WORLDS = (1, 2, 4)
SIGMA, CLIP, DIVISOR = 1.7, 0.3, 6.0
DPSGD = (
    f"defenses.dpsgd={{noise_multiplier: {SIGMA}, clip_norm: {CLIP}, batch_size: {DIVISOR:.0f}, sample_rate: 0.5, delta: 1e-3,"
    "physical_batch: 2, test_seed: 3}"
)


def zero(model, batch) -> torch.Tensor:
    """A loss without a gradient, float32 [B]."""
    return 0.0 * batch.images.flatten(1).sum(1)


def taken(trainer) -> torch.Tensor:
    """The released gradient, float32 [parameters], removed from the parameters."""
    parameters = list(trainer.state.model.parameters())
    found = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def release(trainer, loss) -> torch.Tensor:
    microbatches = trainer.microbatches(trainer.plan.batch(trainer.state.step))
    trainer.rule.backward(trainer.wrapped, loss, microbatches, trainer.state.step, trainer.accelerator)
    return taken(trainer)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def measure(folder: Path, world_size: int) -> None:
    NoisyClippedSum.check = lambda self, model, loss, example: None  # covered elsewhere, and slow,
    dpclaim.build = lambda *arguments, **settings: {}  # like the accountants
    config, dataset, directory, defenses, accelerator = opened(
        folder, f"run.name=w{world_size}", DPSGD, "train.optimizer.warmup_steps=20"
    )
    assert accelerator.num_processes == world_size
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    plan, rank = trainer.plan, accelerator.process_index
    secrets_agree = len(set(gather_object([shared_secret(accelerator, None)]))) == 1

    drawn = []
    for step in range(5):
        rows = plan.batch(step)
        parts = plan.microbatches(rows, rank, world_size)
        drawn.append({"plan": rows.tolist(), "ranks": gather_object([[rows[part].tolist() for part in parts]])})

    noise = release(trainer, zero)
    noise_digests = gather_object([digest(noise)])
    trainer.rule.noise_multiplier = 0.0
    total = release(trainer, trainer.loss)
    trainer.rule.noise_multiplier = SIGMA

    trainer.loss = zero
    for _ in range(5):  # past the comparison of the weights over the ranks
        trainer.step()
        trainer.state.step += 1
    weights = torch.cat([parameter.flatten() for parameter in trainer.state.model.parameters()])
    result = {
        "std": noise.double().std().item(),
        "noise_digests": noise_digests,
        "weight_digests": gather_object([digest(weights)]),
        "secrets_agree": secrets_agree,
        "wrapped": trainer.wrapped is not trainer.state.model,
        "drawn": drawn,
        "learning_rate": trainer.lr_schedule.get_last_lr()[0],
        "booked": len((directory.path / "ledger.jsonl").read_text().splitlines()),
    }
    if accelerator.is_main_process:
        np.save(folder / f"{world_size}.npy", total.double().numpy())
        (folder / f"{world_size}.json").write_text(json.dumps(result))


def forked(rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
        os.environ["MASTER_PORT"] = str(port)
    measure(folder, world_size)


def launch(world_size: int, folder: Path) -> None:
    """Runs `measure` on so many processes; if one fails, the others do not wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=forked, args=(rank, world_size, port, folder)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    while alive := [rank.sentinel for rank in ranks if rank.is_alive()]:
        if any(rank.exitcode for rank in ranks):
            break
        multiprocessing.connection.wait(alive)
    for rank in ranks:
        rank.terminate()
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"{world_size} processes ended with {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    for size in WORLDS:
        launch(size, Path(sys.argv[1]))
