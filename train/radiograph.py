"""Draws one chest-radiograph-like phantom on analytic coordinates; `train.phantom` says which ones there are.

Body coordinates: p to the right, q downwards, the body about 2 wide and 2 high, its middle at (0, 0). Grey values are
0 (black, much exposed) to 1 (white, dense).
"""

import math
from dataclasses import dataclass

import numpy as np

from train.canvas import Canvas, Dice, edge


@dataclass(frozen=True)
class Film:
    """What one picture shows.

    Attributes:
        patient_key: seeds the anatomy, shared by all films of a patient.
        film_key: seeds position, breath, exposure and everything else that differs between films.
        finding: ``normal``, ``effusion``, ``cardiomegaly`` or ``nodule``.
        right: side of the finding, as the viewer sees it.
        device: ``""``, ``pacemaker``, ``central line``, ``ECG leads`` or ``tube``.
        outlier: kind of unusual look, or None.
    """

    patient_key: int
    film_key: int
    finding: str
    right: bool
    device: str
    outlier: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """What stays between the films of one patient; lengths in body coordinates."""

    shoulder: float
    waist: float
    lung_width: float
    lung_height: float
    lung_gap: float
    apex: float
    heart: float
    heart_tilt: float
    heart_shift: float
    rib_spacing: float
    rib_slope: float
    rib_strength: float
    breast: float
    bend: float

    @staticmethod
    def of(dice: Dice) -> "Anatomy":
        return Anatomy(
            shoulder=dice(0.72, 1.05), waist=dice(0.66, 0.98), lung_width=dice(0.27, 0.38), lung_height=dice(0.55, 0.8),
            lung_gap=dice(0.1, 0.2), apex=dice(0.0, 0.3), heart=dice(0.22, 0.34), heart_tilt=dice(-0.2, 0.8),
            heart_shift=dice(0.04, 0.2), rib_spacing=dice(0.13, 0.2), rib_slope=dice(0.1, 0.5),
            rib_strength=dice(0.06, 0.16), breast=dice(-0.12, 0.16), bend=dice(-0.07, 0.07),
        )  # fmt: skip


def draw_film(film: Film, image_size: int, channels: int) -> np.ndarray:
    """The picture, uint8 [channels, image_size, image_size]; three channels carry a slight tint.

    Args:
        image_size: side in pixels, at least 16.
        channels: 1 or 3.
    """
    body, dice = Anatomy.of(Dice(film.patient_key)), Dice(film.film_key)
    fine = 3 if image_size <= 24 else 2  # sub-pixels per side
    axis = (np.arange(image_size * fine) + 0.5) * (2 / (image_size * fine)) - 1
    x, y = np.meshgrid(axis, axis)
    canvas = _pose(film, body, dice, x, y)
    _torso(canvas, body, dice)
    lungs = _lungs(canvas, film, body, dice)
    _middle(canvas, film, body, dice)
    _bones(canvas, film, body, dice)
    _opacities(canvas, film, body, dice, lungs)
    _device(canvas, film, dice)
    if film.outlier:
        _oddity(canvas, film, dice, lungs)
    grey = _expose(canvas.v, film, dice, x, y)
    grey = sum(grey[i::fine, j::fine] for i in range(fine) for j in range(fine)) / (fine * fine)
    tint = [1.0] if channels == 1 else [dice(0.86, 1.0), dice(0.9, 1.0), dice(0.94, 1.0)]
    return np.stack([np.floor(np.clip(grey * t, 0, 1) * 255 + 0.5).astype(np.uint8) for t in tint])


def _pose(film: Film, body: Anatomy, dice: Dice, x: np.ndarray, y: np.ndarray) -> Canvas:
    """Where the body lies on the film: shift, turn, size, and a slight twist."""
    turn = dice(-0.22, 0.22)
    if film.outlier == "film on its side":
        x, y = y, -x
    wide, high = dice(0.8, 1.2), dice(0.8, 1.2)
    x, y = x - dice(-0.22, 0.22), y - dice(-0.2, 0.2)
    c, s = math.cos(turn), math.sin(turn)
    p, q = (c * x + s * y) * wide, (c * y - s * x) * high
    bend = 0.3 if film.outlier == "scoliosis" else body.bend
    p = p - bend * (1 - 4 * q * q / (1 + q * q))
    return Canvas(-p if film.outlier == "situs inversus" else p, q)


def _torso(canvas: Canvas, body: Anatomy, dice: Dice) -> None:
    """Trunk, neck, arms and soft tissue; denser towards the belly."""
    p, q = canvas.p, canvas.q
    neck = edge(q + dice(0.72, 0.86), 0.4)
    half = 0.22 + (body.shoulder - 0.22) * neck + (body.waist - body.shoulder) * edge(q - 0.1, 1.2)
    canvas.paint(edge(half - np.abs(p), 0.08), dice(0.38, 0.56) + dice(0.02, 0.16) * q)
    for side in (-1, 1):
        if dice.chance(0.7):
            spread, out = dice(0.0, 0.35), body.shoulder + dice(-0.02, 0.1)
            arm = canvas.rod(side * out, -0.55, side * (out + spread), 0.9, dice(0.1, 0.17), 0.08)
            canvas.paint(arm * (1 - edge(half - 0.06 - np.abs(p), 0.1)), dice(0.3, 0.5))
            canvas.v += dice(0.12, 0.3) * canvas.rod(side * out, -0.6, side * (out + spread), 0.9, 0.05)
    if body.breast > 0:
        for side in (-1, 1):
            canvas.v += body.breast * canvas.ellipse(side * dice(0.38, 0.5), dice(0.3, 0.48), 0.34, 0.28, soft=0.4)


def _lungs(canvas: Canvas, film: Film, body: Anatomy, dice: Dice) -> np.ndarray:
    """Both lungs above their diaphragm domes; returns their mask."""
    p, q = canvas.p, canvas.q
    breath, rotation = dice(0.16, 0.6), dice(-0.06, 0.06)
    both = np.zeros_like(p)
    for side in (-1, 1):
        width = body.lung_width * dice(0.88, 1.12)
        middle = side * (body.lung_gap + width) + rotation
        across = (p - middle) / width
        top = -body.lung_height - 0.04 + dice(-0.05, 0.05)
        level = breath - (0.06 if side < 0 else 0.0) + dice(-0.05, 0.05)
        down = np.clip((q - top) / (level - top), 0, 1)
        narrow = body.apex + (1 - body.apex) * np.sqrt(np.maximum(down * (2 - down), 0))
        dome = level + dice(0.1, 0.22) * across * across
        mask = edge((narrow - np.abs(across)) * width, 0.07) * edge(dome - q, 0.06) * edge(q - top, 0.1)
        canvas.paint(mask, dice(0.06, 0.2) + 0.05 * np.abs(across))
        belly = edge(q - dome, 0.06) * edge(1.25 - np.abs(across), 0.2)
        canvas.paint(0.6 * belly, dice(0.6, 0.85))
        both = both + mask
    if dice.chance(0.6):  # gas in the stomach
        bubble = canvas.ellipse(dice(0.22, 0.42), breath + dice(0.16, 0.26), dice(0.08, 0.17), dice(0.05, 0.1))
        canvas.paint(bubble, dice(0.1, 0.3))
    return np.clip(both, 0, 1)


def _middle(canvas: Canvas, film: Film, body: Anatomy, dice: Dice) -> None:
    """Heart, aortic arch, mediastinum, trachea, vessels at the roots of the lungs."""
    p, q = canvas.p, canvas.q
    grow = dice(1.35, 1.7) if film.finding == "cardiomegaly" else dice(0.85, 1.1)
    dense = dice(0.62, 0.82)
    strip = body.lung_gap + dice(-0.02, 0.06) - 0.03 * q
    canvas.paint(edge(strip - np.abs(p), 0.08) * edge(q + 0.95, 0.2), dense - 0.08)
    a, b = body.heart * grow, body.heart * grow * dice(0.75, 0.95)
    canvas.paint(canvas.ellipse(body.heart_shift * grow, dice(0.1, 0.28), a, b, body.heart_tilt, 0.2), dense)
    canvas.paint(canvas.ellipse(body.lung_gap, dice(-0.4, -0.28), dice(0.06, 0.13), 0.1), dense - 0.05)
    canvas.paint(0.6 * canvas.rod(dice(-0.04, 0.04), -1.0, dice(-0.05, 0.05), -0.3, 0.05), 0.3)
    for side in (-1, 1):
        root, height = side * (body.lung_gap + 0.06), dice(-0.2, 0.0)
        canvas.v += dice(0.05, 0.22) * canvas.ellipse(root, height, dice(0.08, 0.14), dice(0.1, 0.18), soft=0.8)
        for _ in range(3):
            end = root + side * dice(0.12, 0.4), height + dice(-0.35, 0.4)
            canvas.v += dice(0.03, 0.1) * canvas.rod(root, height, *end, 0.025)


def _bones(canvas: Canvas, film: Film, body: Anatomy, dice: Dice) -> None:
    """Ribs (behind, and fainter in front), spine, clavicles, shoulder blades."""
    p, q = canvas.p, canvas.q
    reach = body.lung_gap + 2 * body.lung_width + 0.06
    out = np.abs(p) / reach
    cage = edge(1.0 - out, 0.12) * edge(out - 0.12, 0.2) * edge(q + 0.78, 0.1) * edge(0.75 - q, 0.2)
    start = dice(0, body.rib_spacing)
    for slope, strength in ((body.rib_slope, 1.0), (-0.9 * body.rib_slope - 0.1, dice(0.2, 0.6))):
        phase = (q - start - slope * out * out) / body.rib_spacing
        along = np.abs(phase - np.floor(phase) - 0.5)  # 0 in the middle of a rib, 0.5 between two
        canvas.v += body.rib_strength * strength * cage * edge(0.22 - along, 0.25)
    phase = q / dice(0.13, 0.17)
    gaps = np.abs(phase - np.floor(phase) - 0.5)
    canvas.v += dice(0.04, 0.14) * edge(0.1 - np.abs(p), 0.06) * (0.6 + 0.8 * gaps)
    for side in (-1, 1):
        tilt = dice(-0.2, 0.08)
        clavicle = canvas.rod(side * 0.1, -0.62 + dice(-0.06, 0.06), side * 0.66, -0.66 + tilt, 0.035)
        canvas.v += dice(0.1, 0.24) * clavicle
        blade = canvas.rod(side * dice(0.56, 0.7), -0.6, side * dice(0.5, 0.72), dice(-0.15, 0.1), 0.07, 0.1)
        canvas.v += dice(0.0, 0.14) * blade


def _opacities(canvas: Canvas, film: Film, body: Anatomy, dice: Dice, lungs: np.ndarray) -> None:
    """The finding inside the lungs, and soft clouds as every film has some."""
    p, q = canvas.p, canvas.q
    side = 1 if film.right else -1
    centre = body.lung_gap + body.lung_width
    for _ in range(3):
        cloud = canvas.ellipse(
            dice(-1, 1) * 2 * centre, dice(-0.6, 0.5), dice(0.12, 0.4), dice(0.12, 0.4), dice(-1.5, 1.5), 1.2
        )
        canvas.v += dice(-0.08, 0.2) * cloud * lungs
    if film.finding == "effusion":
        level = dice(-0.25, 0.25)
        fluid = edge(q - level + 0.25 * np.abs(p - side * centre), 0.12) * edge(side * p - 0.08, 0.08)
        canvas.paint(fluid * lungs, dice(0.6, 0.8))
    if film.finding == "nodule":
        for _ in range(1 + dice.chance(0.5)):
            radius = dice(0.07, 0.15)
            spot = canvas.ellipse(
                side * (centre + dice(-0.16, 0.16)), dice(-0.45, 0.15), radius, radius * dice(0.8, 1.2)
            )
            canvas.paint(spot, dice(0.55, 0.8))


def _device(canvas: Canvas, film: Film, dice: Dice) -> None:
    """Metal and plastic: nearly white."""
    if film.device == "pacemaker":
        side = -1 if dice.chance(0.3) else 1
        p, q = side * dice(0.42, 0.62), dice(-0.5, -0.28)
        canvas.paint(canvas.ellipse(p, q, dice(0.12, 0.17), dice(0.09, 0.13), dice(-0.5, 0.5), 0.15), 0.95)
        canvas.wire([(p, q), (side * 0.2, -0.55), (-0.08, -0.2), (dice(0.0, 0.2), dice(0.2, 0.4))], 0.02, 0.9)
    elif film.device == "central line":
        side = 1 if dice.chance(0.4) else -1
        canvas.wire(
            [(side * dice(0.5, 0.8), -0.8), (side * 0.2, -0.6), (-0.1, -0.3), (-0.1, dice(-0.1, 0.2))], 0.02, 0.85
        )
    elif film.device == "ECG leads":
        for side in (-1, 1):
            p, q = side * dice(0.3, 0.6), dice(-0.4, 0.4)
            canvas.paint(canvas.ellipse(p, q, 0.06, 0.06), 0.9)
            canvas.wire([(p, q), (p + dice(-0.3, 0.3), q + 0.3), (dice(-0.6, 0.6), 1.1)], 0.018, 0.85)
    elif film.device == "tube":
        canvas.wire([(0.02, -1.1), (dice(-0.03, 0.05), 0.2), (dice(0.1, 0.4), dice(0.45, 0.7))], 0.025, 0.85)


def _oddity(canvas: Canvas, film: Film, dice: Dice, lungs: np.ndarray) -> None:
    """What makes an outlier; kinds that change position or exposure are handled there."""
    side = 1 if film.right else -1
    half = edge(side * canvas.p, 0.1) * lungs
    if film.outlier == "white lung":
        canvas.paint(half, 0.9)
    elif film.outlier == "pneumothorax":
        canvas.paint(half, 0.0)
    elif film.outlier == "spinal rods":
        for offset in (-0.12, 0.12):
            canvas.paint(canvas.rod(offset, -0.7, offset * dice(0.8, 1.2), 0.8, 0.04), 1.0)
        for step in range(5):
            height = -0.6 + 0.3 * step
            canvas.paint(canvas.rod(-0.2, height, 0.2, height, 0.03), 1.0)
    elif film.outlier == "foreign body":
        canvas.paint(canvas.ellipse(side * dice(0.1, 0.3), dice(-0.3, 0.2), 0.24, 0.24, soft=0.12), 1.0)


def _expose(v: np.ndarray, film: Film, dice: Dice, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exposure, tone curve, uneven beam, collimator and side marker, in film coordinates x, y in -1..1."""
    v = v + 0.2 * (dice(-1, 1) * x + dice(-1, 1) * y) * v
    v = np.clip(v * dice(0.75, 1.25) + dice(-0.03, 0.07), 0, 1.5)
    bend = dice(-0.35, 0.9)
    v = v * (1 + bend) / (1 + bend * v)  # tone curve through 0 and 1
    if film.outlier == "inverted film":
        v = np.clip(1 - v, 0, 1)
    if dice.chance(0.6):
        tilt = dice(-0.08, 0.08)
        for along, across in ((x, y), (-x, y), (y, x), (-y, x)):
            v = v * edge(dice(0.76, 1.25) + tilt * across - along, 0.05)
    if dice.chance(0.7):
        p, q = dice(0.6, 0.85) * (-1 if dice.chance(0.5) else 1), dice(-0.9, -0.6)
        marker = edge(0.05 - np.abs(x - p), 0.04) * edge(0.08 - np.abs(y - q), 0.04)
        v = v + marker * (0.95 - v)
    return v
