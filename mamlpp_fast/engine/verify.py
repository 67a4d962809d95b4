"""The fused engine's check of itself: one task of the first batch of every form, by the program and by the reference.

Both run in float64 from the same parameters, so that they agree to rounding or compute something else.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mamlpp_fast import reference
from mamlpp_fast._compiler import lean_mode
from mamlpp_fast._seeded import seeded
from mamlpp_fast.engine.base import UncheckedError, Unsupported, called_modules, first_line
from mamlpp_fast.engine.counts import unmoved
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.fused.sections import EXAMPLES
from mamlpp_fast.engine.fused.steps import Attention
from mamlpp_fast.engine.fused.transfer import Gradients
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.inputs import examples_of, mapped, tensors_of
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.nn import plain_batch_norm
from mamlpp_fast.reference import EvalStats, LossFn

if TYPE_CHECKING:
    from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
    from mamlpp_fast.engine.fused.network import Network
    from mamlpp_fast.engine.fused.prepared import Prepared

__all__ = ["check_call", "check_evaluation", "check_meta_gradient", "enough", "sample"]

TOLERANCE = 1e-6
# Tensors whose largest value is below this share of the largest of all are compared against that.
_SMALL = 1e-4
# Meta-gradients below this share of the loss are rounding where all of them are.
_NOISE = 1e-8

# Of what both draw: they draw the same numbers, in the same order.
_SEED = 0

# Values of the examples of a side that a check takes, and the fewest examples: the loop in float64 keeps every
# activation of every step, some hundred times as much.
_VALUES = 2**11
_EXAMPLES = 4
# Where a loop keeps matrices of L x S of every head, that of two examples is a fifth of a GiB a layer and step.
_LONG = 2


def enough(x: reference.Inputs, network: Network | None = None) -> int:
    """How many examples [n, ...] a check takes of a network, at most where there is none yet."""
    values = sum(t[0].numel() for t in tensors_of(x))
    long = network is not None and any(isinstance(step, Attention) for step in network.steps)
    return min(examples_of(x), max(_LONG if long else _EXAMPLES, _VALUES // max(values, 1)))


def sample(batch: EpisodeBatch, network: Network) -> EpisodeBatch:
    """The first task of a batch; of large examples some, evenly over the classes."""

    def some(x: reference.Inputs, y: Tensor) -> tuple[reference.Inputs, Tensor]:
        count = enough(mapped(lambda t: t[0], x), network)
        chosen = torch.arange(count, device=y.device) * y.shape[1] // count
        return mapped(lambda t: t[:1, chosen], x), y[:1, chosen]

    sides = (*some(batch.support_x, batch.support_y), *some(batch.target_x, batch.target_y))
    return EpisodeBatch(*sides, by_class=False)


def check_meta_gradient(
    prepared: Prepared, model: nn.Module, rates: LSLR, loss_fn: LossFn, batch: EpisodeBatch
) -> bool:
    """Compares loss, meta-gradients and running statistics of one task.

    Args:
        prepared: a program of one task in float64, which has memory.
        batch: of one task.

    Returns:
        Whether anything could be told: not where the reference's own results are not finite.

    Raises:
        Unsupported: names what differs by more than 1e-6 of its largest value, and by how much.
    """
    steps = prepared.form.steps
    weights = torch.arange(1.0, steps + 1, dtype=torch.float64, device=batch.support_y.device) / (steps + 1)
    buffers = {name: _exact(b) for name, b in model.named_buffers()}
    gradients = Gradients(model, rates, torch.float64)
    with torch.no_grad():
        prepared.memory.weights.tensor().copy_(weights)
        tensors = dict(model.named_parameters()) | buffers
        prepared.run(batch, tensors, gradients, torch.Generator().manual_seed(_SEED))
    exact = {name: _exact(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    all_rates = _exact(rates.rates)
    model.train()
    with _numbers(prepared, model), _reference(model, exact), torch.enable_grad():
        result = reference.meta_gradient(
            model,
            rates.as_dict(all_rates),
            list(batch.to(dtype=torch.float64)),
            steps=steps,
            step_weights=weights if prepared.form.multi_step else None,
            loss_fn=_exactly(loss_fn, prepared),
            second_order=prepared.form.second_order,
        )
    if not torch.isfinite(result.loss):
        return False
    _compare({"loss": result.loss}, {"loss": prepared.losses.mean()}, "is")
    expected, found = {}, {}
    for name in (n for n, p in model.named_parameters() if p.requires_grad):
        expected[name] = _or_zero(exact[name].grad, exact[name])
        found[name] = _or_zero(gradients.of(name), exact[name])
    if rates.rates.requires_grad:
        expected["the inner rates"] = _or_zero(all_rates.grad, all_rates)
        found["the inner rates"] = _or_zero(gradients.rates, all_rates)
    _compare(expected, found, "has a meta-gradient that is", _NOISE * float(result.loss.detach().abs()))
    _compare({name: exact[name] for name in buffers}, buffers, "is a buffer that becomes")
    return True


def check_evaluation(
    prepared: Prepared,
    model: nn.Module,
    rates: LSLR,
    loss_fn: LossFn,
    batch: EpisodeBatch,
    steps: int,
    stats: EvalStats,
) -> bool:
    """Compares the predictions of one task after every step; see :func:`check_meta_gradient`."""
    with torch.no_grad():
        prepared.run(batch, generator=torch.Generator().manual_seed(_SEED))
    exact = {name: _exact(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    with _numbers(prepared, model), _reference(model, exact):
        expected = reference.evaluate_task(
            model,
            rates.as_dict(_exact(rates.rates)),
            batch.to(dtype=torch.float64)[0],
            steps=steps,
            loss_fn=_exactly(loss_fn, prepared),
            eval_stats=stats,
        )
    if not torch.isfinite(expected).all():
        return False
    _compare({"output": expected}, {"output": prepared.logits[:, 0]}, "has predictions that are")
    return True


def check_call(
    net: DifferentiableNetwork, model: nn.Module, x: reference.Inputs, wanted: frozenset[str]
) -> None:
    """Compares a call as one operation, its gradients, their derivatives along a direction and running statistics.

    Args:
        net: of the model in float64.
        x: examples.
        wanted: names that the first gradients are taken by; the second are by all.

    Raises:
        Unsupported: names what differs by more than 1e-6 of its largest value, or that nothing could be told.
    """

    def waves(t: Tensor) -> Tensor:
        return torch.arange(1.0, t.numel() + 1, dtype=torch.float64, device=t.device).cos().view(t.shape)

    def derivatives(x: reference.Inputs, y: Tensor, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by = {name: held[name] for name in (*net.names, *net.inert) if name not in net.constants}
        if net.inputs:
            by["the examples"] = tensors_of(x)[0]
        whole = wanted == net.everything
        names = [n for n in by if whole or n in wanted or (n == "the examples" and EXAMPLES in wanted)]
        loss = (y * waves(y)).sum() + 0.5 * y.square().sum()
        found = torch.autograd.grad(loss, [by[n] for n in names], create_graph=True, allow_unused=True)
        first = []
        for name, g in zip(names, found, strict=True):
            if g is None:  # plain PyTorch gives none, and an operation zeros, which an optimiser may decay by
                raise Unsupported(name, "is read by the forward, but takes part in no gradient")
            first.append(g)
        along = torch.stack([(g * waves(g)).sum() for g in first]).sum()
        second = torch.autograd.grad(along, list(by.values()), allow_unused=True)
        made = {"output": y.detach()} | {n: g.detach() for n, g in zip(names, first, strict=True)}
        for (name, p), h in zip(by.items(), second, strict=True):
            made[f"{name}, second order"] = _or_zero(h, p)
        return made | {name: held[name] for name, _ in model.named_buffers()}

    results = []
    x = mapped(lambda t: t.to(torch.float64) if t.is_floating_point() else t, x)
    with torch.enable_grad():
        for ours in (False, True):
            held = {name: _exact(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
            held |= {name: t.requires_grad_() for name, t in held.items() if name in (*net.names, *net.inert)}
            given = mapped(torch.clone, x)
            tensors_of(given)[0].requires_grad_(net.inputs)
            with _reference(model, held), reference.right_second_order(model):
                y = reference.called(model, given) if not ours else None
            if ours:
                with reference.swapped(model, held):
                    y = net.call(Held(model), given)
            assert y is not None
            results.append(derivatives(given, y, held))
    expected, found = results
    buffers = {name for name, _ in model.named_buffers()}  # a statistic that is NaN stays so
    if not all(bool(torch.isfinite(t).all()) for name, t in expected.items() if name not in buffers):
        raise UncheckedError(type(model).__name__, "its results are not finite, which cannot be checked")
    _compare(expected, found, "differs, by")


class _Exact(TorchFunctionMode):
    """What a loss holds in float32 (class weights, say) is in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda a: a.double() if isinstance(a, Tensor) and a.dtype is torch.float32 else a,
            (args, dict(kwargs or {})),
        )
        return _made(func, args, kwargs)


def _exactly(loss_fn: LossFn, prepared: Prepared) -> LossFn:
    """A loss that was recorded, on predictions and labels in float64."""
    if not prepared.transfer.loss.steps:
        return loss_fn

    def exact(prediction: Tensor, labels: Tensor) -> Tensor:
        with _Exact():
            return loss_fn(prediction, labels)

    return exact


class _Wider(TorchFunctionMode):
    """What casts to float32 casts to float64: ``x.float()`` in a model of float32 is one to its own precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(
            lambda a: torch.float64 if a is torch.float32 else a, (args, dict(kwargs or {}))
        )
        return _made(func, args, kwargs)


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function returns; of none of its arguments (``torch.zeros(3)``), in float64 for the default type."""
    made = func(*args, **kwargs)
    fresh = not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs)))
    return made.double() if fresh and isinstance(made, Tensor) and made.dtype is torch.float32 else made


@contextmanager
def _reference(model: nn.Module, exact: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the model runs plain PyTorch on these tensors in float64; afterwards it is as it was.

    Raises:
        Unsupported: for a model whose forward raises in float64.
    """
    norms = [m for m in model.modules() if isinstance(m, reference.PerStepBatchNorm2d)]
    before = [m.step for m in norms]
    try:
        with unmoved(model), reference.swapped(model, exact), plain_batch_norm(model), _Wider():
            yield
    except Exception as error:
        if not any(m is model for m in called_modules(traceback.walk_tb(error.__traceback__))):
            raise  # by the loss: labels that do not fit
        why = f"its forward raises in float64, which the check of the first batch is in, {first_line(error)}"
        raise Unsupported(type(model).__name__, why) from error
    finally:
        for norm, step in zip(norms, before, strict=True):
            norm.step = step


@contextmanager
def _numbers(prepared: Prepared, model: nn.Module) -> Iterator[None]:
    """Within it the model draws what the program did; it costs a call of Python for each operator."""
    if not prepared.masks.nbytes:
        yield
        return
    of_float32 = all(p.dtype is torch.float32 for p in model.parameters())
    narrower = _Narrower() if of_float32 else nullcontext()  # type: ignore[no-untyped-call]
    with seeded(_SEED), narrower:
        yield


@lean_mode
class _Narrower(TorchDispatchMode):
    """Within it what is drawn in float64 is drawn as in float32, of which the same seed gives other numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        narrow = tree_map(_narrow, (args, kwargs))
        made = func(*narrow[0], **narrow[1])
        if func._schema.is_mutable:
            return args[0].copy_(made)
        leaves = tree_leaves((args, kwargs))
        wide = any(a is torch.float64 or (isinstance(a, Tensor) and a.dtype is torch.float64) for a in leaves)
        return made.double() if wide and isinstance(made, Tensor) else made


def _narrow(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.float64:
        return value.float()
    return torch.float32 if value is torch.float64 else value


def _exact(t: Tensor) -> Tensor:
    """A copy in float64 (integers as they are), a leaf of its own."""
    copy = t.detach().clone()
    if t.is_floating_point():
        copy = copy.to(torch.float64).requires_grad_(t.requires_grad)
    copy.__dict__.update(t.__dict__)
    return copy


def _or_zero(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, requires_grad=False) if t is None else t


def _compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, noise: float = 0.0
) -> None:
    sizes = {name: _largest(t.detach().nan_to_num(0.0, 0.0, 0.0)) for name, t in expected.items()}
    # Counts and indices are no measure of what is small.
    real = (sizes[name] for name, t in expected.items() if t.is_floating_point())
    floor = max(_SMALL * max(real, default=0.0), noise)
    for name, t in expected.items():
        same = (found[name] == t) | (found[name].isnan() & t.isnan())  # as a NaN in a running statistic stays
        difference = _largest((_number(found[name]) - _number(t.detach())).masked_fill(same, 0))
        scale = max(sizes[name], floor)
        if not difference <= TOLERANCE * scale:
            raise Unsupported(
                name, f"{what} {difference / max(scale, 1e-300):.1e} off the reference loop's in float64"
            )


def _largest(t: Tensor) -> float:
    return float(_number(t).abs().max()) if t.numel() else 0.0


def _number(t: Tensor) -> Tensor:
    """A truth value, as buffers may hold, is no number to torch."""
    return t.double() if t.dtype == torch.bool else t
