import base64
import io

import numpy as np
from PIL import Image

from eval.evidence import Match, choose_pairs, encode, generation_files, read_image, read_metrics


def match(name, record, l2, score, verified):
    return Match(name, record, l2, score, "", verified)


def test_pairs_are_the_best_of_each_picture():
    matches = [
        match("a", "x", 0.10, 0.9, True),
        match("b", "x", 0.05, 0.4, True),
        match("c", "y", 0.02, 0.6, True),
        match("d", "z", 0.30, 1.2, False),
        match("e", "x", 0.40, 1.9, False),  # its picture is shown already
    ]
    verified, others = choose_pairs(matches, {}, {"x": 40}, most=8)
    assert [(pair.match.generation, pair.copies) for pair in verified] == [("b", 40), ("c", None)]
    assert [pair.match.generation for pair in others] == ["d"]
    assert [len(part) for part in choose_pairs(matches, {}, {}, most=1)] == [1, 1]
    assert choose_pairs(matches, {}, {}, most=0) == ([], [])


def test_prompted_pairs_are_ordered_by_distance():
    matches = [match("a", "x", 0.10, None, True), match("b", "y", 0.05, None, True)]
    assert [pair.match.generation for pair in choose_pairs(matches, {}, {}, 8)[0]] == ["b", "a"]


def test_pictures_survive_encoding_or_shrink_together():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 64, 64), dtype=np.uint8) for _ in range(10)]
    assert 30_000 < sum(map(len, encode(images, 60_000))) <= 60_000
    whole = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))) for uri in encode(images, 10**7)
    ]
    np.testing.assert_array_equal(np.stack(whole).transpose(0, 3, 1, 2), np.stack(images))
    assert encode([], 1000) == []


def test_files_are_named_as_in_the_table(tmp_path):
    (tmp_path / "00001").mkdir()
    for name in ("b.png", "a.JPG", "00001/c.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list(generation_files(tmp_path)) == ["00001/c.png", "a.JPG", "b.png"]
    assert generation_files(tmp_path / "missing") == {}


def test_images_of_others(tmp_path, shared):
    grey, colour = tmp_path / "grey.png", tmp_path / "colour.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(grey)
    Image.new("RGBA", (600, 300), (10, 20, 30, 255)).save(colour)
    np.testing.assert_array_equal(read_image(grey)[0].ravel(), np.arange(64))
    assert read_image(colour).shape == (3, 128, 256) and read_image(colour)[:, 0, 0].tolist() == [10, 20, 30]
    for path in sorted((shared / "bad_images").iterdir()):
        image = read_image(path)
        assert image is None or (image.dtype == np.uint8 and image.shape[0] in (1, 3) and max(image.shape) <= 256)


def test_a_cut_log_line_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(log) == [{"step": 1, "loss": 0.5}]
    assert read_metrics(tmp_path / "missing") == []


def test_copies_of_one_picture_are_shown_once():
    matches = [
        Match("a", "x1", 0.1, 0.8, "", True),
        Match("b", "x2", 0.05, 0.5, "", True),
        Match("c", "y", 0.1, 0.9, "", True),
    ]
    pairs, _ = choose_pairs(matches, {"x1": "7", "x2": "7", "y": "8"}, {}, most=8)
    assert [pair.match.generation for pair in pairs] == ["b", "c"]
