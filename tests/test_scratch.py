"""A small pipeline from scratch: its autoencoder, its parts, what is written, and stops in between."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch.distributions import Normal, kl_divergence

from defenses.errors import UserError
from defenses.seeding import RecordRandom
from train.autoencoder import (
    AutoencoderTraining,
    ScratchConfig,
    add_over_ranks,
    rate,
    reconstruction_l2,
    scaled,
    standardise,
)
from train.diffusion import DiffusionConfig, noise_schedule
from train.plan import EpochPlan
from train.scratch import FACTS, SIZES, autoencoder, check_size, kept_file, make, network, seeded, text_model
from train.vocabulary import learn

CAPTIONS = ["a red square", "a blue square", "a red disc, small"]
CONFIG = ScratchConfig(autoencoder_steps=4, autoencoder_batch_size=6)


def pictures(count: int = 24, channels: int = 3) -> np.ndarray:
    """Squares of any place and colour on white, uint8 [count, channels, 16, 16]."""
    random = np.random.default_rng(0)
    images = np.full((count, channels, 16, 16), 255, dtype=np.uint8)
    for image in images:
        x, y = random.integers(0, 9, 2)
        image[:, y : y + 8, x : x + 8] = random.integers(0, 256, (channels, 1, 1))
    return images


def nano(channels: int = 3):
    return seeded(lambda: autoencoder(SIZES["nano"], 16, channels), 0, "autoencoder")


def training(folder: Path, **changed) -> AutoencoderTraining:
    settings = {
        "config": CONFIG, "images": pictures(), "rows": np.arange(20), "seed": 3, "precision": "fp32",
        "accelerator": Accelerator(cpu=True), "folder": folder,
    }  # fmt: skip
    return AutoencoderTraining(**settings | changed)


def made(folder: Path, **changed) -> dict:
    images = changed.pop("images", pictures())
    settings = {
        "size": "nano", "captions": CAPTIONS, "images": images, "rows": np.arange(20), "heldout": np.arange(20, 24),
        "schedule": noise_schedule(DiffusionConfig()), "config": CONFIG, "seed": 3, "precision": "fp32",
        "accelerator": Accelerator(cpu=True),
    }  # fmt: skip
    return make(folder, **settings | changed)


def weights_of(folder: Path) -> bytes:
    return (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_finished_autoencoder_serves_other_runs_of_the_same_pictures(tmp_path, monkeypatch):
    """The second run trains none, has the same weights to the bit, and tells the seconds of the first; anything else that decides
    the autoencoder makes another one."""
    config = replace(CONFIG, autoencoders=str(tmp_path / "kept"))
    alone, first = made(tmp_path / "alone"), made(tmp_path / "first", config=config)
    assert len(list((tmp_path / "kept").iterdir())) == 1 and (tmp_path / "kept").stat().st_mode & 0o777 == 0o700

    def refused(self, vae):
        raise ArithmeticError("trains")

    monkeypatch.setattr(AutoencoderTraining, "run", refused)
    second = made(
        tmp_path / "second", config=config, captions=["other words", "a red square"], heldout=np.arange(20, 22)
    )
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "first") == weights_of(tmp_path / "second")
    assert second["seconds"] == first["seconds"] > 0 and alone["reconstruction_l2"] == first["reconstruction_l2"]
    other = pictures()
    other[3, 0, 5, 5] ^= 1
    changes = [
        {"seed": 4}, {"images": other}, {"rows": np.arange(19)}, {"precision": "bf16"},
        {"config": replace(config, kl_weight=2e-4)}, {"config": CONFIG},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        with pytest.raises(ArithmeticError, match="trains"):
            made(tmp_path / f"other{number}", **{"config": config} | change)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_kept_autoencoder_that_is_damaged_is_refused(tmp_path, damage):
    config = replace(CONFIG, autoencoders=str(tmp_path / "kept"))
    made(tmp_path / "first", config=config)
    (file,) = (tmp_path / "kept").iterdir()
    content = bytearray(file.read_bytes())
    content[-10] ^= 1  # one bit of a weight
    file.write_bytes(content[:1000] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"autoencoder-[0-9a-f]{16}.safetensors: is no autoencoder of this run"):
        made(tmp_path / "second", config=config)


@pytest.mark.parametrize("where", ["full", "read-only"])
def test_an_autoencoder_that_cannot_be_kept_stops_no_run(tmp_path, monkeypatch, capsys, where):
    """A full disk costs other runs their time, not this one its hours."""
    config = replace(CONFIG, autoencoders=str(tmp_path / "kept"))
    if where == "full":
        monkeypatch.setattr("train.scratch.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    else:
        (tmp_path / "kept").write_text("a file")  # no folder can be made there
    facts = made(tmp_path / "base", config=config)
    assert re.search("is not kept for other runs: .*(No space left|exists|Not a directory)", capsys.readouterr().out)
    assert (tmp_path / "base" / FACTS).exists() and facts["seconds"] > 0
    if where == "full":
        assert not list((tmp_path / "kept").iterdir())


def test_other_libraries_make_another_autoencoder(tmp_path, monkeypatch):
    config = replace(CONFIG, autoencoders=str(tmp_path / "kept"))
    names = {kept_file(training(tmp_path, config=config), "nano").name}
    names.add(kept_file(training(tmp_path, config=config, images=pictures().reshape(24, 3, 8, 32)), "nano").name)
    monkeypatch.setattr("torch.__version__", "0.0.1")
    names.add(kept_file(training(tmp_path, config=config), "nano").name)
    assert len(names) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_folder_is_a_pipeline_that_draws_by_prompt(tmp_path, channels):
    facts = made(tmp_path / "base", images=pictures(channels=channels))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base", use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a red square", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert (drawn.size, drawn.mode) == ((16, 16), "L" if channels == 1 else "RGB")
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.beta_schedule, config.clip_sample) == (
        "v_prediction",
        "squaredcos_cap_v2",
        False,
    )
    assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor) == (1.0, None)
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size
    assert facts["reconstruction_l2"] == pytest.approx(
        reconstruction_l2(pipeline.vae, pictures(channels=channels), np.arange(20, 24))
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))


def test_a_second_call_finds_all_done_and_a_foreign_folder_is_kept(tmp_path):
    facts = made(tmp_path / "base")
    assert made(tmp_path / "base", captions=[]) == facts == json.loads((tmp_path / "base" / FACTS).read_text())
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: is not a pipeline made from scratch"):
        made(tmp_path / "mine")


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        made(tmp_path / name, seed=seed)
    for part in ("unet", "vae", "text_encoder"):
        one, two, three = (
            next((tmp_path / name / part).glob("*.safetensors")).read_bytes() for name in ("one", "two", "three")
        )
        assert one == two != three


@pytest.mark.parametrize(("size", "millions"), [("nano", (0.08, 0.8, 0.1)), ("tiny", (1.0, 4.3, 0.7))])
def test_sizes_are_as_documented(size, millions):
    class Words(SimpleNamespace):
        def __len__(self):
            return SIZES[size].vocabulary

    limit = SIZES[size].vocabulary
    words = Words(model_max_length=32, bos_token_id=limit - 2, eos_token_id=limit - 1, pad_token_id=limit - 1)
    parts = (autoencoder(SIZES[size], 64, 3), network(SIZES[size], 64), text_model(SIZES[size], words))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert [round(count, 1 if count > 0.095 else 2) for count in counts] == list(millions)
    assert parts[0].encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 8, 8)


def test_an_image_size_that_does_not_fit_is_refused(tmp_path):
    check_size(SIZES["tiny"], 64)
    with pytest.raises(UserError, match="data.image_size: 28 is not a multiple of 16.*take 32"):
        made(tmp_path / "base", images=np.zeros((24, 3, 28, 28), dtype=np.uint8))
    assert not list(tmp_path.iterdir())


def test_latents_are_standardised_and_pictures_stay():
    vae, images = nano(), pictures(64)
    with torch.no_grad():
        vae.quant_conv.bias += torch.tensor([3.0, -2, 0, 1, 0, -1, 0, 1])  # means and variances that are not 0 and 1
        shifted = vae.encode(scaled(images)).latent_dist
        decoded = vae.decode(shifted.mean).sample
        standardise(vae, images, np.arange(64))
        after = vae.encode(scaled(images)).latent_dist
        drawn = torch.cat([after.sample(torch.Generator().manual_seed(seed)) for seed in range(50)])
        assert torch.allclose(drawn.mean((0, 2, 3)), torch.zeros(4), atol=0.02)
        assert torch.allclose(drawn.std((0, 2, 3)), torch.ones(4), atol=0.02)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        ratio = shifted.std / after.std  # one number per channel, by which the means were divided, too
        assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-4)
        assert torch.allclose(after.mean.diff(dim=0) * ratio[1:], shifted.mean.diff(dim=0), atol=1e-4)


def test_the_reconstruction_error_is_in_units_of_pixels():
    """A codec that adds 0.2 in [-1, 1] is off by 0.1 in [0, 1], and not at all where a pixel is white already."""
    latent = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))  # noqa: E731
    codec = SimpleNamespace(
        encode=latent,
        decode=lambda z: SimpleNamespace(sample=z + 0.2),
        parameters=lambda: iter([torch.zeros(1)]),
    )
    images = np.full((2, 1, 4, 4), 100, dtype=np.uint8)
    images[1, :, :2] = 255  # half of the second picture
    expected = (0.1 + np.sqrt(0.5 * 0.1**2)) / 2
    assert reconstruction_l2(codec, images, np.arange(2)) == pytest.approx(expected, rel=1e-5)


def test_losses_are_those_of_the_definition(tmp_path):
    vae, own = nano(), RecordRandom(0, 0, [0, 1], [0, 0])
    x = scaled(pictures(2))
    error, divergence = training(tmp_path)._losses(vae, x, own)
    posterior = vae.encode(x).latent_dist
    draw = posterior.mean + posterior.std * own.normal("autoencoder", 4, 2, 2)
    assert torch.allclose(error, (vae.decode(draw).sample - x).pow(2).mean((1, 2, 3)))
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).mean((1, 2, 3))
    assert torch.allclose(divergence, expected, rtol=1e-4)


def test_the_learning_rate_rises_and_falls():
    assert [rate(step, 100) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(55, 100) == pytest.approx(0.5)
    assert 0 < rate(99, 100) < 0.01 and rate(0, 1) == 1.0


@pytest.mark.slow
def test_it_learns_to_reconstruct(tmp_path):
    """Two halves of any colours: six numbers, where the latent has sixteen."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (80, 3, 2, 1), dtype=np.uint8).repeat(8, axis=2).repeat(16, axis=3)
    config = ScratchConfig(autoencoder_steps=400, autoencoder_batch_size=8, autoencoder_learning_rate=4e-3)
    vae, unseen, mean = nano(), np.arange(64, 80), images[:64].mean(axis=0)
    blind = np.sqrt(
        (((images[64:] - mean) / 255) ** 2).mean((1, 2, 3))
    ).mean()  # by someone who has not seen the picture
    training(tmp_path, config=config, images=images, rows=np.arange(64)).run(vae)
    assert reconstruction_l2(vae, images, unseen) < 0.5 * blind


def test_a_stopped_training_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    whole = nano()
    training(tmp_path / "whole").run(whole)
    step = AutoencoderTraining._step

    def stopping(self, vae, optimizer, plan, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, vae, optimizer, plan, number)

    monkeypatch.setattr(AutoencoderTraining, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "cut", save_every_sec=0.0).run(nano())
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-2"]
    seen = []
    monkeypatch.setattr(AutoencoderTraining, "_step", lambda self, *a: (seen.append(a[3]), step(self, *a))[1])
    again = nano()
    training(tmp_path / "cut").run(again)
    assert seen == [2, 3]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_interim_state_of_other_settings_is_not_used(tmp_path):
    training(tmp_path / "x", save_every_sec=0.0).run(nano())
    one, other = nano(), nano()
    training(tmp_path / "x", seed=4).run(one)
    training(tmp_path / "y", seed=4).run(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_ranks_sum_to_the_gradient_of_one(tmp_path, monkeypatch):
    """Each rank's share of the batch, with the noise of its own records, before the exchange."""
    gradients = []
    monkeypatch.setattr(
        "train.autoencoder.add_over_ranks",
        lambda vae, _: gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()])),
    )
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        fake = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        one = training(tmp_path, accelerator=fake)
        vae = nano()
        plan = EpochPlan(one.rows, one.config.autoencoder_batch_size, one.seed)
        one._step(vae, torch.optim.SGD(vae.parameters(), lr=0.0), plan, 1)
    whole, first, second = gradients
    assert torch.allclose(first + second, whole, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_gradients_are_summed_over_ranks():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    other = torch.tensor([10.0, 20.0, 30.0])  # of the other rank
    fake = SimpleNamespace(num_processes=2, reduce=lambda mine, reduction: mine + other)
    add_over_ranks(model, fake)
    assert model.weight.grad.tolist() == [[11.0, 22.0]] and model.bias.grad.tolist() == [33.0]


def test_divergence_is_told(tmp_path):
    config = ScratchConfig(autoencoder_steps=3, autoencoder_batch_size=4, autoencoder_learning_rate=1e37)
    with pytest.raises(UserError, match="autoencoder_learning_rate: the autoencoder diverged"):
        training(tmp_path, config=config).run(nano())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autoencoder_steps", 0),
        ("autoencoder_batch_size", 0),
        ("autoencoder_learning_rate", 0.0),
        ("autoencoder_learning_rate", float("nan")),
        ("kl_weight", -1e-6),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"model.scratch.{name}"):
        ScratchConfig(**{name: value})


def test_the_tokenizer_comes_from_the_captions(tmp_path):
    made(tmp_path / "base")
    words = DiffusionPipeline.from_pretrained(tmp_path / "base", use_safetensors=True).tokenizer
    assert words.get_vocab() == learn(CAPTIONS, SIZES["nano"].vocabulary).get_vocab()
