"""Adam for a learner: made, followed through changes of the model, put into the layout of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from mamlpp_fast._compiler import lean
from mamlpp_fast.config import MAMLConfig

__all__ = [
    "LeanAdam",
    "Resting",
    "align",
    "follow",
    "load",
    "make_adam",
    "set_learning_rate",
    "start",
    "state",
    "trainable",
]

# Adam's state of parameters that are frozen, until they are thawed: by identity, the parameter along with it.
Resting = dict[int, tuple[Tensor, dict[str, Any]]]
# What of a parameter group is about the machine, not about the method.
_OWN = ("fused", "capturable", "foreach")


class LeanAdam(Adam):
    """PyTorch's Adam, which leaves the compiler unloaded."""

    add_param_group = lean(Adam.add_param_group)
    load_state_dict = lean(Adam.load_state_dict)
    state_dict = lean(Adam.state_dict)
    zero_grad = lean(Adam.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See ``torch.optim.Adam``."""
        # PyTorch puts a step's hooks around each class's: around this one, so not around the one within as well.
        return inspect.unwrap(Adam.step)(self, closure)


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that Adam updates, in the order in which its state dict numbers them."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def make_adam(parameters: Sequence[nn.Parameter], config: MAMLConfig, device: torch.device) -> LeanAdam:
    """Adam as ``config`` asks."""
    on_gpu = device.type == "cuda"
    # A tensor learning rate lets the schedule change it inside a captured graph.
    lr = torch.tensor(config.meta_lr, device=device) if on_gpu else config.meta_lr
    fused = not any(p.is_complex() for p in parameters)  # PyTorch's takes none
    return LeanAdam(parameters, lr=lr, betas=config.adam_betas, fused=fused, capturable=on_gpu)


def follow(
    optimizer: Optimizer, before: Iterable[Tensor], now: Sequence[nn.Parameter], resting: Resting
) -> None:
    """Goes over to other parameters: state stays with a parameter, also while it is frozen; a new one starts afresh.

    Args:
        optimizer: changed in place.
        before: the parameters that it has been updating.
        now: those that it is to update. What it holds beside ``before`` is another's and stays.
        resting: state of frozen parameters, changed in place.
    """
    order = {id(p): i for i, p in enumerate(now)}
    gone = {id(p): p for p in before if id(p) not in order}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]
    for key, p in gone.items():
        state = optimizer.state.pop(p, None)
        if state and not p.requires_grad:
            resting[key] = (p, state)
        p.grad = None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in now:
        if id(p) in held:
            continue
        optimizer.param_groups[0]["params"].append(p)
        if id(p) in resting:
            optimizer.state[p] = resting.pop(id(p))[1]
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda p: order.get(id(p), len(order)))


def load(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a copy: PyTorch's would share Adam's moments with whoever the state is of.

    How the optimizer runs stays its own: PyTorch's would take that over as well, so that on a GPU what a CPU saved is
    not capturable, with a learning rate that a captured graph cannot follow.
    """
    own = [{name: g[name] for name in _OWN if name in g} for g in optimizer.param_groups]
    rates = [g["lr"] for g in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, kept, rate in zip(optimizer.param_groups, own, rates, strict=True):
        loaded = float(group["lr"])
        group |= kept
        group["lr"] = rate.fill_(loaded) if isinstance(rate, Tensor) else loaded
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                moments[name] = value.clone()


def align(optimizer: Optimizer) -> None:
    """Gives gradients and moments the strides of their parameters.

    PyTorch's fused Adam goes through the memory of all four side by side, whatever their strides.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            strides = p.stride()
            if p.grad.stride() != strides:
                p.grad = torch.empty_like(p).copy_(p.grad)
            state: dict[str, Tensor] = optimizer.state.get(p, {})
            for name, moment in state.items():
                if moment.shape == p.shape and moment.stride() != strides:
                    state[name] = torch.empty_like(p).copy_(moment)


def start(optimizer: Optimizer) -> None:
    """Gives Adam the state that its first step would, so that it exists before a capture."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }


def state(optimizer: Optimizer, *modules: nn.Module) -> Iterator[Tensor]:
    """Every tensor that an update changes, but for gradients."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
    for moments in optimizer.state.values():
        yield from (value for value in moments.values() if isinstance(value, Tensor))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets it in place where it is a tensor, as captured graphs need."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
