"""The output filter on near copies that a model makes, judged by a measure that it does not use.

Filters that find exact copies may miss what a model makes of a picture (Koeken et al. 2025). A network is overfitted on four
training pictures of 300; they are noised to several timesteps and denoised by it.
"""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel

from defenses.base import Pool, SamplingContext
from defenses.outputfilter import OutputFilter, OutputFilterConfig, load_filter
from eval.correlation import closest
from train.diffusion import DiffusionConfig, noise_schedule
from train.phantom import PhantomConfig, phantom_items

pytestmark = pytest.mark.slow
OVERFITTED, STEPS, EACH = 4, 250, 32


@pytest.fixture(scope="module")
def phantom():
    """Rows of each split, uint8 [680, 1, 16, 16], patients."""
    items = phantom_items(PhantomConfig(pictures=300, copied=0, outliers=6, heldout=300, calibration=80))
    splits = ("train", "calibration", "heldout")
    rows = {split: np.array([row for row, item in enumerate(items) if item.split == split]) for split in splits}
    return rows, np.stack([item.draw(16, 1) for item in items]), [item.patient for item in items]


@pytest.fixture(scope="module")
def guard(phantom, tmp_path_factory):
    rows, images, patients = phantom
    pool = Pool(images, rows["train"], [""] * len(images), patients, picture=range(len(images)))
    folder = tmp_path_factory.mktemp("model")
    context = SamplingContext(pool, rows["calibration"], folder, Accelerator(cpu=True))
    OutputFilter(OutputFilterConfig()).wrap_sampler(lambda indices, conditions=None: None, context)
    return load_filter(folder / "output_filter")


@pytest.fixture(scope="module")
def overfitted(phantom):
    """(network, noise schedule, its training pictures in [-1, 1])."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    rows, images, _ = phantom
    pictures = torch.from_numpy(images[rows["train"][:OVERFITTED]]).float() / 127.5 - 1
    schedule = noise_schedule(DiffusionConfig())
    optimizer = torch.optim.Adam(network.parameters())
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch, timesteps = pictures[torch.randint(OVERFITTED, (8,))], torch.randint(1000, (8,))
        noise = torch.randn_like(batch)
        prediction = network(schedule.add_noise(batch, noise, timesteps), timesteps, return_dict=False)[0]
        loss = (prediction - schedule.get_velocity(batch, noise, timesteps)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
    return network.eval(), schedule, pictures


@torch.no_grad()
def denoised(overfitted, begin: int) -> np.ndarray:
    """Copies of the overfitted pictures, noised to timestep ``begin`` and denoised in steps of 40, uint8 [EACH, 1, 16, 16]."""
    network, schedule, pictures = overfitted
    clean = pictures.repeat(EACH // OVERFITTED, 1, 1, 1)
    sampler = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing", clip_sample=True)
    sampler.set_timesteps(25)
    images = schedule.add_noise(clean, torch.randn_like(clean), torch.full((EACH,), begin))
    for timestep in sampler.timesteps[sampler.timesteps <= begin]:
        prediction = network(images, timestep.expand(EACH), return_dict=False)[0]
        images = sampler.step(prediction, timestep, images, return_dict=False)[0]
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def made(overfitted):
    """128 images from the four pictures noised a little to a lot."""
    torch.manual_seed(1)
    return np.concatenate([denoised(overfitted, begin) for begin in (199, 399, 599, 799)])


@pytest.fixture(scope="module")
def strangers(phantom):
    """How near each held-out picture comes to any training picture, by correlation, float64 [300]."""
    rows, images, _ = phantom
    return closest(images[rows["heldout"]], images[rows["train"]], np.arange(300)).correlation


def test_recall_on_near_copies_of_a_model(phantom, guard, made, strangers):
    """Near copies by correlation: one of the four comes closer than any held-out picture comes to any training picture, or,
    more loosely, than 95 % of them do. None is an exact copy. Measured: 115 and 124 of 128 images, recall 1.00 and 0.99; the
    attack's own threshold would find 0.85."""
    rows, images, _ = phantom
    train = images[rows["train"]]
    found, flagged = closest(made, train, np.arange(300)), guard.flagged(made)
    own = found.picture < OVERFITTED
    sure, loose = (own & (found.correlation > level) for level in (strangers.max(), np.quantile(strangers, 0.95)))
    attack = guard.scores(made) <= 1
    assert not (made[:, None] == train[None, :OVERFITTED]).all((2, 3, 4)).any()
    assert sure.sum() > 90 and flagged[sure].mean() > 0.97
    assert loose.sum() > sure.sum() and flagged[loose].mean() > 0.9
    assert attack[sure].mean() < 0.95


def test_false_alarms_on_held_out_pictures(phantom, guard):
    rows, images, _ = phantom
    assert guard.flagged(images[rows["heldout"]]).mean() == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize(
    ("edit", "passes"),
    [("half the contrast", (0.6, 0.95)), ("40 levels brighter", (0.3, 0.7)), ("cropped by an eighth", (0.3, 0.8))],
)
def test_edited_copies_pass_as_the_claim_says(phantom, guard, edit, passes, strangers):
    """What docs/output-filter.md says of copies that a person edits, so that nobody takes the filter for more than it is."""
    rows, images, _ = phantom
    levels = images[rows["train"]].astype(np.float64)
    if edit == "half the contrast":
        levels = (levels - 128) / 2 + 128
    elif edit == "40 levels brighter":
        levels = levels + 40
    else:
        inner = torch.from_numpy(levels[..., 1:-1, 1:-1])
        levels = torch.nn.functional.interpolate(inner, 16, mode="bicubic").numpy()
    edited = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    share = 1 - guard.flagged(edited).mean()
    seen = (closest(edited, images[rows["train"]], np.arange(300)).correlation > strangers.max()).mean()
    assert passes[0] < share < passes[1]
    assert seen > 0.95 or edit == "cropped by an eighth"  # correlation sees through brightness and contrast only
