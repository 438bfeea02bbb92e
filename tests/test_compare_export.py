"""What is handed over of an arm of text-to-image: lines that draw its images as the arm did."""

from types import SimpleNamespace

import pytest

from launch import export
from tests.pipelines import stable_diffusion

PERTURBATION = {"target": 0.25, "steps": 2, "learning_rate": 0.05, "batch_size": 8}


def readme(folder, names, filtered=False):
    """The text, and its Python lines, for an arm with these defenses; ``folder/model`` is its pipeline."""
    if filtered:
        (folder / "model" / "output_filter").mkdir(parents=True)
    report = {
        "model": {"family": "latent", "classes": None},
        "privacy": {"extraction": {"protocol": "prompted"}},
        "defenses": [{"name": name, "settings": PERTURBATION} for name in names],
    }
    entry = {"protects": "outputs" if filtered or names else "weights"}
    text = export._readme(SimpleNamespace(arm="a", seed=0, directory=folder), entry, report, private=False)
    return text, text.split("```python\n")[1].split("```")[0]


def test_a_perturbed_arm_is_drawn_with_its_own_settings(tmp_path, monkeypatch):
    """The lines run as they stand, in fewer steps."""
    stable_diffusion(tmp_path / "model")
    text, lines = readme(tmp_path, ["prompt_perturbation"])
    assert "protects the outputs, not the weights" in text and "output_filter" not in text
    assert "target=0.25, steps=2, learning_rate=0.05" in lines
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(lines.replace("=50", "=2"), found)
    assert len(found["images"]) == 1 and found["told"]["prompt_embeds"].shape[0] == 1


@pytest.mark.parametrize("names", [[], ["prompt_perturbation"]])
def test_images_of_prompts_are_held_against_the_filter(tmp_path, names):
    text, lines = readme(tmp_path, names, filtered=True)
    assert "`model/output_filter/` holds small training pictures" in text
    assert ("perturbed(" in lines) == bool(names) and "guard.flagged(pixels)" in lines and "guard(pipeline" not in lines
    compile(lines, "lines", "exec")


def test_an_arm_without_a_guard_is_the_plain_pipeline(tmp_path):
    text, lines = readme(tmp_path, [])
    assert 'pipeline("a prompt"' in lines and "protects the outputs" not in text
