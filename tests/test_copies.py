"""The fixed rule for copies on edited phantoms and on real pictures with known copies."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from defenses.copies import CopyRule, copy_groups, find_copies, residual
from train.phantom import PhantomConfig, phantom_items


@pytest.fixture(scope="module")
def films():
    items = phantom_items(PhantomConfig(pictures=40, copied=0, outliers=0, heldout=0, calibration=0))
    return np.stack([item.draw(64, 1) for item in items])


def hashes(images):
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def levels(change):
    return lambda picture: np.clip(np.rint(change(picture.astype(float))), 0, 255).astype(np.uint8)


def jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture[0]).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))[None]


def half(picture):
    image = Image.fromarray(picture[0])
    small = image.resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))[None]


EDITS = {
    "jpeg 50": jpeg,
    "half size and back": half,
    "brighter": levels(lambda p: p * 1.2),
    "darker": levels(lambda p: p - 51),
    "more contrast": levels(lambda p: (p - p.mean()) * 1.2 + p.mean()),
    "less contrast": levels(lambda p: (p - p.mean()) * 0.8 + p.mean()),
    "brighter jpeg": lambda p: jpeg(levels(lambda q: q * 1.2)(p)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_pictures_are_near_copies_of_their_original_only(films, edit):
    images = np.concatenate([films, np.stack([EDITS[edit](film) for film in films])])
    copies = copy_groups(images, hashes(images))
    assert [(copy.kept, copy.row) for copy in copies] == [(row, 40 + row) for row in range(40)]
    assert all(copy.kind == "near" and 0 < copy.distance <= 0.12 for copy in copies)
    assert find_copies(images, hashes(images)).tolist() == [*range(40), *range(40)]


def test_exact_copies_follow_the_hash_not_the_resized_pixels(films):
    images = films[[0, 1, 0, 2, 1, 0]]
    copies = copy_groups(images, ["a", "b", "a", "c", "b", "a"], CopyRule(near=False))
    assert [(copy.kept, copy.row, copy.kind, copy.distance) for copy in copies] == [
        (0, 2, "exact", 0.0),
        (1, 4, "exact", 0.0),
        (0, 5, "exact", 0.0),
    ]
    assert find_copies(images, ["a", "b", "a", "c", "b", "a"], CopyRule(near=False)).tolist() == [0, 1, 0, 2, 1, 0]
    assert find_copies(images, list("abcdef"), CopyRule(near=False)).tolist() == [0, 1, 2, 3, 4, 5]
    assert find_copies(images, list("abcdef")).tolist() == [0, 1, 0, 2, 1, 0]  # equal pixels after resizing: near


def test_mirrored_pictures_only_with_flips(films):
    images = np.concatenate([films[:10], films[:10, :, :, ::-1]])
    assert find_copies(images, hashes(images)).tolist() == list(range(20))
    assert find_copies(images, hashes(images), CopyRule(flips=True)).tolist() == [*range(10), *range(10)]


def test_a_chain_is_cut_at_the_representative(films):
    """Slow blend from one film to another: neighbours are copies, the ends are not."""
    blend = np.linspace(0, 1, 25)[:, None, None, None]
    images = np.rint((1 - blend) * films[0] + blend * films[1]).astype(np.uint8)
    copies = copy_groups(images, hashes(images))
    x = torch.from_numpy(images).float() / 255

    def between(a, b):
        ways = [residual(x[i : i + 1], x[j : j + 1], CopyRule()) for i, j in ((a, b), (b, a))]
        return min(way.item() for way in ways)

    assert all(between(row, row + 1) <= 0.12 for row in range(24))  # one connected group
    assert between(0, 24) > 0.12
    assert len(set(find_copies(images, hashes(images)))) > 2
    kept = {copy.kept for copy in copies}
    assert 0 in kept and not kept & {copy.row for copy in copies}
    for copy in copies:
        assert copy.distance == pytest.approx(between(copy.kept, copy.row))


def test_a_local_change_is_another_picture(films):
    changed = films.copy()
    changed[:, :, 20:30, 12:22] = 255  # a nodule of 10 x 10 px
    changed[:, :, 22:28, 14:20] = 0
    images = np.concatenate([films, changed])
    assert len(copy_groups(images, hashes(images))) <= 1


def test_residual_is_the_unexplained_share():
    """y = x + e with e orthogonal to x and 1: sqrt(1 - r^2) = |e| / |y|, e too slow for the 3 x 3 blur to matter."""
    angle = (torch.arange(64) + 0.5) * (2 * torch.pi / 64)
    x = (0.5 + 0.2 * torch.sin(angle)).expand(1, 1, 64, 64)
    e = 0.02 * torch.sin(angle)[:, None].expand(64, 64)
    assert residual(x, 0.7 * x + 0.1, CopyRule()).item() < 1e-4
    expected = 0.02 / (0.2**2 + 0.02**2) ** 0.5
    assert residual(x, x + e, CopyRule()).item() == pytest.approx(expected, rel=0.01)
    assert residual(x, 1 - x, CopyRule()).item() > 1  # a negative is no copy


def test_hue_matters():
    picture = np.zeros((3, 32, 32), np.uint8) + 120
    picture[0, 8:24, 8:24] = 230
    other = picture[[1, 0, 2]]
    assert find_copies(np.stack([picture, other]), ["a", "b"]).tolist() == [0, 1]


def test_blank_pictures_are_no_near_copies_and_empty_input_passes():
    blank = np.stack([np.full((1, 32, 32), value, np.uint8) for value in (0, 1, 128, 255)])
    assert find_copies(blank, ["a", "b", "c", "d"]).tolist() == [0, 1, 2, 3]
    assert find_copies(blank, ["a", "b", "a", "d"]).tolist() == [0, 1, 0, 2]
    assert find_copies(blank[:0], []).tolist() == []


def test_rows_restrict_the_search(films):
    images = films[[0, 1, 0, 1, 0]]
    copies = copy_groups(images, ["a", "b", "a", "b", "a"], rows=np.array([1, 2, 3, 4]))
    assert [(copy.kept, copy.row) for copy in copies] == [(1, 3), (2, 4)]


def read(folder, mode, size):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pixels = [Image.open(folder / line["file_name"]).convert(mode) for line in lines]
    arrays = [np.asarray(image) for image in pixels]
    small = [np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) for image in pixels]
    images = np.stack(small)[:, None] if mode == "L" else np.stack(small).transpose(0, 3, 1, 2)
    return [line["file_name"] for line in lines], images, hashes(arrays)


@pytest.mark.parametrize("name", ["cxr_hannover", "cxr_nih1000"])
def test_no_false_alarm_on_real_films(shared, name):
    """Neither data set holds a copy; their near pairs by thumbnail are flat films of one patient or of two."""
    _, images, digests = read(shared / name, "L", 64)
    assert copy_groups(images, digests) == []


def test_the_exact_copies_among_the_emoji_are_found(shared):
    names, images, digests = read(shared / "emoji", "RGB", 32)
    truth = json.loads((shared / "emoji" / "duplicates.json").read_text())
    exact = find_copies(images, digests, CopyRule(near=False))
    clusters = {}
    for name, cluster in zip(names, exact, strict=True):
        clusters.setdefault(cluster, []).append(name)
    found = sorted(sorted(members) for members in clusters.values() if len(members) > 1)
    assert found == sorted(sorted(members) for members in truth["exact_clusters"])
