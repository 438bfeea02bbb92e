"""Brushes for procedurally drawn pictures: analytic shapes on float64 coordinate arrays, the same on every machine.

Arrays see only +, -, *, /, sqrt, floor and clipping, which IEEE 754 fixes to the last bit; sine and cosine
are taken of scalars only.
"""

import math

import numpy as np


class Dice:
    """Uniform numbers from one Philox key, the same on every machine."""

    def __init__(self, key: int):
        self._next = np.random.Generator(np.random.Philox(key=key)).random

    def __call__(self, low: float, high: float) -> float:
        return low + (high - low) * self._next()

    def chance(self, probability: float) -> bool:
        return self._next() < probability


def edge(inside: np.ndarray, width: float) -> np.ndarray:
    """Smooth step over ``width``: 0 where ``inside`` is far below 0, 1 where it is far above."""
    t = inside * (1 / width)
    t += 0.5
    np.clip(t, 0, 1, out=t)
    return t * t * (3 - 2 * t)


class Canvas:
    """Grey values ``v`` over body coordinates ``p``, ``q`` (all float64 [n, n]) and the brushes."""

    def __init__(self, p: np.ndarray, q: np.ndarray):
        self.p, self.q = p, q
        self.v = np.zeros_like(p)

    def paint(self, mask: np.ndarray, value: float | np.ndarray) -> None:
        """Moves the grey value towards ``value`` where ``mask`` (0..1) says so."""
        self.v += mask * (value - self.v)

    def ellipse(self, p: float, q: float, a: float, b: float, turn: float = 0.0, soft: float = 0.25) -> np.ndarray:
        """Mask of an ellipse with half axes a, b; ``soft`` is the edge width relative to the radius."""
        c, s = math.cos(turn), math.sin(turn)
        x, y = self.p - p, self.q - q
        u, w = (c * x + s * y) / a, (c * y - s * x) / b
        return edge(1 - np.sqrt(u * u + w * w), soft)

    def rod(self, p0: float, q0: float, p1: float, q1: float, radius: float, soft: float = 0.05) -> np.ndarray:
        """Mask of a straight bar with round ends."""
        dp, dq = p1 - p0, q1 - q0
        x, y = self.p - p0, self.q - q0
        t = np.clip((x * dp + y * dq) / (dp * dp + dq * dq), 0, 1)
        x, y = x - t * dp, y - t * dq
        return edge(radius - np.sqrt(x * x + y * y), soft)

    def wire(self, points: list[tuple[float, float]], radius: float, value: float) -> None:
        """Paints a chain of bars."""
        for (p0, q0), (p1, q1) in zip(points, points[1:], strict=False):
            self.paint(self.rod(p0, q0, p1, q1, radius), value)
