"""learn2learn's ``nn.protonet``: the classifier of prototypical networks (Snell et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["PrototypicalClassifier", "compute_prototypes"]


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """The mean embedding of each class, in the order of the labels."""
    return torch.stack([support[labels == label].mean(dim=0) for label in torch.unique(labels)])


class PrototypicalClassifier(nn.Module):
    """Logits are negative distances to the classes' prototypes.

    Args:
        support: embeddings [N, D] to :meth:`fit_` at once, with ``labels`` [N].
        distance: ``"euclidean"`` (squared), ``"cosine"``, or a function of prototypes [C, D] and queries [N, D].
        normalize: use unit vectors; always with ``"cosine"``.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        known = {"euclidean": self.euclidean_distance, "cosine": self.cosine_distance}
        self.distance = known.get(distance, distance) if isinstance(distance, str) else distance
        self.normalized = normalize or distance == "cosine"
        self.prototypes: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Takes the prototypes of these embeddings, and returns them."""
        prototypes = compute_prototypes(support, labels)
        self.prototypes = self.normalize(prototypes) if self.normalized else prototypes
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        return -queries @ prototypes.t()

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        return (prototypes[None] - queries[:, None]).pow(2).sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = 1e-8) -> Tensor:
        length: Tensor = x.norm(p=2, dim=1, keepdim=True)
        return x / (length + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        assert self.prototypes is not None, "Prototypes not computed, use compute_prototypes(support, labels)"
        x = self.normalize(x) if self.normalized else x
        assert callable(self.distance)
        return -self.distance(self.prototypes, x)
