"""``strokes``: an embedded set of characters drawn from random strokes, made from a seed within seconds.

30 alphabets of 20 characters, each character drawn once by each of 20 hands, 28x28 grey, ink 255. The
characters of an alphabet are put together from a handful of shared primitives (cubic Bezier curves), so they
resemble each other; a hand has its own slant, proportions, size, pen width and unsteadiness, and no two
drawings of a character are equal. Alphabets are never divided between splits: 20 to train, 4 to validate, 6
to test.

The same seed gives the same bytes on every machine: draws come from numpy's frozen ``RandomState`` as uniform
numbers, geometry uses only operations that IEEE 754 rounds exactly (no exp, sin or log), and the sums over
stroke points are sums of integers below 2**24, exact in float32 in any order.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mamlpp_fast.data.classes import SPLITS, FewShotData, ImageClasses
from mamlpp_fast.data.errors import DataError, check_protocol, side_of

__all__ = ["PROTOCOLS", "draw_strokes", "load_strokes"]

PROTOCOLS = {"rotated": "training turns each class by multiples of 90 degrees", "upright": "no rotation"}
ALPHABETS = {"train": 20, "val": 4, "test": 6}
CHARACTERS = 20
HANDS = 20
DEFAULT_SEED = 2019
_PRIMITIVES = 6
_STROKES = 4
_POINTS = 28
_LEVELS = 127

Floats = NDArray[np.float64]


def load_strokes(
    path: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "rotated",
    image_size: int | None = None,
    seed: int = DEFAULT_SEED,
) -> FewShotData:
    """Makes the ``strokes`` data set; nothing is read.

    Args:
        path: must be None.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels, 28 without it.
        seed: another seed gives other alphabets and hands.

    Raises:
        DataError: a path, an unknown protocol, an image size outside 8 .. 128, a seed outside 0 .. 2**32 - 1.
    """
    if path is not None:
        raise DataError(f"--data: strokes is generated and takes no path, got '{path}'")
    check_protocol("strokes", protocol, PROTOCOLS)
    size = side_of("strokes", image_size, 28, 8, 128)
    if not 0 <= seed < 2**32:
        raise DataError(f"seed: expected 0 .. 2**32 - 1 for strokes, got {seed}")
    images = draw_strokes(seed, size)
    classes = len(images)
    everything = ImageClasses(
        torch.from_numpy(images.reshape(-1, 1, size, size)),
        torch.arange(classes) * HANDS,
        torch.full((classes,), HANDS),
        tuple(f"alphabet{c // CHARACTERS + 1:02d}/character{c % CHARACTERS + 1:02d}" for c in range(classes)),
        "all",
        "strokes",
    )
    splits = {}
    first = 0
    for split, alphabets in ALPHABETS.items():
        splits[split] = everything.select(range(first, first + alphabets * CHARACTERS), split)
        first += alphabets * CHARACTERS
    train, val, test = (splits[s] for s in SPLITS)
    return FewShotData("strokes", protocol, train, val, test, rotate_train_classes=protocol == "rotated")


def draw_strokes(seed: int = DEFAULT_SEED, size: int = 28) -> NDArray[np.uint8]:
    """All drawings, [classes, 20, size, size] uint8, by alphabet, then character, then hand."""
    rng = np.random.RandomState(seed)
    alphabets = sum(ALPHABETS.values())
    drawn = [_alphabet(rng) for _ in range(alphabets)]
    curves = np.concatenate([d[0] for d in drawn])  # [classes, strokes, 4, 2]
    present = np.concatenate([d[1] for d in drawn])  # [classes, strokes]
    hands = _hands(rng)
    images = np.empty((len(curves), HANDS, size, size), np.uint8)
    for c in range(0, len(curves), CHARACTERS):
        group = slice(c, c + CHARACTERS)
        points, weights = _trace(_write(rng, curves[group], hands), present[group])
        # A character at a time, whose numbers fit a core's cache: in half the time of a whole alphabet's.
        images[group] = [_rasterize(*one, hands["width"], size) for one in zip(points, weights, strict=True)]
    return images


def _normal(rng: np.random.RandomState, *shape: int) -> Floats:
    """Nearly normal numbers of unit variance from uniform ones (a logarithm may differ between machines)."""
    u = rng.random_sample((4, *shape))
    total: Floats = (u[0] + u[1] + u[2] + u[3] - 2.0) * 1.7320508075688772
    return total


def _alphabet(rng: np.random.RandomState) -> tuple[Floats, NDArray[np.bool_]]:
    """Control points [characters, strokes, 4, 2] in [-1, 1] and which strokes exist [characters, strokes]."""
    roundness = 0.15 + 0.85 * rng.random_sample()
    connected = 0.55 + 0.4 * rng.random_sample()
    mean_strokes = 2.6 + 1.2 * rng.random_sample()
    primitives = [_primitive(rng, roundness) for _ in range(_PRIMITIVES)]
    kept: list[Floats] = []
    masks: list[NDArray[np.bool_]] = []
    signatures: list[Floats] = []
    distance = 0.5
    while len(kept) < CHARACTERS:
        curves, mask = _character(rng, primitives, connected, mean_strokes)
        signature = _signature(curves, mask)
        # Two characters that no reader could tell apart would only be label noise.
        if all(float(abs(signature - s).max()) >= distance for s in signatures):
            kept.append(curves)
            masks.append(mask)
            signatures.append(signature)
        else:
            distance *= 0.99
    return np.stack(kept), np.stack(masks)


def _primitive(rng: np.random.RandomState, roundness: float) -> Floats:
    """A stroke from the origin: a chord in one of eight directions, bent to one side or into an S."""
    directions = (
        (1, 0),
        (0, 1),
        (0.7, 0.7),
        (-0.7, 0.7),
        (0.45, 0.9),
        (0.9, 0.45),
        (-0.9, 0.45),
        (-0.45, 0.9),
    )
    x, y = directions[rng.randint(len(directions))]
    length = 0.7 + 0.9 * rng.random_sample()
    chord = np.array([x * length, y * length])
    side = np.array([-chord[1], chord[0]])
    bend = roundness * (2.0 * rng.random_sample(2) - 1.0) * 1.6
    if rng.random_sample() < 0.5:
        bend[1] = bend[0]
    along = 0.15 + 0.3 * rng.random_sample(2)
    return np.stack(
        [0.0 * chord, along[0] * chord + bend[0] * side, (1 - along[1]) * chord + bend[1] * side, chord]
    )


def _character(
    rng: np.random.RandomState, primitives: list[Floats], connected: float, mean_strokes: float
) -> tuple[Floats, NDArray[np.bool_]]:
    number = min(_STROKES, max(2, int(mean_strokes + 1.6 * (rng.random_sample() - 0.5) + 0.5)))
    curves = np.zeros((_STROKES, 4, 2))
    for s in range(number):
        stroke = primitives[rng.randint(len(primitives))] * (0.7 + 0.6 * rng.random_sample())
        stroke = stroke * np.where(rng.random_sample(2) < 0.2, -1.0, 1.0)
        u = rng.random_sample(3)
        if s and u[0] < connected:
            before = curves[rng.randint(s)]
            ends = (before[0], before[3], (before[0] + 3 * before[1] + 3 * before[2] + before[3]) / 8)
            start = ends[int(3 * u[1])]
        else:
            start = np.array([int(3 * u[1]) - 1.0, int(3 * u[2]) - 1.0])
        if rng.random_sample() < 0.3:
            stroke = stroke - (stroke[0] + 3 * stroke[1] + 3 * stroke[2] + stroke[3]) / 8
        curves[s] = start + stroke
    mask = np.arange(_STROKES) < number
    drawn = _bezier(curves[:number], 12).reshape(-1, 2)
    low, high = drawn.min(0), drawn.max(0)
    extent = high - low
    # The larger side fills the frame; a thin character stays thin.
    scale = 2.0 / np.maximum(extent, 0.55 * extent.max())
    curves = (curves - (low + high) / 2) * scale
    return curves * mask[:, None, None], mask


def _signature(curves: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Blurred 5x5 occupancy of a character, with no pen or hand in it."""
    points = _bezier(curves[mask], 12).reshape(-1, 2)
    centres = np.arange(-2, 3) * 0.5
    bump = np.maximum(0.0, 1.0 - (abs(points[:, :, None] - centres) / 0.6))
    cells: Floats = (bump[:, 1, :, None] * bump[:, 0, None, :]).max(0)
    return cells


def _bezier(curves: Floats, points: int) -> Floats:
    """[..., 4, 2] control points -> [..., points, 2] at equally spaced parameters."""
    t = np.arange(points)[:, None] / (points - 1.0)
    s = 1.0 - t
    p0, p1, p2, p3 = (curves[..., i, None, :] for i in range(4))
    return s * s * s * p0 + 3.0 * (s * s * t) * p1 + 3.0 * (s * t * t) * p2 + t * t * t * p3


def _hands(rng: np.random.RandomState) -> dict[str, Floats]:
    return {
        "slant": 0.22 * _normal(rng, HANDS),
        "aspect": 1.0 + 0.13 * _normal(rng, HANDS),
        "size": 0.58 + 0.16 * rng.random_sample(HANDS),
        "width": 0.06 + 0.055 * rng.random_sample(HANDS),
        "unsteady": 0.05 + 0.06 * rng.random_sample(HANDS),
        "bend": 0.9 + 0.25 * _normal(rng, HANDS),
    }


def _write(rng: np.random.RandomState, curves: Floats, hands: dict[str, Floats]) -> Floats:
    """Every hand writes every character: [characters, hands, strokes, 4, 2] in the image's [-1, 1] frame."""
    n = len(curves)
    shape = (n, HANDS)

    def per_hand(name: str) -> Floats:
        return hands[name][None, :, None, None, None]

    c = np.broadcast_to(curves[:, None], (n, HANDS, *curves.shape[1:]))
    inner = c[..., 1:3, :]
    chord = c[..., :1, :] + (c[..., 3:, :] - c[..., :1, :]) * np.array([1.0, 2.0])[:, None] / 3.0
    bent = chord + (inner - chord) * per_hand("bend")
    c = np.concatenate([c[..., :1, :], bent, c[..., 3:, :]], axis=-2)
    c = c + per_hand("unsteady") * (
        1.1 * _normal(rng, n, HANDS, _STROKES, 1, 2) + 1.2 * _normal(rng, n, HANDS, _STROKES, 4, 2)
    )
    turn = 0.14 * _normal(rng, *shape)[..., None, None]
    slant = (hands["slant"] + 0.08 * _normal(rng, *shape))[..., None, None]
    grow = (hands["size"] * (1.0 + 0.08 * _normal(rng, *shape)))[..., None, None]
    aspect = (hands["aspect"] + 0.06 * _normal(rng, *shape))[..., None, None]
    move = 0.11 * _normal(rng, n, HANDS, 1, 1, 2)
    x, y = c[..., 0], c[..., 1]
    x, y = x + (turn - slant) * y, y - turn * x
    return np.stack([x * aspect, y], axis=-1) * grow[..., None] + move


def _trace(curves: Floats, present: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Points along the strokes [characters, hands, points, 2] and the length each stands for."""
    points = _bezier(curves, _POINTS)
    step = points[..., 1:, :] - points[..., :-1, :]
    length = np.sqrt(step[..., 0] * step[..., 0] + step[..., 1] * step[..., 1])
    weights = np.zeros(points.shape[:-1])
    weights[..., 1:] += length / 2
    weights[..., :-1] += length / 2
    weights *= present[:, None, :, None]
    flat = points.shape[:2]
    return points.reshape(*flat, -1, 2), weights.reshape(*flat, -1)


def _rasterize(points: Floats, weights: Floats, width: Floats, size: int) -> NDArray[np.uint8]:
    """Ink of strokes by separable bumps: image[y, x] = sum over points of weight * bump(y) * bump(x).

    The two factors are truncated to integers, so that the sums are exact (see the module's docstring).
    """
    centres = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    radius = np.maximum(2.0 * width, 2.6 / size)[:, None, None]

    def bump(coordinate: Floats) -> Floats:
        d = (coordinate[..., None] - centres) / radius
        inside = np.maximum(0.0, 1.0 - d * d)
        return inside * inside

    # A point stands for at most two pen radii of stroke, or the cast below could pass 2**24.
    share: Any = np.minimum(weights / radius[..., 0], 2.0)
    across = np.rint(bump(points[..., 0]) * (share * _LEVELS)[..., None]).astype(np.float32)
    down = np.rint(bump(points[..., 1]) * _LEVELS).astype(np.float32)
    total = np.matmul(down.swapaxes(-1, -2), across)
    # A straight stroke sums to 16/15 on its axis; a little less than half of that is full ink.
    ink = np.minimum(total * np.float32(255.0 / (0.55 * _LEVELS * _LEVELS)), np.float32(255.0))
    truncated: NDArray[np.uint8] = ink.astype(np.uint8)
    return truncated
