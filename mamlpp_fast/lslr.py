"""Learnable inner learning rates: one per parameter tensor and inner step (LSLR), or one per element (Meta-SGD)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from mamlpp_fast import ops
from mamlpp_fast.ops.stepped import stepped
from mamlpp_fast.reference import adapted_names

__all__ = ["LSLR"]


class LSLR(nn.Module):
    """Inner learning rates (MAML++, section 4, LSLR; Meta-SGD with ``rates="element"``).

    No clamp and no sign constraint: negative rates are allowed, as in the paper.

    Args:
        adapting: the model, all of whose parameters but those of normalisation layers adapt; or (name, parameter) of
            every tensor that adapts, as ``model.named_parameters()`` gives them; a tensor under several names is taken
            once, by the first.
        num_steps: inner steps K.
        init_lr: initial value of every rate.
        rates: ``"tensor"`` for one rate per tensor and step, ``"element"`` for one per element and step.
        learnable: False keeps the rates fixed.

    Attributes:
        rates: the rates, [L, K] for L tensors, or [K, P] for P elements in all.
        names: the L names, in order.

    Raises:
        TypeError: when ``adapting`` is neither a model nor pairs (``model.parameters()`` have no names).
        ValueError: without parameters or steps.
    """

    offsets: Tensor

    def __init__(
        self,
        adapting: nn.Module | Iterable[tuple[str, Tensor]],
        num_steps: int,
        init_lr: float = 0.1,
        *,
        rates: Literal["tensor", "element"] = "tensor",
        learnable: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(adapting, nn.Module):
            chosen = adapted_names(adapting)
            adapting = [(name, adapting.get_parameter(name)) for name in chosen]
        named = _distinct(adapting)
        if not named:
            raise ValueError("adapting: expected at least one parameter, got none")
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        if rates not in ("tensor", "element"):
            raise ValueError(f"rates: expected 'tensor' or 'element', got {rates!r}")
        self.num_steps = num_steps
        self.kind: Literal["tensor", "element"] = rates
        self.names = tuple(name for name, *_ in named)
        self.shapes = tuple(shape for _, shape, *_ in named)
        self.sizes = tuple(shape.numel() for shape in self.shapes)
        ends = list(accumulate(self.sizes, initial=0))
        _, _, device, dtype = named[0]
        self.register_buffer("offsets", torch.tensor(ends, device=device), persistent=False)
        shape = (len(named), num_steps) if rates == "tensor" else (num_steps, ends[-1])
        self.rates = nn.Parameter(
            torch.full(shape, init_lr, device=device, dtype=dtype.to_real()), requires_grad=learnable
        )

    def as_dict(self, rates: Tensor | None = None) -> dict[str, Tensor]:
        """Views of the rates, or of a tensor like them, by parameter name: [K], or [K, *shape] when per element."""
        rates = self.rates if rates is None else rates
        if self.kind == "tensor":
            return {name: rates[i] for i, name in enumerate(self.names)}
        parts = rates.split(self.sizes, dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Concatenates parameters (or their gradients) of these names into one buffer [P]."""
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer [P] by parameter name."""
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        }

    def update(self, flat: Tensor, grad: Tensor, step: int) -> Tensor:
        """One inner update of a flat buffer [P] or [tasks, P] in one kernel: ``flat - rate * grad``.

        Differentiable twice, with respect to all three. Steps beyond the last rate use the last.
        """
        row = min(step, self.num_steps - 1)
        if self.kind == "tensor":
            return ops.lslr_update(flat, grad, self.rates, self.offsets, row)
        return ops.lslr_update(flat, grad, self.rates, None, row)

    def forward(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor | None], step: int
    ) -> dict[str, Tensor]:
        """One inner update of parameters by name, ``p - rate * grad``, for a loop of one's own.

        Args:
            params: the current fast weights, by name.
            grads: their gradients, by name; None for a parameter that the loss does not depend on, which stays.
            step: the inner step, from 0; those beyond the last rate use the last.
        """
        own = zip(self.names, self._of_step(step), strict=True)
        moving = [(name, grad, rate) for name, rate in own if (grad := grads[name]) is not None]
        moved = stepped(
            [params[name] for name, *_ in moving], [g for _, g, _ in moving], [rate for *_, rate in moving]
        )
        updated = {name: params[name] for name in self.names}
        return updated | {name: new for (name, *_), new in zip(moving, moved, strict=True)}

    def _of_step(self, step: int) -> Iterable[Tensor]:
        """The rate of every tensor: a scalar, or one of its shape."""
        row = min(step, self.num_steps - 1)
        if self.kind == "tensor":
            return self.rates.select(1, row).unbind()
        return self.unflatten(self.rates[row]).values()

    def follow(self, adapting: Iterable[tuple[str, Tensor]], init_lr: float) -> None:
        """Goes over to other parameters, in place: rates stay with their name (per element: and shape).

        ``rates`` is another Parameter afterwards only where the names, or per element the shapes, are others.

        Args:
            adapting: (name, parameter) of every tensor that adapts from now on.
            init_lr: initial value of rates that are new.
        """
        new = LSLR(adapting, self.num_steps, init_lr, rates=self.kind, learnable=self.rates.requires_grad)
        if (new.names, new.shapes) == (self.names, self.shapes):
            return
        if new.names != self.names or self.kind == "element":
            with torch.no_grad():
                before = self.as_dict()
                for name, rate in new.as_dict().items():
                    if name in before and before[name].shape == rate.shape:
                        rate.copy_(before[name])
            self.rates = new.rates
        self.names, self.shapes, self.sizes = new.names, new.shapes, new.sizes
        self.offsets = new.offsets

    def extra_repr(self) -> str:
        return f"{len(self.names)} tensors, num_steps={self.num_steps}, rates={self.kind!r}"


def _distinct(adapting: Iterable[object]) -> list[tuple[str, torch.Size, torch.device, torch.dtype]]:
    """Each tensor once, under the first of its names: a tied one has one rate."""
    seen: dict[int, object] = {}  # the tensors themselves, so that no id is used again meanwhile
    named = []
    for pair in adapting:
        checked = _named(pair)
        tensor = pair[1]  # type: ignore[index]
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            named.append(checked)
    return named


def _named(pair: object) -> tuple[str, torch.Size, torch.device, torch.dtype]:
    if not (
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], Tensor)
    ):
        kind = type(pair).__name__
        raise TypeError(
            f"adapting: expected a model or (name, parameter) pairs as of model.named_parameters(), got {kind}"
        )
    name, p = pair
    return name, p.shape, p.device, p.dtype
