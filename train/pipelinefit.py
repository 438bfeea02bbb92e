"""Whether the parts of a text-to-image pipeline fit together, told from their configurations before any is loaded."""

import inspect
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, PretrainedConfig, T5Config, T5EncoderModel

from defenses.errors import UserError

KEY = "model.pretrained"
PREDICTIONS = ("epsilon", "v_prediction")
# all of a CLIP text encoder's configuration that shapes it; names of files, code and kernels to load are not taken over
TEXT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range",
    "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
T5_SETTINGS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj",
    "pad_token_id", "eos_token_id",
)  # fmt: skip
LOADERS = ("auto_map", "quantization_config")  # lead to code or to kernels of others
# of a flow's scheduler: other noise levels than those of its shift alone
FLOW_LEVELS = (
    "use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip
# what a UNet may be given beside x_t, t and text
FURTHER_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
)


def refuse(
    source: str, problem: str, remedy: str = "give a complete diffusers pipeline of Stable Diffusion 1, 2, XL or 3"
) -> UserError:
    """The error that says why ``source`` cannot be trained."""
    return UserError(KEY, f"{source}: {problem}", remedy)


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def text_config(found: dict[str, Any], cls: type) -> PretrainedConfig:
    """Configuration of a text encoder of a class from its JSON file."""
    config, names = (T5Config, T5_SETTINGS) if cls is T5EncoderModel else (CLIPTextConfig, TEXT_SETTINGS)
    return config(**{name: found[name] for name in names if name in found})


def check_fit(kind: str, classes: dict[str, str], configs: dict[str, dict[str, Any]], source: str) -> None:
    """Checks the configurations of all parts.

    Args:
        kind: ``sd``, ``sdxl`` or ``sd3``.
        classes: part -> name of its class.
        configs: part -> contents of its JSON file, for all but the tokenizers.

    Raises:
        UserError: a configuration is that of another class, or asks for code, or the parts do not fit each other.
    """
    for part, config in configs.items():
        _check_class(part, classes[part], config, source)
    try:
        if kind == "sd3":
            _check_flow(configs, source)
        else:
            _check_betas(configs["scheduler"], source)
            _check_latents("unet", UNet2DConditionModel, configs, source)
            _check_inputs(configs["unet"], source)
            _check_text(kind, configs, source)
    except UserError:
        raise
    except Exception as error:  # values of another type than diffusers' own
        raise refuse(source, f"its configuration cannot be read: {one_line(error)}") from error


def _check_class(part: str, name: str, config: dict[str, Any], source: str) -> None:
    told = config.get("architectures") if part.startswith("text_encoder") else config.get("_class_name")
    if part != "scheduler" and told not in (None, name, [name]):
        raise refuse(source, f"its {part} is {told} by its own configuration, {name} by model_index.json")
    for key in LOADERS:
        if config.get(key) is not None:
            raise refuse(source, f"the configuration of its {part} has {key}", "custom code is never run")


def _check_betas(scheduler: dict[str, Any], source: str) -> None:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise refuse(source, f"its scheduler says prediction_type {prediction}", f"known are {', '.join(PREDICTIONS)}")


def _check_latents(part: str, cls: type, configs: dict[str, dict[str, Any]], source: str) -> None:
    channels = _setting(configs["vae"], AutoencoderKL, "latent_channels")
    seen, made = (_setting(configs[part], cls, name) for name in ("in_channels", "out_channels"))
    if (seen, made) != (channels, channels):
        raise refuse(
            source,
            f"its {part} takes {seen} channels and returns {made}, the latents have {channels} (inpainting, upscaling?)",
            "give the text-to-image pipeline of that model",
        )
    size = _setting(configs[part], cls, "sample_size")
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise refuse(source, f"its {part} has sample_size {size}", "only square sizes are known")


def _check_inputs(unet: dict[str, Any], source: str) -> None:
    for name in FURTHER_INPUTS:
        value = _setting(unet, UNet2DConditionModel, name)
        if value is not None:
            raise refuse(source, f"its unet takes more than noisy latents, time and text ({name} {value})")


def _check_flow(configs: dict[str, dict[str, Any]], source: str) -> None:
    """Stable Diffusion 3: noise levels of a shift alone, text and pooled text as wide as the transformer takes them."""
    for name in FLOW_LEVELS:
        value = _setting(configs["scheduler"], FlowMatchEulerDiscreteScheduler, name)
        if value not in (None, False):
            raise refuse(source, f"its scheduler has {name} {value}", "only noise levels by a shift are known")
    _check_latents("transformer", SD3Transformer2DModel, configs, source)
    first, second = (text_config(configs[part], CLIPTextConfig) for part in ("text_encoder", "text_encoder_2"))
    asked = {
        name: _setting(configs["transformer"], SD3Transformer2DModel, name)
        for name in ("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
    }
    text, pooled = first.hidden_size + second.hidden_size, first.projection_dim + second.projection_dim
    further = configs.get("text_encoder_3", {}).get("d_model")
    width = asked["joint_attention_dim"]
    if width < text or further not in (None, width):
        found = f"{text} of CLIP and {further} of T5" if further else f"{text} of CLIP"
        raise refuse(
            source,
            f"its transformer has joint_attention_dim {width}, the text {found}",
            "its parts are of other models",
        )
    if asked["pooled_projection_dim"] != pooled:
        problem = (
            f"its transformer has pooled_projection_dim {asked['pooled_projection_dim']}, pooled text has {pooled}"
        )
        raise refuse(source, problem, "its parts are of other models")
    if not asked["pos_embed_max_size"]:
        raise refuse(source, "its transformer has no pos_embed_max_size")


def _check_text(kind: str, configs: dict[str, dict[str, Any]], source: str) -> None:
    unet = configs["unet"]
    encoders = [
        text_config(config, CLIPTextConfig) for part, config in configs.items() if part.startswith("text_encoder")
    ]
    widths = [encoder.hidden_size for encoder in encoders]
    found = _setting(unet, UNet2DConditionModel, "cross_attention_dim")
    if ({found} if isinstance(found, int) else set(found)) != {sum(widths)}:
        text = " + ".join(map(str, widths))
        raise refuse(
            source, f"its unet has cross_attention_dim {found}, the text {text}", "its parts are of other models"
        )
    added = _setting(unet, UNet2DConditionModel, "addition_embed_type")
    if added != ("text_time" if kind == "sdxl" else None):
        raise refuse(source, f"its unet has addition_embed_type {added}", "its parts are of other models")
    if kind == "sdxl":
        pooled = encoders[1].projection_dim + 6 * unet["addition_time_embed_dim"]
        if unet["projection_class_embeddings_input_dim"] != pooled:
            raise refuse(
                source,
                f"its unet has projection_class_embeddings_input_dim {unet['projection_class_embeddings_input_dim']}, "
                f"pooled text and sizes have {pooled}",
                "its parts are of other models",
            )


def _setting(config: dict[str, Any], cls: type, name: str) -> Any:
    """A value of a configuration, or the default of the class, which older files leave out."""
    return config.get(name, inspect.signature(cls.__init__).parameters[name].default)
