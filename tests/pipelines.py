"""Pipelines in diffusers' format with random weights, small enough to build in a test; no file is downloaded."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "chest", "x", "ray", "of", "patient", "left", "right", "lung", "clear")
WIDTH = 16  # of the text encoder
STEM = "diffusion_pytorch_model"  # of the files of unet and autoencoder


def tokenizer() -> CLIPTokenizer:
    """Knows WORDS; any other word is the unknown token."""
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=16)


def text_encoder(words: CLIPTokenizer, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def autoencoder(**options) -> AutoencoderKL:
    settings = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
        "scaling_factor": 0.3, "shift_factor": None,
    }  # fmt: skip
    return AutoencoderKL(**settings | options)


def network(channels: int = 4, **options) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8, "in_channels": channels, "out_channels": 4, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**settings | options)


def stable_diffusion(folder: Path, prediction: str = "epsilon", channels: int = 4) -> StableDiffusionPipeline:
    """Like Stable Diffusion 1.x (epsilon) and 2.x (v_prediction): latents of 4 x 8 x 8 of 16 px RGB pictures."""
    words = tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words, unet=network(channels),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Like Stable Diffusion XL: two text encoders, their pooled embedding and sizes as further conditions."""
    words = tokenizer()
    unet = network(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(words), text_encoder_2=text_encoder(words, projection=True),
        tokenizer=words, tokenizer_2=tokenizer(), unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"), add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


def t5_tokenizer() -> T5TokenizerFast:
    """Unigrams of WORDS; any other word is the unknown token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -2.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def stable_diffusion_3(folder: Path, t5: bool = True, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """Like Stable Diffusion 3: a transformer of the last two kinds of block, latents of 16 x 8 x 8 with a shift and without 1 x 1
    convolutions, two CLIP text encoders with pooled embeddings, and T5 or none."""
    words, further = tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    # in fresh networks the last layers hide what the text says
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    config = T5Config(
        vocab_size=len(further), d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    vae = autoencoder(
        latent_channels=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae,
        text_encoder=text_encoder(words, projection=True), tokenizer=words,
        text_encoder_2=text_encoder(words, projection=True), tokenizer_2=tokenizer(),
        text_encoder_3=T5EncoderModel(config) if t5 else None, tokenizer_3=further if t5 else None,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


def change(path: Path, **values) -> None:
    """Changes keys of a JSON file; None removes one."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(path: Path, marker: Path) -> None:
    """Writes a pickle that would create ``marker``."""
    path.write_bytes(pickle.dumps({"weight": Payload(marker)}))
