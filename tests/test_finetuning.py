"""FineXtract: the extrapolated prediction in closed form, planted clusters, planted memory of fine-tuning pictures, refusals."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from defenses.errors import UserError
from defenses.seeding import derive, generator
from eval import extrapolation, finetuning
from eval.clusters import disjoint_cliques, find_clusters, medoid, thresholds
from eval.denoiser import load
from eval.extrapolation import Guidance, Pair, load_base, pair_of, sample
from eval.finetuning import FinetuningConfig, run
from eval.finetuningfigures import Chance, Near, versus
from eval.suite import Scene
from eval.target import Target
from tests import ideal
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from tests.reference import brute_force, fabricated
from tests.test_denoiser import schedule, unet
from tests.test_inpainting import dataset, finished_run
from train.runlog import RunConfig, RunDirectory

CPU, SHAPE = torch.device("cpu"), (1, 2, 2)


def pair(tuned, base, latent=True) -> Pair:
    return Pair(ideal.denoiser(tuned, latent), ideal.denoiser(base, latent), SHAPE)


def start(index: int, seed: int = 7, condition=None, shape=SHAPE) -> np.ndarray:
    """The start noise of an image as the documentation defines it."""
    stream = generator(seed, "attack/finetuning", derive(0, str(condition)), index)
    return torch.randn(shape, generator=stream).double().numpy()


MEANS = np.array([[0.1, -0.3, 0.2, 0.0], [0.4, 0.1, 0.3, -0.5]])  # of base and fine-tuned model


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0, 5.0])
def test_two_gaussians_give_the_gaussian_beyond(weight):
    """Both of variance 0.09: the extrapolated score is that of N(m_0 + w (m_1 - m_0), 0.09), whose probability flow is known in
    closed form; 1,000 steps follow it."""
    covariance = 0.09 * np.eye(4)
    models = pair(ideal.gaussian(MEANS[1], covariance), ideal.gaussian(MEANS[0], covariance))
    found = sample(models, Guidance(weight), [None] * 3, [0, 1, 5], steps=1000, seed=7)
    mean = MEANS[0] + weight * (MEANS[1] - MEANS[0])
    last = float(ideal.alphas_cumprod()[-1])
    for image, index in zip(found, (0, 1, 5), strict=True):
        noise = start(index).reshape(-1)
        expected = mean + 0.3 * (noise - last**0.5 * mean) / (0.09 * last + 1 - last) ** 0.5
        assert image.flatten().numpy() == pytest.approx(expected, abs=0.01)


def test_two_points_give_the_point_beyond():
    """Models of one picture each: every step predicts m_0 + w (m_1 - m_0), and the last step is that."""
    nothing = 1e-12 * np.eye(4)
    models = pair(ideal.gaussian(MEANS[1], nothing), ideal.gaussian(MEANS[0], nothing))
    for weight in (1.0, 3.0):
        image = sample(models, Guidance(weight), [None], [0], steps=4, seed=7)
        expected = MEANS[0] + weight * (MEANS[1] - MEANS[0])
        assert image.flatten().numpy() == pytest.approx(expected, abs=1e-4)
    clipped = sample(replace_latent(models, False), Guidance(3.0), [None], [0], steps=4, seed=7)
    assert clipped.flatten().numpy() == pytest.approx(np.clip(MEANS[0] + 3 * (MEANS[1] - MEANS[0]), -1, 1), abs=1e-4)


def replace_latent(models: Pair, latent: bool) -> Pair:
    return Pair(replace(models.tuned, latent=latent), replace(models.base, latent=latent), models.shape)


@pytest.mark.parametrize(("weight", "correction"), [(3.0, 0.0), (2.0, -0.3), (4.5, 0.2)])
def test_a_linear_prediction_follows_the_formula(weight, correction):
    """eps = eps_base + w (eps_tuned - eps_base) + k eps_base, in DDIM steps written down in float64."""
    variances, signal = (0.25, 0.04), ideal.alphas_cumprod().double().numpy()
    models = pair(*(ideal.gaussian(MEANS[k], variances[k] * np.eye(4)) for k in (1, 0)))
    found = sample(models, Guidance(weight, correction), [None], [3], steps=5, seed=7)

    def epsilon(x, a, model):
        """-sqrt(1 - a) times the score of N(sqrt(a) m, a v + 1 - a)."""
        return (1 - a) ** 0.5 * (x - a**0.5 * MEANS[model]) / (a * variances[model] + 1 - a)

    x = start(3).reshape(-1)
    for timestep in (999, 799, 599, 399, 199):
        now, after = signal[timestep], 1.0 if timestep == 199 else signal[timestep - 200]
        base, tuned = epsilon(x, now, 0), epsilon(x, now, 1)
        noise = base + weight * (tuned - base) + correction * base
        x = after**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - after) ** 0.5 * noise
    assert found.flatten().numpy() == pytest.approx(x, rel=1e-3, abs=1e-3)


def test_the_correction_is_no_part_of_the_model_alone():
    models = pair(*(ideal.gaussian(mean, 0.1 * np.eye(4)) for mean in MEANS[::-1]))
    alone, corrected = (sample(models, Guidance(1.0, k), [None], [0], steps=5, seed=7) for k in (0.0, -0.5))
    assert torch.equal(alone, corrected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_model_alone_is_sampled_as_diffusers_does(prediction, tmp_path):
    """Deterministic DDIM with clipped x_0, timesteps from the last on."""
    DDIMPipeline(unet(), schedule(prediction)).save_pretrained(tmp_path / "tuned")
    DDIMPipeline(unet(), schedule(prediction)).save_pretrained(tmp_path / "base")
    tuned = load(tmp_path / "tuned", (1, 8, 8), CPU)
    models = load_base(tuned, tmp_path / "tuned", tmp_path / "base", (1, 8, 8))
    found = sample(models, Guidance(1.0), [None] * 2, [0, 4], steps=20, seed=7)
    config = schedule(prediction).config
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(20)
    x = torch.from_numpy(np.stack([start(index, shape=(1, 8, 8)) for index in (0, 4)])).float()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = tuned.network(x, timestep).sample
            x = scheduler.step(output, timestep, x, use_clipped_model_output=True).prev_sample
    assert torch.allclose(found, x, atol=1e-4) and not torch.allclose(found, torch.zeros(()), atol=0.1)


def two_pipelines(folder, make=stable_diffusion, **options):
    """Base, and the same with another network: (base pipeline, fine-tuned pipeline), saved as base/ and tuned/."""
    base = make(folder / "base", **options)
    base.save_pretrained(folder / "tuned", safe_serialization=True)
    tuned = make(folder / "other", **options)
    tuned.unet.save_pretrained(folder / "tuned" / "unet", safe_serialization=True)
    return base, tuned


def predicted(pipeline, text_of, x, t, caption):
    """Noise predicted by a Stable Diffusion pipeline, its parts called by hand."""
    tokens = text_of.tokenizer([caption], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        return pipeline.unet(x, t, encoder_hidden_states=text_of.text_encoder(tokens.input_ids)[0]).sample


def test_captions_follow_the_formulas_of_the_paper(tmp_path):
    """One step of DDIM is the prediction of x_0 itself."""
    base, tuned = two_pipelines(tmp_path)
    models = load_base(load(tmp_path / "tuned", (3, 16, 16), CPU), tmp_path / "tuned", tmp_path / "base", (3, 16, 16))
    caption, t = "a chest x ray", torch.tensor([999])
    x = torch.from_numpy(start(2, condition=caption, shape=(4, 8, 8)))[None].float()
    a = float(base.scheduler.alphas_cumprod[999])
    ours, null = (predicted(tuned, base, x, t, text) for text in (caption, ""))
    theirs, empty = (predicted(base, base, x, t, text) for text in (caption, ""))
    cases = {
        Guidance(3.0): empty + 3 * (ours - empty),
        Guidance(3.0, base_caption="same"): theirs + 3 * (ours - theirs),
        Guidance(3.5, -0.02): empty + 3.5 * (ours - empty) - 0.02 * empty,
        Guidance(1.0): ours,
        Guidance(1.0, scale=3.0): null + 3 * (ours - null),
        Guidance(3.0, scale=3.0): empty + 3 * (ours - empty),  # its guidance is for the model alone
    }
    for guidance, noise in cases.items():
        found = sample(models, guidance, [caption], [2], steps=1, seed=7)[0]
        expected = (x - (1 - a) ** 0.5 * noise)[0] / a**0.5
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), guidance


def test_start_noise_is_shared_by_the_weights_and_not_by_the_captions():
    models = pair(*(ideal.gaussian(mean, 0.1 * np.eye(4)) for mean in MEANS[::-1]))
    many = sample(models, Guidance(3.0), [None] * 3, [0, 1, 2], steps=3, seed=7)
    assert torch.allclose(sample(models, Guidance(3.0), [None], [1], steps=3, seed=7)[0], many[1], atol=1e-6)
    same = replace(models, base=models.tuned)  # nothing is extrapolated: the weight can only matter through the noise
    one, three = (sample(same, Guidance(weight), [None], [0], steps=3, seed=7) for weight in (1.0, 3.0))
    assert torch.allclose(one, three, atol=1e-5)
    told = sample(same, Guidance(1.0), ["a", "b"], [0, 0], steps=3, seed=7)
    assert not torch.allclose(told[0], told[1], atol=0.01)


def planted(groups=(6, 5, 4), scattered=7, seed=0) -> np.ndarray:
    """Distances of points in 8 dimensions: tight groups (about 0.003 apart) in a cloud about 0.6 apart."""
    random = np.random.default_rng(seed)
    centres = random.normal(scale=0.15, size=(len(groups), 8))
    points = [centre + random.normal(scale=0.0008, size=(n, 8)) for centre, n in zip(centres, groups, strict=True)]
    points.append(random.normal(scale=0.15, size=(scattered, 8)))
    points = np.concatenate(points)
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_planted_groups_are_the_clusters():
    """From a threshold that joins everything, and from one of tiled l2, where scattered points are alone."""
    groups = [list(range(6)), list(range(6, 11)), list(range(11, 15))]
    found = find_clusters(planted(scattered=0), 3, 2, 1.0, 10)
    assert found.reached and found.exact and found.cliques == groups
    mixed = find_clusters(planted(), 3, 2, 0.15, 10)
    assert mixed.reached and mixed.threshold == 0.15 and mixed.cliques == groups
    shuffle = np.random.default_rng(3).permutation(15)
    moved = find_clusters(planted(scattered=0)[np.ix_(shuffle, shuffle)], 3, 2, 1.0, 10)
    assert sorted(sorted(shuffle[nodes].tolist()) for nodes in moved.cliques) == groups
    greedy = find_clusters(planted(scattered=0), 3, 2, 1.0, 0)
    assert greedy.cliques == groups and not greedy.exact


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_the_loosest_threshold_that_leaves_enough(seed):
    """Taken from networkx: each clique is a largest one of what the earlier ones left, no looser threshold leaves as many."""
    distance, wanted = planted((4, 3, 3, 2), 12, seed), 5
    found = find_clusters(distance, wanted, 2, 0.8, 20)
    assert found.reached and found.exact and len(found.cliques) >= wanted
    graph = nx.from_numpy_array((distance <= found.threshold) & ~np.eye(len(distance), dtype=bool))
    for nodes in found.cliques:
        assert all(graph.has_edge(i, j) for i, j in itertools.combinations(nodes, 2))
        assert len(nodes) == max(len(clique) for clique in nx.find_cliques(graph)) >= 2
        graph.remove_nodes_from(nodes)
    assert graph.number_of_edges() == 0  # nothing of two nodes is left
    levels = thresholds(0.8)
    looser = levels[: levels.index(found.threshold)]
    assert all(len(disjoint_cliques(distance <= level, 2, 10)[0]) < wanted for level in looser)
    assert levels == pytest.approx(np.linspace(0.8, 0, 81)) and thresholds(0.155)[-1] == pytest.approx(0.005)


def test_where_no_threshold_leaves_enough_it_is_the_one_that_leaves_most():
    distance = planted(scattered=0)
    found = find_clusters(distance, 8, 2, 1.0, 10)
    most = max(len(disjoint_cliques(distance <= level, 2, 10)[0]) for level in thresholds(1.0))
    assert not found.reached and len(found.cliques) == most < 8
    equal = find_clusters(np.zeros((4, 4)), 3, 2, 0.15, 10)
    assert equal.cliques == [[0, 1, 2, 3]] and equal.threshold == 0.15 and not equal.reached
    assert find_clusters(np.zeros((1, 1)), 1, 2, 0.15, 10).cliques == []


def test_a_medoid_is_nearest_to_the_others():
    points = np.array([0.0, 9.0, 1.0, 1.2, 3.0])
    distance = np.abs(points[:, None] - points[None])
    assert medoid(distance, [0, 2, 3, 4]) == 2 and medoid(distance, [1, 4]) == 1


def test_versus_baseline_counts_units_and_asks_the_heldout_pictures():
    training = fabricated.pictures(fabricated.blobs(0, 8), block=[0, 0, 1, 2, 3, 4, 5, 6])
    heldout = fabricated.pictures(fabricated.blobs(1, 7), offset=100)
    base = np.array([0.3, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2])
    other = base - np.array([0.1, -0.02, 0.1, 0.1, 0.1, 0.1, 0.1, -0.01])  # unit 0 nearer on the whole, unit 6 farther
    chance = Chance(True, 9999, 0)
    ids = [np.array([], int), np.array([1, 2, 3])]
    found = versus(Near(base, np.full(7, 0.2), ids[0]), Near(other, np.full(7, 0.2), ids[1]), training, heldout, chance)
    assert (found["nearer"], found["farther"]) == (6, 1)
    assert found["sign_p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert found["decrease"] == pytest.approx(np.mean(base - other)) and found["gain"] == pytest.approx(
        found["decrease"]
    )
    assert found["gain_p_value"] < 0.01
    assert (found["verified_only_here"], found["verified_only_baseline"]) == (3, 0)
    assert found["verified_p_value"] == pytest.approx(2 / 2**3)  # pictures 1, 2, 3 are of three units
    blurred = versus(Near(base, np.full(7, 0.2), ids[0]), Near(base - 0.05, np.full(7, 0.15), ids[0]), training, heldout, chance)  # fmt: skip
    assert blurred["nearer"] == 7 and blurred["sign_p_value"] == pytest.approx(2 / 2**7)
    assert blurred["gain"] == pytest.approx(0) and blurred["gain_p_value"] > 0.3  # nearer to any picture: no memory
    unknown = versus(Near(base, None, ids[0]), Near(other, None, ids[1]), training, None, chance)
    assert unknown["gain"] is None and unknown["gain_p_value"] is None and unknown["nearer"] == 6


MASS = 0.05  # share of the training pictures in what the fine-tuned model generates
QUICK = {"count": 160, "steps": 50, "permutations": 999, "clique_seconds": 5.0}


def memory(data) -> Pair:
    """A base that generates noise, fine-tuned so that one of 20 images is a training picture."""
    private = np.asarray(data.images[data.rows("train")])
    tuned = ideal.denoiser(ideal.partial_memoriser(private, MASS, 0.3))
    return Pair(tuned, ideal.denoiser(ideal.isotropic(0.3)), (1, 16, 16))


def scene(path, data, models, monkeypatch, exchangeable=True, **settings) -> Scene:
    output = RunDirectory(RunConfig(name="out", output_dir=str(path)))
    output.path.mkdir(parents=True, exist_ok=True)
    (path / "base").mkdir(exist_ok=True)
    (path / "base" / "model_index.json").touch()
    config = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(exchangeable=lambda: exchangeable, image_size=16, channels=1, restricted=False),
        model=SimpleNamespace(pretrained=None, revision=None),
        attack=SimpleNamespace(
            finetuning=FinetuningConfig(base=str(path / "base"), **(QUICK | settings)), copy_metrics=None
        ),
    )
    monkeypatch.setattr(finetuning, "load_base", lambda *_: models)
    target = Target(output, data, None, output.generations)
    return Scene(target, config, Accelerator(cpu=True), models.tuned, None, None)


def test_the_difference_gives_away_what_the_model_mostly_hides(tmp_path, monkeypatch):
    """The fine-tuned model draws a training picture in one of 20 cases, as it must; at w = 3 it is some three times as many."""
    data = dataset(8, 24)
    found = run(scene(tmp_path, data, memory(data), monkeypatch))
    one, three = found.report["weights"]
    assert (one["weight"], three["weight"], one["generations"]) == (1.0, 3.0, 160)
    share, best = [], []
    for weight in ("w-1", "w-3"):
        files = sorted((tmp_path / "out" / "finetuning" / weight).glob("*.png"))
        images = [np.asarray(Image.open(file))[None] for file in files]
        distance = np.array([[brute_force.l2(image, picture) for picture in data.images[:8]] for image in images])
        share.append(np.mean(distance.min(axis=1) < 0.05))
        best.append(np.minimum(distance, 0.1).min(axis=0))
    assert 0 < share[0] < MASS + 3 * (MASS * (1 - MASS) / 160) ** 0.5 and share[1] > 2 * share[0]
    assert [one["at_l2"]["0.05"], three["at_l2"]["0.05"]] == [int((each < 0.05).sum()) for each in best]
    assert three["verified"] >= 6 > one["verified"] and three["rate"] == three["verified"] / 8
    assert three["control"]["p_value"] < 0.01 and three["control"]["verified"] == 0 and three["p_value_holm"] < 0.02
    assert three["nearer_p_value"] < 0.01
    versus = three["versus_baseline"]
    assert one["versus_baseline"] is None and versus["nearer"] > versus["farther"] and versus["gain_p_value"] < 0.05
    assert versus["verified_only_here"] - versus["verified_only_baseline"] == three["verified"] - one["verified"]
    rows = found.tables["finetuning.csv"][1]
    assert len({row["record_id"] for row in rows if row["verified"] and row["weight"] == 3}) == three["verified"]
    assert all((tmp_path / "out" / "finetuning" / row["generation"]).is_file() for row in rows)
    for example in found.report["examples"]:
        assert (tmp_path / "out" / "finetuning" / example["generation"]).is_file() and example["l2"] < 0.15
    distances = found.tables["finetuning_pictures.csv"][1]
    assert len(distances) == 2 * 32 and np.mean(
        [row["l2"] for row in distances if row["member"] and row["weight"] == 3]
    ) == pytest.approx(three["mean_l2"])
    json.dumps(found.report, allow_nan=False)


def test_pictures_that_were_not_trained_on_are_not_found(tmp_path, monkeypatch):
    """The same models, asked about other pictures: chance on either side of the control."""
    models = memory(dataset(8, 24))
    found = run(scene(tmp_path, dataset(8, 24, seed=5), models, monkeypatch)).report["weights"][1]
    assert found["control"]["p_value"] > 0.05 and found["verified"] <= 1
    assert found["nearer_p_value"] > 0.01 and found["versus_baseline"]["gain_p_value"] > 0.01


def test_a_second_call_draws_nothing_and_ends_the_same(tmp_path, monkeypatch):
    data = dataset(6, 6)
    models = memory(data)
    drawn = []

    def counted(pair, guidance, conditions, indices, **options):
        drawn.append((guidance.weight, tuple(indices)))
        return sample(pair, guidance, conditions, indices, **options)

    monkeypatch.setattr(extrapolation, "sample", counted)
    small = {"count": 10, "batch_size": 4, "steps": 4}
    first = run(scene(tmp_path, data, models, monkeypatch, **small))
    blocks = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert drawn == [(weight, block) for weight in (1.0, 3.0) for block in blocks]
    assert run(scene(tmp_path, data, models, monkeypatch, **small)).report == first.report and len(drawn) == 6
    (tmp_path / "out" / "finetuning" / "w-3" / "000005.png").unlink()
    assert run(scene(tmp_path, data, models, monkeypatch, **small)).report == first.report
    assert drawn[6:] == [(3.0, (4, 5, 6, 7))]
    run(scene(tmp_path, data, models, monkeypatch, **small | {"weights": [1.0, 3.0, 5.0]}))
    assert drawn[7:] == [(5.0, block) for block in blocks]
    run(scene(tmp_path, data, models, monkeypatch, **small | {"correction": 0.1, "weights": [3.0]}))
    assert {weight for weight, _ in drawn[10:]} == {1.0, 3.0}  # other settings: nothing old is taken over
    assert [entry["weight"] for entry in first.report["weights"]] == [1.0, 3.0]


def test_without_heldout_pictures_there_is_no_control(tmp_path, monkeypatch):
    data = dataset(4, 0)
    models = memory(data)
    entry = run(scene(tmp_path, data, models, monkeypatch, count=20, steps=4)).report["weights"][1]
    assert entry["control"] is None and entry["nearer_p_value"] is None and entry["p_value_holm"] is None
    strangers = dataset(4, 4)
    again = run(scene(tmp_path, strangers, models, monkeypatch, exchangeable=False, count=20, steps=4))
    assert again.report["weights"][1]["control"]["p_value"] is None
    assert again.report["weights"][1]["versus_baseline"]["gain_p_value"] is None


@pytest.mark.parametrize(("make", "prediction"), [(stable_diffusion, "v_prediction"), (stable_diffusion_xl, None)])
def test_text_to_image_pipelines_are_attacked_by_their_captions(make, prediction, tmp_path):
    two_pipelines(tmp_path, make, **({"prediction": prediction} if prediction else {}))
    data = dataset(5, 4)
    for row, record in enumerate(data.records):
        record.caption, record.copies = ("a chest x ray", "left lung clear")[row % 2], 3 if row == 1 else 1
    data.images = np.repeat(data.images, 3, axis=1)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(exchangeable=lambda: True, image_size=16, channels=3, restricted=False),
        model=SimpleNamespace(pretrained=str(tmp_path / "base"), revision=None),
        attack=SimpleNamespace(
            finetuning=FinetuningConfig(per_prompt=3, steps=2, permutations=9, batch_size=2), copy_metrics=None
        ),
    )
    output = RunDirectory(RunConfig(name="out", output_dir=str(tmp_path)))
    output.path.mkdir()
    tuned = load(tmp_path / "tuned", (3, 16, 16), CPU)
    report = run(
        Scene(
            Target(output, data, tmp_path / "tuned", output.generations),
            config,
            Accelerator(cpu=True),
            tuned,
            None,
            None,
        )
    ).report
    assert report["prompts"] == 2 and [entry["generations"] for entry in report["weights"]] == [6, 6]
    stored = json.loads((output.path / "finetuning" / "w-3" / "settings.json").read_text())
    assert stored["prompts"] == ["left lung clear", "a chest x ray"]  # that of the most copied picture first
    for weight in ("w-1", "w-3"):
        files = sorted((output.path / "finetuning" / weight).rglob("*.png"))
        assert [str(file.relative_to(output.path / "finetuning" / weight)) for file in files] == [
            f"0000{prompt}/00000{index}.png" for prompt in (0, 1) for index in range(3)
        ]
    assert report["settings"]["space"] == "latents" and report["base"] == str(tmp_path / "base")


def refused(tmp_path, tuned="tuned", base="base", shape=(3, 16, 16)) -> str:
    with pytest.raises(UserError, match=r"attack\.finetuning\.base") as caught:
        load_base(load(tmp_path / tuned, shape, CPU), tmp_path / tuned, tmp_path / base, shape)
    return caught.value.problem


def test_models_that_do_not_fit_are_refused(tmp_path):
    base, _ = two_pipelines(tmp_path)
    assert "another autoencoder" in refused(tmp_path, base="other")
    assert "nothing was fine-tuned" in refused(tmp_path, tuned="base")
    base.vae.register_to_config(scaling_factor=0.5)
    base.save_pretrained(tmp_path / "scaled", safe_serialization=True)
    assert "scaling_factor 0.5" in refused(tmp_path, base="scaled")
    base.vae.register_to_config(scaling_factor=0.3)
    base.scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    base.save_pretrained(tmp_path / "velocity", safe_serialization=True)
    assert "predicts v_prediction, the fine-tuned model epsilon" in refused(tmp_path, base="velocity")
    base.scheduler = DDIMScheduler(beta_schedule="linear")
    base.save_pretrained(tmp_path / "linear", safe_serialization=True)
    assert "noise schedule" in refused(tmp_path, base="linear")
    DDIMPipeline(unet(3, 16), schedule()).save_pretrained(tmp_path / "pixels")
    DDIMPipeline(unet(3, 16, classes=2), schedule()).save_pretrained(tmp_path / "classes")
    DDIMPipeline(unet(3, 8), schedule()).save_pretrained(tmp_path / "small")
    assert "is conditioned on none, the fine-tuned model caption" in refused(tmp_path, base="pixels")
    assert "is conditioned on class" in refused(tmp_path, "pixels", "classes")
    assert "x_0 of (3, 8, 8)" in refused(tmp_path, "pixels", "small")
    assert "model_index.json" in refused(tmp_path, "pixels", "nowhere")


def test_an_autoencoder_stored_in_half_precision_is_the_same(tmp_path):
    base, _ = two_pipelines(tmp_path)
    base.vae.half().save_pretrained(tmp_path / "base" / "vae", safe_serialization=True)
    tuned = load(tmp_path / "tuned", (3, 16, 16), CPU)
    assert load_base(tuned, tmp_path / "tuned", tmp_path / "base", (3, 16, 16)).shape == (4, 8, 8)


def test_other_schedules_are_refused():
    pictures = ideal.memoriser(fabricated.blobs(0, 2))
    with pytest.raises(UserError, match="has timesteps 10, the fine-tuned model 1000"):
        pair_of(ideal.denoiser(pictures), ideal.denoiser(pictures, timesteps=10), (1, 16, 16))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"base": "nowhere"}, "base"),
        ({"weights": [1.0, -2.0]}, "weights"),
        ({"weights": [float("nan")]}, "weights"),
        ({"count": 9000}, "count"),
        ({"per_prompt": 100, "max_prompts": 100}, "per_prompt"),
        ({"clique_size": 0}, "clique_size"),
        ({"clusters": 0}, "clusters"),
        ({"steps": 0}, "steps"),
        ({"verify_l2": 0.0}, "verify_l2"),
        ({"edge_threshold": -0.1}, "edge_threshold"),
        ({"clique_seconds": -1.0}, "clique_seconds"),
        ({"guidance": float("inf")}, "guidance"),
    ],
)
def test_impossible_settings_are_refused(settings, key):
    with pytest.raises(UserError, match=f"attack.finetuning.{key}"):
        FinetuningConfig(**settings)


def test_the_model_alone_is_always_among_the_weights():
    assert FinetuningConfig(weights=[3.0, 5.0, 3.0]).weights == [1.0, 3.0, 5.0]


def test_what_does_not_fit_the_model_is_refused(tmp_path, monkeypatch):
    data = dataset(3, 3)
    models = memory(data)
    with pytest.raises(UserError, match=r"attack\.finetuning\.steps"):
        run(scene(tmp_path, data, models, monkeypatch, steps=2000))
    models.tuned.alphas_cumprod[-1] = 0
    with pytest.raises(UserError, match=r"attack\.finetuning\.correction"):
        run(scene(tmp_path, data, models, monkeypatch, correction=-0.02))


def test_a_base_of_the_hub_is_fetched_by_its_revision(tmp_path, monkeypatch):
    asked = []

    def download(source, **options):
        asked.append((source, options))
        if source == "owner/gone":
            raise OSError("not there\nmore")
        return tmp_path

    monkeypatch.setattr(finetuning.DiffusionPipeline, "download", download)
    model = SimpleNamespace(pretrained="owner/model", revision="v1")
    config = SimpleNamespace(model=model, attack=SimpleNamespace(finetuning=FinetuningConfig()))
    place = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True))
    assert finetuning.base_folder(place) == tmp_path
    assert asked[0] == ("owner/model", {"revision": "v1", "use_safetensors": True})
    model.pretrained = "owner/gone"
    with pytest.raises(UserError, match="owner/gone: not there"):
        finetuning.base_folder(place)


PHANTOM = [
    "data.phantom.copied=0", "data.phantom.outliers=0", "data.phantom.calibration=4", "train.learning_rate=2e-3",
    "train.checkpoint_every=0",
]  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_pictures_come_nearer_than_others_by_the_difference(tmp_path):
    """A base of 200 public pictures, fine-tuned on 12 others: trained here, attacked with what is released."""
    base, _, _ = finished_run(
        tmp_path, *PHANTOM, "run.name=base", "data.phantom.seed=5", "data.phantom.pictures=200", "data.phantom.heldout=8",
        "train.steps=300", "train.batch_size=24", "train.ema_decay=0.98",
    )  # fmt: skip
    target, config, accelerator = finished_run(
        tmp_path, *PHANTOM, "run.name=tuned", "data.phantom.pictures=12", "data.phantom.heldout=16", "train.steps=150",
        "train.batch_size=12", "train.ema_decay=0.95", f"model.pretrained={base.pipeline}",
    )  # fmt: skip
    config.attack.finetuning = FinetuningConfig(weights=[1.0, 2.0], count=64, steps=25, permutations=999)
    model = load(target.pipeline, (1, 16, 16), accelerator.device)
    report = run(Scene(target, config, accelerator, model, None, None)).report
    alone, double = report["weights"]
    print({key: double[key] for key in ("verified", "control", "mean_l2", "versus_baseline")}, alone["verified"])
    assert double["nearer_p_value"] < 0.05 and double["versus_baseline"]["gain"] > 0
    assert double["mean_l2"] < 0.8 * double["mean_l2_heldout"]
    assert double["verified"] >= max(alone["verified"], 1) and double["control"]["verified"] == 0
