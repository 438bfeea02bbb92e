"""The two kinds of text-to-image networks: U-Nets on a schedule of betas (Stable Diffusion 1.x, 2.x, XL) and flow-matching transformers
(Stable Diffusion 3).

What differs between them beside the forward process (`train.diffusion.process`) and the files (`train.pipelinefolder`) is here; everything
else asks a `Kind`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from defenses.errors import UserError
from train import flow
from train.conditioner import T5_LENGTH, Condition, Conditioner, JointConditioner
from train.diffusion import Schedule
from train.pipelines import Parts
from train.sampling import SamplerConfig


class Kind(Protocol):
    """How a network is told of text and time, and how it is sampled.

    Attributes:
        parts: of the pipeline; their network may have adapters.
        takes_sizes: whether it is told the picture's size and crop (XL).
        begins_with_signal: whether its output at the first step of sampling tells something of the prompt as noise: at the first step of
            a flow the predicted noise is x itself.
        preview: settings of the sampler that draws previews, as they are told beside them.
    """

    parts: Parts
    takes_sizes: bool
    begins_with_signal: bool
    preview: dict[str, str]

    def conditioner(self) -> Conditioner:
        """Captions to conditions, as the pipeline itself makes them."""
        ...

    def text_shape(self) -> tuple[int, int]:
        """(tokens, width) of a caption's embedding."""
        ...

    def sides(self) -> tuple[int, int | None]:
        """What the latents' side must be a multiple of, and its largest value."""
        ...

    def times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is told for timesteps of training, int64 [B]."""
        ...

    def predict(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        condition: Condition,
        time_ids: torch.Tensor | None = None,
        network: Callable | None = None,
    ) -> torch.Tensor:
        """One forward pass of the network, [B, c, h, w].

        Args:
            times: [B], of `times` or of a sampler.
            time_ids: sizes and crop, float32 [B, 6]; not used where it takes none.
            network: what is called in place of the pipeline's own network, e.g. its compiled form.
        """
        ...

    def epsilon(self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predicted noise in ``latents``, from the network's ``output`` at timesteps of training."""
        ...

    def sampler(self, config: SamplerConfig) -> Any:
        """diffusers' scheduler with the pipeline's own noise schedule, whose start is standard normal noise; latents are not clipped.

        Raises:
            UserError: a sampler of the other kind.
        """
        ...

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuses to go on training with another forward process or prediction than the pipeline's.

        Raises:
            UserError: with all settings that would fit; or no settings would.
        """
        ...


class UNet:
    """`Kind` of Stable Diffusion 1.x, 2.x and XL."""

    begins_with_signal = True
    preview = {"sampler": "ddim", "timestep_spacing": "trailing"}

    def __init__(self, parts: Parts):
        self.parts, self.takes_sizes = parts, parts.kind == "sdxl"

    def conditioner(self) -> Conditioner:
        zeros = self.takes_sizes and self.parts.force_zeros_for_empty_prompt
        return Conditioner(self.parts.tokenizers, self.parts.text_encoders, zeros)

    def text_shape(self) -> tuple[int, int]:
        return self.parts.tokenizers[0].model_max_length, self.parts.network.config.cross_attention_dim

    def sides(self) -> tuple[int, int | None]:
        return 2 ** (len(self.parts.network.config.block_out_channels) - 1), None

    def times(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps

    def predict(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        condition: Condition,
        time_ids: torch.Tensor | None = None,
        network: Callable | None = None,
    ) -> torch.Tensor:
        more = {}
        if condition.pooled is not None:
            more = {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": time_ids}}
        text = condition.text
        network = network or self.parts.network
        return network(latents, times, encoder_hidden_states=text, return_dict=False, **more)[0]

    def epsilon(self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        scheduler = self.parts.scheduler
        if scheduler.config.prediction_type == "epsilon":
            return output
        signal = scheduler.alphas_cumprod.to(latents.device)[timesteps][:, None, None, None]
        return signal.sqrt() * output + (1 - signal).sqrt() * latents

    def sampler(self, config: SamplerConfig) -> Any:
        schedule = self.parts.scheduler.config
        if config.sampler == "ddim":
            return DDIMScheduler.from_config(schedule, timestep_spacing="trailing", clip_sample=False)
        if config.sampler == "euler":
            raise UserError("generate.sampler", f"euler is for flows, not {self.parts.source}", "ddim or dpm-solver++")
        return DPMSolverMultistepScheduler.from_config(schedule, timestep_spacing="trailing", solver_order=2)

    def check_schedule(self, schedule: Schedule) -> None:
        source, theirs, ours = self.parts.source, self.parts.scheduler.config, schedule.config
        for name in ("trained_betas", "rescale_betas_zero_snr"):
            if theirs.get(name) not in (None, False):
                raise UserError(
                    "model.pretrained",
                    f"the scheduler of {source} has {name}, a noise schedule that is not trained with here",
                    "give a pipeline with a schedule of betas alone",
                )
        keys = {
            "prediction_type": "prediction",
            "beta_schedule": "noise_schedule",
            "num_train_timesteps": "timesteps",
            "beta_start": "beta_start",
            "beta_end": "beta_end",
        }
        betas = theirs.get("beta_schedule") != "squaredcos_cap_v2"  # which has no first and last variance
        _refuse_other(
            source,
            {
                key: theirs.get(name)
                for name, key in keys.items()
                if theirs.get(name) != ours.get(name) and (betas or not name.endswith(("start", "end")))
            },
        )


class FlowTransformer:
    """`Kind` of Stable Diffusion 3 (Esser et al. 2024)."""

    takes_sizes = begins_with_signal = False
    preview = {"sampler": "euler"}

    def __init__(self, parts: Parts):
        self.parts = parts
        settings = parts.scheduler.config
        self.levels = flow.levels(settings.num_train_timesteps, settings.shift)

    def conditioner(self) -> Conditioner:
        return JointConditioner(self.parts.tokenizers, self.parts.text_encoders, self.text_shape()[1])

    def text_shape(self) -> tuple[int, int]:
        return self.parts.tokenizers[0].model_max_length + T5_LENGTH, self.parts.network.config.joint_attention_dim

    def sides(self) -> tuple[int, int | None]:
        patch = self.parts.network.config.patch_size
        return patch, patch * self.parts.network.config.pos_embed_max_size

    def times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise level in units of 1 / T, float32 [B], as diffusers' scheduler names it."""
        return self.levels.to(timesteps.device)[timesteps] * len(self.levels)

    def predict(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        condition: Condition,
        time_ids: torch.Tensor | None = None,
        network: Callable | None = None,
    ) -> torch.Tensor:
        told = {"encoder_hidden_states": condition.text, "pooled_projections": condition.pooled, "timestep": times}
        return (network or self.parts.network)(latents, return_dict=False, **told)[0]

    def epsilon(self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents + (1 - self.levels.to(latents.device)[timesteps][:, None, None, None]) * output

    def sampler(self, config: SamplerConfig) -> Any:
        if config.sampler != "euler":
            problem = f"{config.sampler} is for schedules of betas, and {self.parts.source} is a flow"
            raise UserError("generate.sampler", problem, "set it to euler")
        return FlowMatchEulerDiscreteScheduler.from_config(self.parts.scheduler.config)

    def check_schedule(self, schedule: Schedule) -> None:
        theirs = self.parts.scheduler.config
        wrong: dict[str, Any] = {}
        if not isinstance(schedule, FlowMatchEulerDiscreteScheduler):
            wrong = {"prediction": "flow", "noise_schedule": "null", "snr_gamma": "null"}
        for name, key in (("num_train_timesteps", "timesteps"), ("shift", "flow.shift")):
            if theirs.get(name) != schedule.config.get(name):
                wrong[key] = theirs.get(name)
        _refuse_other(self.parts.source, wrong)


def of(parts: Parts) -> Kind:
    """The kind of a pipeline."""
    return FlowTransformer(parts) if parts.kind == "sd3" else UNet(parts)


def _refuse_other(source: str, wrong: dict[str, Any]) -> None:
    if wrong:
        fitting = " ".join(f"train.diffusion.{key}={value}" for key, value in wrong.items())
        raise UserError(f"train.diffusion.{next(iter(wrong))}", f"differs from that of {source}", f"set {fitting}")
