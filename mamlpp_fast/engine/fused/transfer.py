"""What goes in and out of a program: batches, parameters and rates in, gradients out, in the kernels' layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.form import Written
from mamlpp_fast.engine.fused.network import Statistics
from mamlpp_fast.engine.fused.steps import Loss
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.inputs import tensors_of
from mamlpp_fast.lslr import LSLR

__all__ = ["Gradients", "Transfer"]


class Gradients:
    """Where the meta-gradients of a model and its rates are left: one tensor a parameter, which stays.

    Args:
        dtype: of the gradients; the parameters' own by default.
    """

    def __init__(self, model: nn.Module, rates: LSLR, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._parameters = dict(model.named_parameters())
        self._rates = rates.rates
        self._tensors: dict[nn.Parameter, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """The gradient of a parameter of the model, None where it takes none."""
        return self._of(self._parameters[name])

    @property
    def rates(self) -> Tensor | None:
        return self._of(self._rates)

    def all(self) -> Iterator[Tensor]:
        for p in (*self._parameters.values(), self._rates):
            if (gradient := self._of(p)) is not None:
                yield gradient

    def zero(self) -> None:
        for gradient in self.all():
            gradient.zero_()

    def hand_over(self) -> None:
        """Makes them the parameters' ``.grad``."""
        for p, gradient in self._tensors.items():
            p.grad = gradient

    def _of(self, p: nn.Parameter) -> Tensor | None:
        if p.requires_grad and p not in self._tensors:
            # With the parameter's strides: optimizers pair memory, not elements.
            self._tensors[p] = torch.zeros_like(p, dtype=self._dtype, requires_grad=False)
        return self._tensors.get(p)


class Transfer:
    """Between the world and one program's :class:`Memory`.

    Args:
        model, rates: where parameters and rates are read.
        loss: stores the labels.
        written: the program, its memory, and the parameters that it reads.
        frozen: the running statistics that it normalises with.
    """

    def __init__(
        self, model: nn.Module, rates: LSLR, loss: Loss, written: Written, frozen: dict[str, Statistics]
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers()) | dict(loss.buffers)
        self.rates, self.loss, self.frozen = rates, loss, frozen
        self.slots, self.rows = written.slots, written.rows
        self.layout, self.memory = written.layout, written.memory
        self.device = self.memory.table.tensor().device
        # Of weight and bias of a norm without.
        self._numbers: dict[float, Tensor] = {}
        self._defaults = self._number(1.0), self._number(0.0)

    def _number(self, value: float) -> Tensor:
        """As a tensor that stays, as captured graphs read it."""
        if value not in self._numbers:
            self._numbers[value] = self.memory.table.tensor().new_tensor(value)
        return self._numbers[value]

    def load_examples(self, batch: EpisodeBatch, lane: int = 0) -> None:
        """Copies them into a lane's memory, where labels are then :meth:`load_labels`'s."""
        for place, x in self._examples(batch, lane):
            place.copy_(x)
        for place, value in self._blanks(lane):
            place.fill_(value)

    def load_labels(self, batch: EpisodeBatch, lane: int = 0) -> None:
        """They become what the loss stores, in a lane's memory."""
        for place, y in zip(self._stored(lane), (batch.support_y, batch.target_y), strict=True):
            self.loss.load(place, y)

    def _stored(self, lane: int) -> tuple[Tensor, Tensor]:
        return self.memory.support_t.tensor(lane), self.memory.target_t.tensor(lane)

    def _blanks(self, lane: int) -> Iterator[tuple[Tensor, float]]:
        for place in self._stored(lane):
            if (value := self.loss.blank(place)) is not None:
                yield place, value

    def _examples(self, batch: EpisodeBatch, lane: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Places and examples; images [T, N, C, H, W] become [T, N, H, W, C]."""
        m = self.memory
        for refs, inputs in ((m.support_x, batch.support_x), (m.target_x, batch.target_x)):
            for ref, x in zip(refs, tensors_of(inputs), strict=True):
                yield ref.tensor(lane), x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x

    def load_parameters(self, step_weights: Tensor | None = None, batch: EpisodeBatch | None = None) -> None:
        """Parameters, rates, buffers, multi-step weights; a batch's examples where they go with these in one call."""
        with torch.no_grad():
            pairs = list(self._loaded())
            if step_weights is not None:
                pairs.append((self.memory.weights.tensor(), step_weights.to(self.device)))
            if batch is not None:
                pairs += self._examples(batch, 0)
                pairs += (
                    (place, self._number(value).expand(place.shape)) for place, value in self._blanks(0)
                )
            self.move(pairs)

    def move(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copies the second of each pair to the first; or sums it, over the axes that it has more."""
        if base.launches_cost(self.device):
            outs, terms = map(list, zip(*pairs, strict=True))
            torch.ops.mamlpp_fast.strided_sums(outs, terms, [1.0] * len(outs))
            return
        for out, term in pairs:
            if out.dim() == term.dim():
                out.copy_(term)
            else:
                torch.sum(term, dim=0, out=out)

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        m = self.memory
        for name, slot in self.slots.items():
            yield slot.arranged(m.meta[name].tensor()), slot.arrange(self.parameters[name])
        for name, rows in self.rows.items():
            for ref, source, default in zip(
                m.rows[name], (rows.weight, rows.bias), self._defaults, strict=True
            ):
                stored = ref.tensor()
                if source is None:
                    yield stored, default.expand(stored.shape)
                else:
                    yield stored, self.parameters[source].view(stored.shape)
        for name, ref in m.buffers.items():
            yield ref.tensor(), self.buffers[name]
        stored, rates = m.rates.tensor(), self.rates.rates.detach()
        if self.rates.kind == "tensor":
            yield stored, rates
        else:
            for view, place in self._elements(rates, stored):
                yield place, view.unsqueeze(1).expand(place.shape)
        for name, pair in m.running.items():
            statistics = self.frozen[name]
            for ref, buffer in zip(pair, (statistics.mean, statistics.var), strict=True):
                table = self.buffers[buffer].view(statistics.rows, -1)
                for k, row in enumerate(ref.tensor()):
                    yield row, table[min(k, statistics.rows - 1)]

    def gradients(self, gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
        """Where the gradients lie, and the means over all tasks that go there; what has none is zero."""
        written: set[int] = set()
        moved = list(self._gradients(gradients, written))
        rest = [g for g in gradients.all() if id(g) not in written]
        return moved + [(g, self._defaults[1].expand(g.shape)) for g in rest]

    def _gradients(self, gradients: Gradients, written: set[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Places and what goes there; ``written``: gradients that are filled with it, by identity."""
        m = self.memory
        for name, ref in m.meta_grads.items():
            if (place := gradients.of(name)) is not None:
                slot = self.slots[name]
                written.add(id(place))
                yield slot.arrange(place), slot.arranged(ref.tensor())
        for name, rows in self.rows.items():
            for ref, source in zip(m.row_grads[name], (rows.weight, rows.bias), strict=True):
                if source is not None and (place := gradients.of(source)) is not None:
                    written.add(id(place))
                    yield place.view(ref.shape), ref.tensor()
        if (place := gradients.rates) is None or m.rate_grads is None:
            return
        written.add(id(place))
        if self.rates.kind == "tensor":
            yield place, m.rate_grads.tensor()
            return
        for view, stored in self._elements(place, m.rate_grads.tensor()):
            yield view, stored.movedim(1, 0)
        absent = set(self.rates.names) - self.layout.places().keys()
        for name, part in zip(self.rates.names, place.split(self.rates.sizes, dim=1), strict=True):
            if name in absent:
                yield part, self._defaults[1].expand(part.shape)

    def _elements(self, rates: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rates by element [K, P] and those of every task [K, size], parameter by parameter in the kernels' axes."""
        parts = dict(zip(self.rates.names, rates.split(self.rates.sizes, dim=1), strict=True))
        for name, (begin, shape) in self.layout.places().items():
            slot = self.slots[name]
            part = parts[name]
            part = part.view(len(part), *slot.split).permute(0, *(1 + i for i in slot.order))
            place = stored.narrow(1, begin, shape.numel()).unflatten(1, (shape[0], *part.shape[1:]))
            yield part, place
