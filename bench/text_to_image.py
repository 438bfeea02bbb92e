"""Text-to-image against diffusers, side by side in one run: a step of fine-tuning, and generation.

python bench/text_to_image.py [--size tiny] [--layout sd15] [--rounds 8] [--steps 4] [--batch 16] [--images 16]
                              [--sampling-steps 10] [--precision auto] [--threads N]

The pipeline is the same for both, with random weights: a small one of ours (``--size``), or the layout of Stable Diffusion 1.5
(``--layout sd15``, for a GPU). Fine-tuning: the loop of diffusers' examples/text_to_image/train_text_to_image.py (encode pictures
and captions, noise, loss, backward, clip, AdamW, EMA), against our trainer with cached latents and embeddings; the text encoder is
frozen in both, and pictures lie in memory for both. Generation: the pipeline called for one prompt with as many images as fit,
under autocast, with the same scheduler, steps and guidance, against ours. Alternating rounds; medians and their ratio. On a GPU
the largest memory allocated by each side is printed too.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from eval.config import SECTIONS as EVAL_SECTIONS
from eval.textsource import TextSampler, load_model
from train import cli, pipelines, scratch
from train import config as configuration
from train.data import prepare
from train.diffusion import DiffusionConfig, autocast, noise_schedule
from train.records import select_records
from train.runlog import RunDirectory
from train.sampling import SamplerConfig
from train.stage import build_trainer
from train.vocabulary import learn

GUIDANCE = 7.5


class Example:
    """Steps of diffusers' example, on pictures in [-1, 1] and token ids that are ready in memory."""

    def __init__(self, folder: Path, images: torch.Tensor, captions: list[str], batch: int, precision: str, device):
        parts = pipelines.load(folder)
        self.vae, self.text, self.unet = parts.vae, parts.text_encoders[0], parts.network
        for module in (self.vae, self.text):
            module.requires_grad_(False)
        for module in (self.vae, self.text, self.unet):
            module.to(device)
        self.unet.train()
        tokenizer = parts.tokenizers[0]
        self.ids = tokenizer(
            captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        self.images, self.batch, self.precision, self.device = images, batch, precision, device
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-5)
        self.schedule = get_scheduler("constant", optimizer=self.optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999)
        self.noise_scheduler = DDPMScheduler.from_config(parts.scheduler.config)
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(len(self.images), (self.batch,), generator=self.random)
            pixels, ids = self.images[rows].to(self.device), self.ids[rows].to(self.device)
            with autocast(self.device, self.precision):
                latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (self.batch,), device=self.device).long()
                noisy = self.noise_scheduler.add_noise(latents.float(), noise.float(), timesteps)
                text = self.text(ids, return_dict=False)[0]
                prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.step(self.unet.parameters())


def make_pipeline(folder: Path, args: argparse.Namespace, captions: list[str]) -> int:
    """A pipeline with random weights; returns the side of its pictures."""
    schedule = noise_schedule(DiffusionConfig(prediction="epsilon", noise_schedule="scaled_linear"))
    torch.manual_seed(0)
    if args.layout == "sd15":
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        tokenizer = learn(captions, 2048)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        parts = {
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
            ),
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "text_encoder": CLIPTextModel(text),
        }  # fmt: skip
        side = 512
    else:
        sizes, side, tokenizer = scratch.SIZES[args.size], 64, learn(captions, 2048)
        parts = {
            "vae": scratch.autoencoder(sizes, side, 3),
            "unet": scratch.network(sizes, side),
            "text_encoder": scratch.text_model(sizes, tokenizer),
        }
    StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=scratch.sampler_of(schedule), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return side


def compare(name: str, sides: dict[str, Callable[[], None]], count: int, rounds: int, device, goal: float) -> None:
    """Alternating rounds; prints records (or images) per second of each and the ratio of the medians."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory = dict.fromkeys(sides, 0)
    for repeat in range(rounds + 1):
        for side in sides if repeat % 2 else reversed(sides):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            sides[side]()
            if device.type == "cuda":
                torch.cuda.synchronize()
                memory[side] = max(memory[side], torch.cuda.max_memory_allocated())
            if repeat:  # the first round warms up
                seconds[side].append(time.perf_counter() - started)
    for side, rounds_ in seconds.items():
        speeds = sorted(count / value for value in rounds_)
        peak = f", peak {memory[side] / 2**30:.2f} GiB" if memory[side] else ""
        print(
            f"{name}, {side:10} per second: median {statistics.median(speeds):.1f}, {speeds[0]:.1f} to {speeds[-1]:.1f}{peak}"
        )
    ratio = statistics.median(seconds["diffusers"]) / statistics.median(seconds["deffuse"])
    print(f"{name}: deffuse / diffusers {ratio:.2f} (goal: at least {goal})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=list(scratch.SIZES))
    parser.add_argument("--layout", choices=["small", "sd15"], default="small")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    for name, default in (
        ("rounds", 8),
        ("steps", 4),
        ("batch", 16),
        ("images", 16),
        ("sampling-steps", 10),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(args, Path(temporary))


def run(args: argparse.Namespace, folder: Path) -> None:
    from train.phantom import PhantomConfig, phantom_items

    captions = sorted({item.caption for item in phantom_items(PhantomConfig())})
    side = make_pipeline(folder / "base", args, captions)
    overrides = [
        "run.name=bench", f"run.output_dir={folder}", "train.trackers=[]", "train.heldout_every=0", "model.family=latent",
        f"model.pretrained={folder / 'base'}", f"data.image_size={side}", "data.channels=3", "data.caption_key=caption",
        "data.phantom.pictures=64", "train.diffusion.prediction=epsilon", "train.diffusion.noise_schedule=scaled_linear",
        "train.diffusion.snr_gamma=null", f"train.batch_size={args.batch}", f"train.precision={args.precision}",
        f"run.cpu_threads={args.threads or 'null'}",
    ]  # fmt: skip
    tree = configuration.load({**configuration.SECTIONS, **EVAL_SECTIONS}, None, overrides)
    config = configuration.objects(tree)
    accelerator = cli.start(config)
    directory = RunDirectory(config.run)
    directory.open(tree, "bench")
    dataset = prepare(config.data, directory.prepared, accelerator)
    select_records(config, dataset, [], accelerator)
    trainer, device, precision = (
        build_trainer(config, dataset, directory, accelerator, [], []),
        accelerator.device,
        config.train.precision,
    )
    rows = dataset.rows("train")
    images = torch.from_numpy(dataset.images[rows]).float() / 127.5 - 1
    example = Example(
        folder / "base", images, [dataset.records[row].caption for row in rows], args.batch, precision, device
    )

    def ours() -> None:
        for _ in range(args.steps):
            trainer.step()
            trainer.state.step += 1

    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {precision}, {args.layout} {args.size}"
    )
    sides = {"deffuse": ours, "diffusers": lambda: example(args.steps)}
    compare("fine-tuning", sides, args.steps * args.batch, args.rounds, device, 1.2)
    generation(args, folder / "base", side, captions, precision, device)


def generation(args: argparse.Namespace, folder: Path, side: int, captions: list[str], precision: str, device) -> None:
    """Images of a few prompts each: the pipeline is called prompt by prompt, as its user would."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = SamplerConfig(steps=args.sampling_steps, batch_size=args.images, guidance_scale=GUIDANCE)
    model = load_model(folder, device, precision)
    plain = TextSampler(model, settings, precision, 0, side, 3)
    compiled = TextSampler(model, settings, precision, 0, side, 3, compiles=True)  # generate.compile
    for prompts, kind in ((1, plain), (4, plain), (1, compiled), (4, compiled)):
        each = args.images // prompts

        def theirs(prompts: int = prompts, each: int = each) -> None:
            for prompt in captions[:prompts]:
                generators = [torch.Generator(device).manual_seed(i) for i in range(each)]
                with torch.no_grad(), autocast(device, precision):
                    np.asarray(pipeline(
                        prompt, num_images_per_prompt=each, generator=generators, guidance_scale=GUIDANCE,
                        num_inference_steps=args.sampling_steps, output_type="np",
                    ).images)  # fmt: skip

        def ours(prompts: int = prompts, each: int = each, sampler: TextSampler = kind) -> None:
            sampler(list(range(each)) * prompts, [prompt for prompt in captions[:prompts] for _ in range(each)])

        compare(
            f"generation{', ours compiled' if kind is compiled else ''}, {prompts} prompts x {each}",
            {"deffuse": ours, "diffusers": theirs},
            args.images,
            args.rounds,
            device,
            1.5,
        )


if __name__ == "__main__":
    main()
