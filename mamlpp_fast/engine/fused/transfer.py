"""What goes in and out of a program: batches, parameters and rates in, gradients out, in the kernels' layouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.network import Statistics
from mamlpp_fast.engine.fused.steps import Loss, Rows, Slot
from mamlpp_fast.engine.fused.sweep import Memory
from mamlpp_fast.episodes import EpisodeBatch
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

    def zero(self) -> None:
        for p in (*self._parameters.values(), self._rates):
            if (gradient := self._of(p)) is not None:
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
        slots, rows: the parameters that the program reads.
        frozen: the running statistics that it normalises with.
        layout: of the fast weights.
        memory: of the program.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: LSLR,
        loss: Loss,
        slots: dict[str, Slot],
        rows: dict[str, Rows],
        frozen: dict[str, Statistics],
        layout: Layout,
        memory: Memory,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers()) | dict(loss.buffers)
        self.rates = rates
        self.loss = loss
        self.slots = slots
        self.rows = rows
        self.frozen = frozen
        self.layout = layout
        self.memory = memory

    def load_batch(self, batch: EpisodeBatch, lane: int = 0) -> None:
        """Images [T, N, C, H, W] become [T, N, H, W, C]; labels what the loss stores. Into a lane's memory."""
        m = self.memory
        for ref, x in ((m.support_x, batch.support_x), (m.target_x, batch.target_x)):
            ref.tensor(lane).copy_(x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x)
        self.loss.load(m.support_t.tensor(lane), batch.support_y)
        self.loss.load(m.target_t.tensor(lane), batch.target_y)

    def load_parameters(self) -> None:
        m = self.memory
        with torch.no_grad():
            for name, slot in self.slots.items():
                slot.arranged(m.meta[name].tensor()).copy_(slot.arrange(self.parameters[name]))
            for name, rows in self.rows.items():
                for ref, source, default in zip(
                    m.rows[name], (rows.weight, rows.bias), (1.0, 0.0), strict=True
                ):
                    stored = ref.tensor()
                    if source is None:
                        stored.fill_(default)
                    else:
                        stored.copy_(self.parameters[source].view(stored.shape))
            for name, ref in m.buffers.items():
                ref.tensor().copy_(self.buffers[name])
            self._load_rates()
            for name, pair in m.running.items():
                statistics = self.frozen[name]
                for ref, buffer in zip(pair, (statistics.mean, statistics.var), strict=True):
                    table = self.buffers[buffer].view(statistics.rows, -1)
                    for k, row in enumerate(ref.tensor()):
                        row.copy_(table[min(k, statistics.rows - 1)])

    def store_gradients(self, gradients: Gradients) -> None:
        """The means over all tasks to where the gradients lie."""
        m = self.memory
        gradients.zero()
        for name, ref in m.meta_grads.items():
            if (place := gradients.of(name)) is not None:
                slot = self.slots[name]
                slot.arrange(place).copy_(slot.arranged(ref.tensor()))
        for name, rows in self.rows.items():
            for ref, source in zip(m.row_grads[name], (rows.weight, rows.bias), strict=True):
                if source is not None and (place := gradients.of(source)) is not None:
                    place.view(ref.shape).copy_(ref.tensor())
        if (place := gradients.rates) is None or m.rate_grads is None:
            return
        if self.rates.kind == "tensor":
            place.copy_(m.rate_grads.tensor())
        else:
            for view, stored in self._elements(place, m.rate_grads.tensor()):
                torch.sum(stored, dim=1, out=view)

    def _load_rates(self) -> None:
        stored, rates = self.memory.rates.tensor(), self.rates.rates.detach()
        if self.rates.kind == "tensor":
            stored.copy_(rates)
            return
        for view, place in self._elements(rates, stored):
            place.copy_(view.unsqueeze(1))

    def _elements(self, rates: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rates by element [K, P] and those of every task [K, size], parameter by parameter in the kernels' axes."""
        parts = dict(zip(self.rates.names, rates.split(self.rates.sizes, dim=1), strict=True))
        for name, (begin, shape) in self.layout.places().items():
            slot = self.slots[name]
            part = parts[name]
            part = part.view(len(part), *slot.split).permute(0, *(1 + i for i in slot.order))
            place = stored.narrow(1, begin, shape.numel()).unflatten(1, (shape[0], *part.shape[1:]))
            yield part, place
