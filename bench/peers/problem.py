"""The workload every peer gets: sizes, and weights and tasks made with numpy. Needs nothing but numpy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
STAGES = 4


MSL_EPOCHS, EPOCH = 10, 4


@dataclass(frozen=True)
class Sizes:
    """Second-order MAML on Conv4 with max-pooling, mean over tasks.

    Plain MAML has a fixed ``rate`` and the target loss of the last step. With ``plus`` it is MAML++: rates to learn per
    tensor and step, batch-norm weights per step, and a weighted target loss after every step.
    """

    ways: int
    tasks: int = 8
    shots: int = 1
    targets: int = 1
    image_size: int = 28
    filters: int = 64
    steps: int = 5
    rate: float = 0.1
    plus: bool = False

    @property
    def step_weights(self) -> list[float]:
        """Weight of the target loss after each step; MAML++'s are those of its fifth epoch of ten."""
        if not self.plus:
            return [0.0] * (self.steps - 1) + [1.0]
        moved = EPOCH / (self.steps * MSL_EPOCHS)
        return [1 / self.steps - moved] * (self.steps - 1) + [1 / self.steps + (self.steps - 1) * moved]


SIZES = {
    "omniglot-5w1s-final": Sizes(ways=5),
    "omniglot-20w1s-final": Sizes(ways=20),
    "omniglot-5w1s": Sizes(ways=5, plus=True),
    "omniglot-20w1s": Sizes(ways=20, plus=True),
}
# For rehearsals.
_TINY = {"ways": 3, "tasks": 2, "image_size": 16, "filters": 8, "steps": 2}
TINY = {"tiny-final": Sizes(**_TINY), "tiny": Sizes(**_TINY, plus=True)}


@dataclass(frozen=True)
class Problem:
    """Sizes, weights by torch's names and layouts, and the tasks [tasks, n, 1, H, W] with labels [tasks, n].

    What is named ``.norm.`` is not adapted. MAML++ has it with a row for each step, and ``rates`` [tensors, steps] for
    the tensors that adapt, in the order of ``weights``.
    """

    sizes: Sizes
    weights: Arrays
    tasks: tuple[np.ndarray[Any, Any], ...]

    def adapting(self) -> list[str]:
        """Names of what the inner loop adapts."""
        return [name for name in self.weights if ".norm." not in name and name != "rates"]

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
        rows = (sizes.steps, sizes.filters) if sizes.plus else (sizes.filters,)
        add(f"{block}.norm.weight", rows, 0.1, 1.0)
        add(f"{block}.norm.bias", rows, 0.1)
        channels, size = sizes.filters, size // 2
    features = channels * size * size
    add("head.weight", (sizes.ways, features), np.sqrt(6 / (features + sizes.ways)))
    add("head.bias", (sizes.ways,), 0.1)
    if sizes.plus:
        add("rates", (2 * STAGES + 2, sizes.steps), 0.2 * sizes.rate, sizes.rate)

    shape = (sizes.tasks, sizes.ways, 1, 1, sizes.image_size, sizes.image_size)
    prototype = random.standard_normal(shape)

    def side(per_class: int) -> tuple[np.ndarray[Any, Any], ...]:
        noise = random.standard_normal((*shape[:2], per_class, *shape[3:]))
        images = (0.7 * prototype + 0.7 * noise).astype(np.float32)
        labels = np.tile(np.repeat(np.arange(sizes.ways), per_class), (sizes.tasks, 1))
        return images.reshape(sizes.tasks, -1, *shape[3:]), labels

    return Problem(sizes, weights, (*side(sizes.shots), *side(sizes.targets)))
