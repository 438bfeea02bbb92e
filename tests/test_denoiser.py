"""White-box access to released models: against diffusers' own schedulers, and against the parts of a pipeline called by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from defenses.errors import UserError
from eval.denoiser import load, of_network
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from train.files import write_json
from train.gan import PIPELINE as GAN_PIPELINE

CPU = torch.device("cpu")


def unet(channels=1, side=8, classes=None):
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=classes,
    ).eval()  # fmt: skip


def pictures(count=3, channels=1, side=8):
    return np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def schedule(prediction="epsilon", name="linear"):
    return DDPMScheduler(beta_schedule=name, prediction_type=prediction, clip_sample=False)


def pixel_denoiser(prediction="epsilon", name="linear"):
    return of_network(unet(), dict(schedule(prediction, name).config), (1, 8, 8), CPU)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_noised_is_that_of_the_scheduler(name):
    denoiser = pixel_denoiser(name=name)
    x, noise, timesteps = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    expected = schedule(name=name).add_noise(x, noise, timesteps)
    assert torch.allclose(denoiser.noised(x, noise, timesteps), expected, atol=1e-6)
    assert denoiser.timesteps == 1000 and [denoiser.timestep(place) for place in (0, 0.1, 0.9999)] == [0, 100, 999]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_those_of_the_scheduler(prediction):
    """One of 20 DDIM steps of diffusers goes from t = 100 to t = 50."""
    denoiser = pixel_denoiser(prediction)
    scheduler = DDIMScheduler.from_config(denoiser_config(prediction))
    scheduler.set_timesteps(20)
    x, timesteps = torch.randn(3, 1, 8, 8), torch.full((3,), 100)
    output = denoiser.predict(x, timesteps, {})
    theirs = scheduler.step(output, 100, x)
    epsilon = denoiser.epsilon(x, timesteps, {})
    clean = denoiser.clean(x, epsilon, timesteps)
    assert torch.allclose(clean, theirs.pred_original_sample, atol=1e-5)
    assert torch.allclose(denoiser.noised(clean, epsilon, torch.full((3,), 50)), theirs.prev_sample, atol=1e-5)


def denoiser_config(prediction):
    return dict(schedule(prediction).config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_predicts_the_noise(prediction):
    denoiser = pixel_denoiser(prediction)
    x, noise, timesteps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([100, 700])
    truth = {
        "epsilon": noise,
        "v_prediction": schedule(prediction).get_velocity(x, noise, timesteps),
        "sample": x,
    }[prediction]
    denoiser.predict = lambda *_: truth
    assert torch.allclose(denoiser.epsilon(denoiser.noised(x, noise, timesteps), timesteps, {}), noise, atol=1e-5)


def test_pixels_are_scaled_resized_and_converted():
    grey, rgb = pictures(), pictures(channels=3)
    assert torch.allclose(pixel_denoiser().encode(grey), torch.from_numpy(grey) / 127.5 - 1, atol=1e-6)
    luma = (torch.from_numpy(rgb) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    of_rgb = of_network(unet(), denoiser_config("epsilon"), (3, 8, 8), CPU)
    assert torch.allclose(of_rgb.encode(rgb), luma / 127.5 - 1, atol=1e-5)
    assert of_rgb.decode(of_rgb.encode(rgb)).shape == (3, 3, 8, 8)
    larger = of_network(unet(channels=3, side=16), denoiser_config("epsilon"), (1, 8, 8), CPU)
    assert larger.encode(grey).shape == (3, 3, 16, 16)
    back = larger.decode(larger.encode(np.full((1, 1, 8, 8), 51, np.uint8)))
    assert torch.allclose(back, torch.full((1, 1, 8, 8), 0.2), atol=1e-5)


def test_a_saved_pixel_model_predicts_as_before(tmp_path):
    network = unet(classes=3)
    DDIMPipeline(network, schedule("v_prediction")).save_pretrained(tmp_path)
    write_json(tmp_path / "deffuse.json", {"classes": ["a", "b", "c"]})
    denoiser = load(tmp_path, (1, 8, 8), CPU)
    assert (denoiser.kind, denoiser.prediction, denoiser.latent) == ("class", "v_prediction", False)
    assert denoiser.classes == ["a", "b", "c"]
    x, timesteps = torch.randn(3, 1, 8, 8), torch.tensor([10, 400, 999])
    expected = network(x, timesteps, class_labels=torch.tensor([2, 0, 1])).sample
    assert torch.allclose(denoiser.predict(x, timesteps, denoiser.condition([2, 0, 1])), expected, atol=1e-6)
    assert not torch.allclose(denoiser.predict(x, timesteps, denoiser.condition([0, 0, 1])), expected, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in denoiser.network.parameters())
    assert not denoiser.network.training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_is_its_parts_called_by_hand(tmp_path, prediction):
    pipeline = stable_diffusion(tmp_path, prediction)
    denoiser = load(tmp_path, (3, 16, 16), CPU)
    assert (denoiser.kind, denoiser.prediction, denoiser.latent) == ("caption", prediction, True)
    rgb, captions, timesteps = pictures(2, 3, 16), ["a chest x ray", ""], torch.tensor([100, 600])
    with torch.no_grad():
        tokens = pipeline.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
        text = pipeline.text_encoder(tokens.input_ids)[0]
        latents = pipeline.vae.encode(torch.from_numpy(rgb) / 127.5 - 1).latent_dist.mean * 0.3
        noisy = pipeline.scheduler.add_noise(latents, torch.ones_like(latents), timesteps)
        expected = pipeline.unet(noisy, timesteps, encoder_hidden_states=text).sample
        decoded = (pipeline.vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)
        x, condition = denoiser.encode(rgb), denoiser.condition(captions)
        assert torch.allclose(x, latents, atol=1e-5)
        found = denoiser.predict(denoiser.noised(x, torch.ones_like(x), timesteps), timesteps, condition)
    assert torch.allclose(condition["encoder_hidden_states"], text, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(denoiser.decode(x), decoded, atol=1e-4)
    assert torch.allclose(denoiser.alphas_cumprod, pipeline.scheduler.alphas_cumprod, atol=1e-6)


def test_stable_diffusion_xl_is_its_parts_called_by_hand(tmp_path):
    pipeline = stable_diffusion_xl(tmp_path)
    denoiser = load(tmp_path, (1, 16, 16), CPU)
    captions, timesteps = ["left lung clear", "right lung"], torch.tensor([50, 900])
    with torch.no_grad():
        tokens = pipeline.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt").input_ids
        first = pipeline.text_encoder(tokens, output_hidden_states=True)
        second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
        x = torch.randn(2, 4, 8, 8)
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
        expected = pipeline.unet(x, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample
        found = denoiser.predict(x, timesteps, denoiser.condition(captions))
    assert torch.allclose(found, expected, atol=1e-4)
    assert denoiser.encode(pictures(2, 1, 16)).shape == (2, 4, 8, 8)  # grey data, a model of colour
    assert denoiser.decode(x).shape == (2, 1, 16, 16)


def test_half_precision_weights_are_computed_in_float32(tmp_path):
    stable_diffusion(tmp_path / "a").to(torch.float16).save_pretrained(tmp_path / "half")
    denoiser = load(tmp_path / "half", (3, 16, 16), CPU)
    assert {parameter.dtype for parameter in denoiser.network.parameters()} == {torch.float32}
    assert denoiser.condition(["a"])["encoder_hidden_states"].dtype == torch.float32


def refused(folder):
    with pytest.raises(UserError) as error:
        load(folder, (1, 8, 8), CPU)
    assert error.value.key == "pipeline" and "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_pipeline_is_refused_in_one_line(tmp_path):
    assert "model_index.json" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    refused(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": GAN_PIPELINE}))
    assert "GAN" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    assert "NoSuchPipeline" in refused(tmp_path)


def test_parts_that_are_missing_or_pickled_are_refused_in_one_line(tmp_path):
    network = unet()
    DDIMPipeline(network, schedule()).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "unet")
    assert "from_pretrained" in refused(tmp_path / "without")
    shutil.copytree(tmp_path / "whole", tmp_path / "pickled")
    (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin")
    assert "from_pretrained" in refused(tmp_path / "pickled")
    load(tmp_path / "whole", (1, 8, 8), CPU)


def test_other_kinds_of_models_are_refused_and_told_how_to_go_on(tmp_path):
    DDIMPipeline(unet(), schedule()).save_pretrained(tmp_path / "flow")
    index = json.loads((tmp_path / "flow" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index["_class_name"] = "DDPMPipeline"
    write_json(tmp_path / "flow" / "model_index.json", index)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    assert "betas" in refused(tmp_path / "flow") and "attack.membership=null" in refused(tmp_path / "flow")
    stable_diffusion(tmp_path / "inpainting", channels=9)
    assert "more than the latents" in refused(tmp_path / "inpainting")


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_x_0_is_predicted_where_no_signal_is_left(prediction):
    """At a zero-terminal signal-to-noise ratio x_0 from the predicted noise would be 0 / 0; a perfect network still tells it."""
    denoiser = pixel_denoiser(prediction)
    denoiser.alphas_cumprod[-1] = 0.0
    x, noise, last = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.full((2,), 999)
    denoiser.predict = lambda noisy, timesteps, condition: -x if prediction == "v_prediction" else x
    assert torch.allclose(denoiser.predict_clean(denoiser.noised(x, noise, last), last, {}), x, atol=1e-6)
    assert torch.equal(denoiser.noised(x, noise, last), noise)
