"""The workload every peer gets: sizes, and weights and tasks made with numpy. Needs nothing but numpy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SIZES", "STAGES", "Arrays", "Problem", "Sizes", "make"]

Arrays = dict[str, np.ndarray[Any, Any]]
STAGES = 4


@dataclass(frozen=True)
class Sizes:
    """Plain second-order MAML on Conv4 with max-pooling; the target loss of the last step, mean over tasks."""

    ways: int
    tasks: int = 8
    shots: int = 1
    targets: int = 1
    image_size: int = 28
    filters: int = 64
    steps: int = 5
    rate: float = 0.1


SIZES = {"omniglot-5w1s-final": Sizes(ways=5), "omniglot-20w1s-final": Sizes(ways=20)}


@dataclass(frozen=True)
class Problem:
    """Sizes, weights by torch's names and layouts, and the tasks [tasks, n, 1, H, W] with labels [tasks, n].

    What is named ``.norm.`` is not adapted.
    """

    sizes: Sizes
    weights: Arrays
    tasks: tuple[np.ndarray[Any, Any], ...]

    def save(self, path: Path) -> None:
        arrays = {f"weight/{name}": value for name, value in self.weights.items()}
        arrays |= {f"size/{name}": np.asarray(value) for name, value in asdict(self.sizes).items()}
        arrays |= {f"task/{i}": value for i, value in enumerate(self.tasks)}
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, dtype: str = "float32") -> Problem:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        cast = {
            name: value.astype(dtype) if value.dtype == np.float32 else value
            for name, value in arrays.items()
        }

        def part(prefix: str) -> Arrays:
            return {n.removeprefix(prefix): value for n, value in cast.items() if n.startswith(prefix)}

        sizes = Sizes(**{name: value.item() for name, value in part("size/").items()})
        return cls(sizes, part("weight/"), tuple(cast[f"task/{i}"] for i in range(4)))


def make(sizes: Sizes, seed: int = 0) -> Problem:
    """Xavier-uniform weights, batch norm near the identity, and noisy copies of one image a class.

    No two pixels are equal, so that no max-pool has to choose between equal values.
    """
    random = np.random.default_rng(seed)
    weights: Arrays = {}

    def add(name: str, shape: tuple[int, ...], spread: float, centre: float = 0.0) -> None:
        weights[name] = (centre + spread * random.uniform(-1, 1, shape)).astype(np.float32)

    channels, size = 1, sizes.image_size
    for stage in range(STAGES):
        block = f"blocks.{stage}"
        add(
            f"{block}.conv.weight",
            (sizes.filters, channels, 3, 3),
            np.sqrt(6 / 9 / (channels + sizes.filters)),
        )
        add(f"{block}.conv.bias", (sizes.filters,), 0.1)
        add(f"{block}.norm.weight", (sizes.filters,), 0.1, 1.0)
        add(f"{block}.norm.bias", (sizes.filters,), 0.1)
        channels, size = sizes.filters, size // 2
    features = channels * size * size
    add("head.weight", (sizes.ways, features), np.sqrt(6 / (features + sizes.ways)))
    add("head.bias", (sizes.ways,), 0.1)

    shape = (sizes.tasks, sizes.ways, 1, 1, sizes.image_size, sizes.image_size)
    prototype = random.standard_normal(shape)

    def side(per_class: int) -> tuple[np.ndarray[Any, Any], ...]:
        noise = random.standard_normal((*shape[:2], per_class, *shape[3:]))
        images = (0.7 * prototype + 0.7 * noise).astype(np.float32)
        labels = np.tile(np.repeat(np.arange(sizes.ways), per_class), (sizes.tasks, 1))
        return images.reshape(sizes.tasks, -1, *shape[3:]), labels

    return Problem(sizes, weights, (*side(sizes.shots), *side(sizes.targets)))
