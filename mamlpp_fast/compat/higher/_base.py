"""The base of differentiable optimizers: takes gradients, hands them to the formula, keeps what came before."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mamlpp_fast.compat.higher._flat import Buffers, buckets
from mamlpp_fast.compat.higher._modules import FunctionalModule
from mamlpp_fast.compat.higher.utils import copy_tensor, flatten, map_nested

__all__ = ["DifferentiableOptimizer", "ElementwiseOptimizer", "Override"]

Override = Mapping[str, Sequence[Any]]
GradCallback = Callable[[list[Tensor | None]], Sequence[Tensor | None]]


class DifferentiableOptimizer(ABC):
    """An optimizer whose steps give new parameters, of which the graph leads back to the old ones.

    Args:
        other: the ``torch.optim`` optimizer whose settings and state this one starts with.
        reference_params: the parameters of the original model, in the order of fast weights and gradients.
        fmodel: the functional module whose latest fast weights are updated.
        device: where copied state goes.
        override: settings by name, each a list of one value for all parameter groups or of one for each group;
            tensors that require gradient get one from what follows.
        grad_callback: called with all gradients, in the order of ``reference_params`` (None for a parameter that
            the loss does not depend on, or that requires none); what it returns is used instead.
        track_higher_grads: False cuts the graph after each step.

    Raises:
        ValueError: when ``other`` has a parameter that is not among ``reference_params``, or a list in
            ``override`` fits neither.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        place = {id(p): i for i, p in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, dict[str, Any]]] = []
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            settings = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            self.param_groups.append({"params": [None] * len(group["params"])} | settings)
            state: defaultdict[int, dict[str, Any]] = defaultdict(dict)
            for i, p in enumerate(group["params"]):
                if id(p) not in place:
                    raise ValueError(
                        f"reference_params: expected all parameters of the optimizer, got none for one of shape "
                        f"{tuple(p.shape)}"
                    )
                if p in other.state:
                    state[i] = map_nested(
                        other.state[p],
                        lambda v: copy_tensor(v, device=device) if isinstance(v, Tensor) else v,
                    )
            self.state.append(state)
            self._group_to_param_list.append([place[id(p)] for p in group["params"]])
        if override is not None:
            self._apply_override(override)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads

    def _apply_override(self, override: Override) -> None:
        for name, values in override.items():
            for group, value in zip(
                self.param_groups, spread(name, values, len(self.param_groups)), strict=True
            ):
                group[name] = value

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One update, in place of ``zero_grad``, ``backward`` and ``step``.

        Args:
            loss: scalar.
            params: what the loss depends on and the update starts from; by default the latest fast weights of the
                functional module.
            override, grad_callback: as at construction; this ``override`` stays in force, this callback does not.

        Returns:
            The new parameters, which the functional module, if there is one, has from now on.

        Raises:
            ValueError: without parameters.
        """
        if override is not None:
            self._apply_override(override)
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
            if params is None:
                raise ValueError(
                    "params: expected the parameters to update, got none, and no module that has them"
                )
        params = list(params)
        callback = self._grad_callback if grad_callback is None else grad_callback
        all_grads = self._gradients(loss, params, everything=callback is not None)
        grads = all_grads if callback is None else callback(all_grads)

        grouped = []
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [params[i] for i in indices]
            grouped.append([grads[i] for i in indices])
        with torch.set_grad_enabled(self._track_higher_grads and torch.is_grad_enabled()):
            self._update(grouped)
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            for i, p in zip(indices, group["params"], strict=True):
                params[i] = (
                    p if self._track_higher_grads else p.detach().requires_grad_(params[i].requires_grad)
                )
        if self._fmodel is not None:
            self._fmodel.update_params(params)
        return params

    def _gradients(self, loss: Tensor, params: list[Tensor], everything: bool) -> list[Tensor | None]:
        """Gradients of all parameters that require one, or of those alone that will be updated."""
        updated = {i for indices in self._group_to_param_list for i in indices}
        wanted = [i for i, p in enumerate(params) if p.requires_grad and (everything or i in updated)]
        grads: list[Tensor | None] = [None] * len(params)
        if wanted:
            found = torch.autograd.grad(
                loss, [params[i] for i in wanted], create_graph=self._track_higher_grads, allow_unused=True
            )
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return grads

    @abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        """Replaces the entries of ``group["params"]`` by the updated ones, for each group with its gradients."""


def spread(name: str, values: Sequence[Any], groups: int) -> list[Any]:
    """A value for each parameter group, from one for all or from one for each."""
    if len(values) not in (1, groups):
        raise ValueError(
            f"override: expected 1 or {groups} values of {name!r}, one a parameter group, got {len(values)}"
        )
    return [values[0]] * groups if len(values) == 1 else list(values)


class ElementwiseOptimizer(DifferentiableOptimizer):
    """One whose formula treats each element alike, and so a whole group as one flat buffer.

    A group that has a setting with several elements is updated tensor by tensor, and the setting broadcast.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of the state that has an entry for each element; the rest is the same for all that are updated at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffers = Buffers()

    @abstractmethod
    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        """The updated p [P]; ``state`` is changed in place."""

    def at_once(
        self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """The updated parameters, where the formula is so short that joining them would take longer; else None."""
        return None

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            present = {i: g for i, g in enumerate(grads) if g is not None}
            if any(g.is_sparse for g in present.values()):
                raise RuntimeError(f"{type(self).__name__}: expected dense gradients, got a sparse one")
            if group.get("maximize"):
                present = {i: -g for i, g in present.items()}
            self._update_group(index, group, present)

    def _update_group(self, index: int, group: dict[str, Any], grads: dict[int, Tensor]) -> None:
        params = group["params"]
        states = {i: self.state[index][i] for i in grads}
        for state in states.values():
            # torch.optim keeps counts, and ASGD's scalars, as tensors.
            for name, value in state.items():
                if name not in self.buffers and isinstance(value, Tensor) and not value.requires_grad:
                    state[name] = value.item()
        new = self.at_once(group, [params[i] for i in grads], list(grads.values()))
        if new is not None:
            for i, p in zip(grads, new, strict=True):
                params[i] = p
            return
        broadcast = any(isinstance(v, Tensor) and v.numel() > 1 for v in flatten(group_settings(group)))
        for bucket in buckets(params, grads, states, self.buffers):
            if len(bucket) > 1 and not broadcast:
                self._update_flat((index, bucket[0]), bucket, group, grads, states)
                continue
            for i in bucket:
                params[i] = self.formula(group, params[i], grads[i], states[i])

    def _update_flat(
        self,
        key: tuple[int, int],
        bucket: list[int],
        group: dict[str, Any],
        grads: dict[int, Tensor],
        states: dict[int, dict[str, Any]],
    ) -> None:
        """Updates the parameters of these indices, and their state, as one buffer."""
        params = group["params"]
        own = [params[i] for i in bucket]
        p = self._buffers.join((key, "params"), own)
        g = torch.cat([grads[i].reshape(-1) for i in bucket])
        state = {
            name: self._buffers.join((key, name), [states[i][name] for i in bucket])
            if name in self.buffers
            else value
            for name, value in states[bucket[0]].items()
        }
        new = self.formula(group, p, g, state)
        for i, part in zip(bucket, self._buffers.part((key, "params"), new, own), strict=True):
            params[i] = part
        for name, value in state.items():
            per_element = name in self.buffers
            parts = self._buffers.part((key, name), value, own) if per_element else [value] * len(bucket)
            for i, part in zip(bucket, parts, strict=True):
                states[i][name] = part


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
