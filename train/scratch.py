"""A complete small text-to-image pipeline from scratch: tokenizer learnt from the captions, autoencoder trained on the
pictures, text encoder and network random. What is written is a Stable Diffusion 1 pipeline and is trained like any other.

The tokenizer holds words of the captions and the autoencoder has seen the pictures, both without any bound on what they
tell: for a private run start from a pipeline made of public data.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from defenses.errors import UserError
from defenses.ranks import on_main, together
from defenses.seeding import derive
from train.autoencoder import AutoencoderTraining, ScratchConfig, initialise, reconstruction_l2, standardise
from train.files import atomic, whole_folder, write_json
from train.vocabulary import learn

FACTS = "scratch.json"  # in the pipeline folder: how its parts were made
LATENT_CHANNELS = 4  # as in Stable Diffusion 1 and 2
_BLOCK = 1024  # pictures whose bytes are read at once
HEAD = 16  # channels of an attention head of the network


@dataclass(frozen=True)
class Size:
    """Widths of the parts. The autoencoder halves the picture between its levels: four make 8 x 8 latents of 64 px."""

    autoencoder: tuple[int, ...]  # channels of every level, multiples of 8
    network: tuple[int, ...]  # channels of every level, multiples of 16; cross-attention on all but the last
    layers: int  # residual layers per level of the network
    text: int  # width of the text encoder
    text_layers: int
    vocabulary: int  # tokens at most

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.autoencoder) - 1)

    @property
    def step(self) -> int:
        """What image sizes must be a multiple of: every level of the network halves the latents without a rest."""
        return self.factor * 2 ** (len(self.network) - 1)


# Parameters of autoencoder, network, text encoder.
SIZES = {
    "nano": Size((8, 16, 16, 16), (32, 64), 1, 64, 1, 1024),  # 0.08 M, 0.8 M, 0.1 M: for tests
    "tiny": Size((16, 32, 64, 64), (80, 144), 1, 128, 2, 2048),  # 1.0 M, 4.3 M, 0.7 M: for two CPU cores
    "small": Size((32, 64, 128, 128), (160, 320, 320), 1, 256, 4, 4096),  # 3.9 M, 36 M, 4.2 M: for a GPU
}


def make(
    folder: Path,
    *,
    size: str,
    captions: Sequence[str | None],
    images: np.ndarray,
    rows: np.ndarray,
    heldout: np.ndarray,
    schedule: DDPMScheduler,
    config: ScratchConfig,
    seed: int,
    precision: str,
    accelerator: Any,
    save_every_sec: float = 30.0,
) -> dict[str, Any]:
    """Writes ``folder``, a `StableDiffusionPipeline` that appears whole or not at all; if it is there, nothing is done.

    All ranks call it. A call that was stopped goes on where it was at most ``save_every_sec`` before. Grey pictures give
    an autoencoder of one channel, and the pipeline grey pictures.

    Args:
        size: a key of `SIZES`.
        captions: of the training records.
        images: uint8 [N, C, H, W], H = W.
        rows: of the pictures that the autoencoder is trained on, int64. One of each picture suffices: a picture that
            occurs fifty times in training would draw the autoencoder's attention to it.
        heldout: rows of other pictures, on which the reconstruction is measured; none: on ``rows``.
        schedule: the noise schedule that the network will be trained with; the pipeline's `DDIMScheduler` follows it.
        seed: of weights, batches and noise.
        precision: "bf16" or "fp32" arithmetic; weights are float32.

    Returns:
        The contents of `FACTS`: ``reconstruction_l2`` (what is generated is at least about so far from any picture),
        ``reconstruction_of`` ("heldout" or "training"), ``seconds`` of the autoencoder's training, ``parameters``, ...

    Raises:
        UserError: captions or image size do not fit, or the training diverged.
    """
    if on_main(accelerator, (folder / FACTS).exists):
        return json.loads((folder / FACTS).read_text())
    if folder.exists():
        raise UserError(str(folder), "is not a pipeline made from scratch", "remove it")
    if size not in SIZES:
        raise UserError("model.size", f"{size} is not offered from scratch for text", f"choose {', '.join(SIZES)}")
    sizes, (channels, image_size) = SIZES[size], images.shape[1:3]
    check_size(sizes, image_size)
    tokenizer = learn(captions, sizes.vocabulary)
    vae = seeded(lambda: autoencoder(sizes, image_size, channels), seed, "autoencoder").to(accelerator.device)
    interim = folder.with_name(f".{folder.name}.autoencoder")
    training = AutoencoderTraining(config, images, rows, seed, precision, accelerator, interim, save_every_sec)
    kept = kept_file(training, size)
    seconds = taken(kept, vae, accelerator)
    if seconds is None:
        seconds = training.run(vae)
        keep(kept, vae, seconds, accelerator)

    def finish() -> dict[str, Any]:
        standardise(vae, images, rows)
        measured = heldout if len(heldout) else rows
        unet = seeded(lambda: network(sizes, image_size), seed, "network")
        text_encoder = seeded(lambda: text_model(sizes, tokenizer), seed, "text encoder")
        models = {"autoencoder": vae, "network": unet, "text_encoder": text_encoder}
        facts = {
            "reconstruction_l2": reconstruction_l2(vae, images, measured),
            "reconstruction_of": "heldout" if len(heldout) else "training",
            "seconds": seconds,
            "steps": config.autoencoder_steps,
            "size": size,
            "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            "vocabulary": len(tokenizer),
            "longest_caption": tokenizer.model_max_length,
        }
        save_pipeline(folder, vae, text_encoder, tokenizer, unet, sampler_of(schedule), facts)
        shutil.rmtree(interim, ignore_errors=True)
        return facts

    return on_main(accelerator, finish)


def save_pipeline(folder: Path, vae, text_encoder, tokenizer, unet, scheduler, facts: dict[str, Any]) -> None:
    """Writes a `StableDiffusionPipeline` with `FACTS` beside it, whole or not at all."""
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with whole_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / FACTS, facts)


def kept_file(training: AutoencoderTraining, size: str) -> Path | None:
    """Where the finished autoencoder of a training is kept for other runs: the name is a digest of all that decides it, pictures, settings,
    seed, number of processes, kind of device and versions of the libraries. None: nowhere."""
    config, rows, folder, accelerator = (
        training.config,
        training.rows,
        training.config.autoencoders,
        training.accelerator,
    )
    if folder is None:
        return None
    told = [asdict(replace(config, autoencoders=None)), size, asdict(SIZES[size]), training.seed, training.precision]
    told += [torch.__version__, diffusers.__version__, accelerator.device.type, accelerator.num_processes]
    digest = hashlib.sha256(json.dumps([*told, len(rows), *training.images.shape[1:]]).encode())
    digest.update(rows.astype(np.int64).tobytes())  # random numbers go by row
    for start in range(0, len(rows), _BLOCK):
        digest.update(np.ascontiguousarray(training.images[rows[start : start + _BLOCK]]).tobytes())
    return Path(folder) / f"autoencoder-{digest.hexdigest()[:16]}.safetensors"


def taken(file: Path | None, vae: AutoencoderKL, accelerator: Any) -> float | None:
    """Loads a kept autoencoder into ``vae``, on all ranks; returns the seconds that its training took, or None: there is none.

    Raises:
        UserError: the file is damaged.
    """
    if file is None or not on_main(accelerator, file.exists):
        return None

    def load() -> float:
        try:
            with safe_open(file, "pt") as stored:
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                if hashlib.sha256(save(weights)).hexdigest() != stored.metadata()["sha256"]:
                    raise ValueError("other weights than were kept")
                vae.load_state_dict(weights)
                return float(stored.metadata()["seconds"])
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(str(file), "is no autoencoder of this run", "remove it") from error

    seconds = together(accelerator, load)
    vae.eval()
    return seconds


def keep(file: Path | None, vae: AutoencoderKL, seconds: float, accelerator: Any) -> None:
    """Keeps a finished autoencoder, which has seen the pictures: the folder is for its owner alone. Where it cannot be written, this run
    goes on without."""

    def write() -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in vae.state_dict().items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic(file, "wb") as handle:
                sha256 = hashlib.sha256(save(weights)).hexdigest()
                handle.write(save(weights, {"seconds": str(seconds), "sha256": sha256}))
        except OSError as error:
            accelerator.print(f"the autoencoder is not kept for other runs: {error}")

    if file is not None:
        on_main(accelerator, write)


def check_size(size: Size, image_size: int) -> None:
    """Refuses pictures whose latents the network cannot halve.

    Raises:
        UserError: another size is needed.
    """
    if image_size % size.step:
        near = max(size.step, round(image_size / size.step) * size.step)
        raise UserError(
            "data.image_size", f"{image_size} is not a multiple of {size.step}, which the model needs", f"take {near}"
        )


def seeded(build, seed: int, part: str):
    """A part of the pipeline with weights that depend on the seed alone."""
    torch.manual_seed(derive(seed, "scratch", part))
    return build().eval()


def autoencoder(size: Size, image_size: int, channels: int) -> AutoencoderKL:
    """For [B, channels, image_size, image_size] in [-1, 1]. Its latents are standardised in the weights: scaling factor 1."""
    levels = len(size.autoencoder)
    vae = AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=size.autoencoder, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS, norm_num_groups=min(32, size.autoencoder[0] // 4), sample_size=image_size,
        scaling_factor=1.0, shift_factor=None,
    )  # fmt: skip
    initialise(vae)
    return vae


def network(size: Size, image_size: int) -> UNet2DConditionModel:
    """Denoiser of the latents, with attention to the caption on every level but the smallest, as in Stable Diffusion 1."""
    crossed = len(size.network) - 1
    return UNet2DConditionModel(
        sample_size=image_size // size.factor, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=size.network, layers_per_block=size.layers, norm_num_groups=16,
        attention_head_dim=tuple(width // HEAD for width in size.network),  # the number of heads, despite the name
        cross_attention_dim=size.text, down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
    )  # fmt: skip


def text_model(size: Size, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """For token sequences of ``tokenizer.model_max_length``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=size.text, intermediate_size=4 * size.text,
            num_hidden_layers=size.text_layers, num_attention_heads=size.text // 32, projection_dim=size.text,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def sampler_of(schedule: DDPMScheduler) -> DDIMScheduler:
    """DDIM as in Stable Diffusion 1: latents are not clipped. Trailing timesteps (Lin et al. 2024), as our own sampler takes them."""
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(schedule.config, **settings)
