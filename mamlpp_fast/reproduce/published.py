"""Published accuracies in percent, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published"]

_PAPER = "Antoniou, Edwards, Storkey, How to train your MAML (arXiv:1810.09502v2)"
_MAML = "Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (arXiv:1703.03400)"
_META_SGD = "Li, Zhou, Chen, Li, Meta-SGD (arXiv:1707.09835)"


@dataclass(frozen=True)
class Published:
    """A figure as printed, and the spread printed with it (None where there is none)."""

    mean: float
    spread: float | None
    source: str = _PAPER

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


# (table, row, shots). MAML twice: as the paper's authors ran it again, and as its own authors printed it.
PUBLISHED: dict[tuple[str, str, int], tuple[Published, ...]] = {
    ("omniglot-20w", "maml", 1): (Published(91.27, 1.07), Published(95.8, 0.3, _MAML)),
    ("omniglot-20w", "maml", 5): (Published(98.78, None), Published(98.9, 0.2, _MAML)),
    ("omniglot-20w", "maml-msl", 1): (Published(91.53, 0.69),),
    ("omniglot-20w", "maml-lslr", 1): (Published(95.77, 0.38),),
    ("omniglot-20w", "maml-bnwb-bnrs", 1): (Published(95.35, 0.23),),
    ("omniglot-20w", "maml++", 1): (Published(97.65, 0.05),),
    ("omniglot-20w", "maml++", 5): (Published(99.33, 0.03),),
    ("omniglot-20w", "meta-sgd", 1): (Published(95.93, 0.38, _META_SGD),),
    ("omniglot-20w", "meta-sgd", 5): (Published(98.97, 0.19, _META_SGD),),
    ("mini-imagenet", "maml", 1): (Published(48.64, None), Published(48.70, 1.84, _MAML)),
    ("mini-imagenet", "maml", 5): (Published(64.78, None), Published(63.11, 0.92, _MAML)),
    ("mini-imagenet", "maml++-1step", 1): (Published(51.05, 0.31),),
    ("mini-imagenet", "maml++-2steps", 1): (Published(51.49, 0.25),),
    ("mini-imagenet", "maml++-3steps", 1): (Published(51.11, 0.11),),
    ("mini-imagenet", "maml++-4steps", 1): (Published(51.65, 0.34),),
    ("mini-imagenet", "maml++-5steps", 1): (Published(52.40, 1.13),),
    ("mini-imagenet", "maml++-5steps", 5): (Published(67.15, 0.26),),
}
