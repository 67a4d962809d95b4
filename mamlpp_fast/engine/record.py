"""Recording: the operations that a model's own forward pass executes on real tensors, watched on two levels.

A torch-function mode sees every call that Python makes (``F.conv2d``, ``Tensor.flatten``, ``x += y``) with its
arguments; it names the operations. A dispatch mode underneath sees what each of them really executes, and that nothing
executes beside them: writes, draws of random numbers and reads of values are told by the operators' own schemas.
Whatever makes a pass no fixed list of operations is found here and named, never guessed at:

- values that decide (``if x.sum() > 0``, ``.item()``), draws of random numbers that cannot be drawn beforehand, hooks,
  ``autograd.Function``;
- writes to parameters, to the input, to buffers other than a batch norm's statistics, to attributes;
- memory that is changed in place and then read by another name.

Python's own control flow (``self.training``, attributes, loops) is followed as it runs, so a recording holds for one
form of a model; :mod:`mamlpp_fast.engine.fingerprint` tells when that form changes. It is made with two numbers of
examples, which tells sizes that follow the batch from those that do not.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks

from mamlpp_fast import reference
from mamlpp_fast._seeded import OwnGenerators
from mamlpp_fast.copying import copy_of
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.counts import Count, StandIns, computes, integers, learn
from mamlpp_fast.engine.fingerprint import Fingerprint, fingerprint
from mamlpp_fast.engine.generators import handles
from mamlpp_fast.engine.named import of_library, tensors_named
from mamlpp_fast.engine.operation import Operation
from mamlpp_fast.engine.recorder import Recorder, as_fast_weight
from mamlpp_fast.engine.shared import NOTHING, Shared, held, in_memory_of, shared, with_a_graph
from mamlpp_fast.engine.undone import undone
from mamlpp_fast.inputs import examples_of, joined, structure_of, tensors_of

_Module = TypeVar("_Module", bound=nn.Module)

__all__ = ["Recording", "head_names", "hooks", "of_a_thread", "record", "record_loss"]


@dataclass(frozen=True)
class Recording:
    """A forward pass.

    Attributes:
        inputs: how many of the values, the first ones, it is given.
        operations: in order, for the first of the two numbers of examples.
        others: the same for the second: arguments and sizes may follow the number.
        examples: the two numbers.
        output: the value returned.
        shapes: of the values, without the first axis, where that is the examples' and the others do not follow
            their number; others are not in it.
        dtypes: of the values.
        counted: names of the buffers that count batches, as often as they were counted up.
        asked: truth values of one element that the pass asked for, and the answers that it goes on from.
        asks_gradients: whether the forward asks which tensors take a gradient.
        counts: that modules keep of their calls, which nothing is computed from.
    """

    inputs: int
    operations: tuple[Operation, ...]
    others: tuple[Operation, ...]
    examples: tuple[int, int]
    output: int
    shapes: dict[int, tuple[int, ...]]
    dtypes: dict[int, torch.dtype]
    counted: tuple[str, ...]
    asked: tuple[tuple[int, bool], ...] = ()
    asks_gradients: bool = False
    counts: tuple[Count, ...] = ()

    @property
    def draws(self) -> str | None:
        """The first operation that draws random numbers, for a refusal; None where none does."""
        return next((f"{op.name} draws random numbers" for op in self.operations if op.draws), None)


def record(
    model: nn.Module,
    x: reference.Inputs,
    other: reference.Inputs,
    *,
    fixed: bool = False,
    original: nn.Module | None = None,
) -> Recording:
    """Records ``model`` in the mode (training or evaluation) that it is in, on copies; random states stay as they are.

    Args:
        model: any module.
        x: what it is called with, examples [n, ...].
        other: the same for m examples, m not n.
        fixed: whether there are never but n of them: the forward need not take m.
        original: the model, where ``model`` is a copy of it.

    Raises:
        Unsupported: names the module, and what makes its forward no fixed list of operations.
    """
    if (hook := hooks(model)) is not None:
        raise hook
    original = model if original is None else original
    if (why := fingerprint(original).unfollowed()) is not None:
        raise Unsupported(type(model).__name__, why)
    for place, t in (*original.named_parameters(), *original.named_buffers()):
        if t.layout is not torch.strided:
            raise Unsupported(place, f"is a tensor of {t.layout}")
    if (name := with_a_graph(original)) is not None:
        raise Unsupported(type(model).__name__, f"the attribute {name} was computed with a gradient")
    places = shared(original)

    def watched(examples: reference.Inputs, gradient: bool = True) -> Recorder:
        own = _own_copy(model)
        before = integers(own)
        recorder = _watched(own, examples, gradient=gradient, places=places)
        if recorder.problem is None:
            return recorder
        if learn(own, before):
            return watched(examples, gradient)
        if StandIns(own):
            plain = _watched(_own_copy(model), examples, gradient=gradient, places=places, counting=False)
            if plain.problem is None or plain.problem.why == _CHANGED:  # the stand-ins are it
                computes(own)
                plain.problem = Unsupported(type(model).__name__, _COMPUTES)
            return plain
        return recorder

    first, second = watched(x), watched(other)
    if fixed and first.problem is None and second.problem is not None:
        other = x
        second = watched(other)
    # An evaluation's target passes take no gradient, which a forward may ask about.
    third = second if model.training else watched(other, gradient=False)
    for recorder in (first, second, third):
        if recorder.problem is not None:
            raise recorder.problem
    if _calls(third) != _calls(second):
        raise Unsupported(type(model).__name__, "executes other operations where no gradient is taken")
    if not first.counts == second.counts == third.counts:
        raise Unsupported(type(model).__name__, "counts otherwise for another number of examples")
    drawing = any(op.draws for op in second.operations)
    if drawing and handles(lambda: _watched(_own_copy(model), other, places=places)):
        raise Unsupported(type(model).__name__, "seeds a random generator, or asks for its state")
    _told_by_objects(model, original, other, places, second)
    given = tensors_of(x)
    shapes = {i: tuple(t.shape[1:]) for i, t in enumerate(given)}
    dtypes = {i: t.dtype for i, t in enumerate(given)}
    examples = examples_of(x), examples_of(other)
    if len(first.operations) != len(second.operations):
        raise Unsupported(type(model).__name__, "executes other operations for another number of examples")
    for a, b in zip(first.operations, second.operations, strict=True):
        # By `!=`: the getter of an attribute is another object each time.
        same = a.function == b.function and a.outputs == b.outputs and a.constant == b.constant
        if not same or len(a.draws) != len(b.draws):
            raise Unsupported(a.where or type(model).__name__, f"{a.name}: depends on the number of examples")
        for index, (shape, dtype), (shape_b, _) in zip(a.outputs, a.tensors, b.tensors, strict=True):
            dtypes[index] = dtype
            if (*shape[:1], *shape_b[:1]) == examples and shape[1:] == shape_b[1:]:
                shapes[index] = shape[1:]
    assert first.result is not None
    return Recording(
        len(given),
        tuple(first.operations),
        tuple(second.operations),
        examples,
        first.result,
        shapes,
        dtypes,
        tuple(first.counted),
        asks_gradients=first.asks_gradients,
        counts=first.counts,
    )


def _calls(recorder: Recorder) -> list[tuple[Any, ...]]:
    # A norm's settings say how many rows it has, of which a copy may keep one.
    return [
        (op.function, op.args, None if op.function is reference.per_step_norm else op.kwargs, op.draws)
        for op in recorder.operations
    ]


def _told_by_objects(
    model: nn.Module, original: nn.Module, x: reference.Inputs, places: Shared, known: Recorder
) -> None:
    """Refuses a forward that asks which objects it is given, and not only what is in them.

    An inner loop's first pass has the model's own parameters as a rule, its others have plain tensors without
    attributes; what is recorded has to hold for both, and for the model as for its copies.
    """
    kinds: set[Any] = {type(m) for m in model.modules()}
    if all(map(of_library, kinds)):
        return
    passes = [_watched(original, x, places=places, stand_in=lambda p: p)]
    if not all(isinstance(p, nn.Parameter) for p in nn.Module.parameters(original)):
        passes.append(_watched(_own_copy(model), x, places=places, stand_in=_as_parameter))
    for recorder in passes:
        if recorder.problem is not None:
            raise recorder.problem
        if _calls(recorder) != _calls(known):
            raise Unsupported(
                type(model).__name__,
                "asks which objects it is given: whether a weight is an nn.Parameter, say, its attributes, or whether "
                "the model is a copy",
            )


def _as_parameter(p: Tensor) -> Tensor:
    return nn.Parameter(p.detach(), p.requires_grad)


_LOSS = "the loss"
_CHANGED = "its forward changes attributes of the model"
_COMPUTES = "computes with a count of its calls"


class _Watched(nn.Module):
    """A loss as a module, with the tensors that functions close over or name as attributes."""

    def __init__(self, loss_fn: reference.LossFn) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self.function = None if isinstance(loss_fn, nn.Module) else loss_fn
        if isinstance(loss_fn, nn.Module):
            self.add_module(_LOSS, loss_fn)  # no name that a model's buffer has

    def _loss(self) -> Any:
        return self._modules[_LOSS] if self.function is None else self.function

    def hold(self) -> None:
        loss = self._loss()
        self.held = tensors_named(loss.forward if isinstance(loss, nn.Module) else loss)

    def forward(self, prediction: Tensor, labels: Tensor) -> Any:
        return self._loss()(prediction, labels)


def record_loss(
    loss_fn: reference.LossFn, support: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], model: nn.Module
) -> tuple[Recording, nn.Module]:
    """Records a loss on the predictions and labels of both sides: values 0 and 1.

    Args:
        loss_fn: a function, a ``functools.partial`` of one, or a module without parameters.
        support, target: predictions [N, O] and labels [N, ...].
        model: what the predictions are of; a loss that reads its memory is none of predictions and labels.

    Returns:
        The recording, and the module that it is of, whose buffers are the loss's own. What ``torch.distributions``
        asks of its arguments is in ``asked``.

    Raises:
        Unsupported: names what makes it no fixed list of operations, or no scalar.
    """
    if (why := _unfollowed(loss_fn)) is not None:
        raise Unsupported("loss", why)
    module = _Watched(loss_fn)
    if (hook := hooks(module)) is not None:
        raise hook
    if (why := fingerprint(module).unfollowed()) is not None:
        raise Unsupported("loss", why)
    probe = _Watched(loss_fn)
    probe.hold()
    if (name := in_memory_of(model, held(probe))) is not None:
        raise Unsupported("loss", f"reads the memory of the model's {name}")
    found = []
    for given in (support, target):
        own = _own_copy(module)
        own.hold()
        found.append(_watched(own, given, answers=True))
    for recorder in found:
        if recorder.problem is not None:
            raise recorder.problem
        if recorder.counts:
            raise Unsupported("loss", _CHANGED)
    first, second = (recorder.operations for recorder in found)
    asked = found[0].asked
    if [(a.function, a.outputs) for a in first] != [(b.function, b.outputs) for b in second] or (
        asked != found[1].asked
    ):
        raise Unsupported("loss", "executes other operations for another number of examples")
    dtypes: dict[int, torch.dtype] = {0: support[0].dtype, 1: support[1].dtype}
    for op in first:
        if op.draws:
            raise Unsupported("loss", f"{op.name} draws random numbers")
        dtypes |= {i: dtype for i, (_, dtype) in zip(op.outputs, op.tensors, strict=True)}
    result = found[0].result
    assert result is not None
    shape, dtype = next(t for op in first for i, t in zip(op.outputs, op.tensors, strict=True) if i == result)
    if shape != () or dtype != support[0].dtype:
        raise Unsupported("loss", f"expected a scalar of {support[0].dtype}, got {list(shape)} of {dtype}")
    sizes = len(support[0]), len(target[0])
    return Recording(2, tuple(first), tuple(second), sizes, result, {}, dtypes, (), tuple(asked)), module


def of_a_thread(loss_fn: reference.LossFn) -> bool:
    """Whether a loss reads what each thread has its own of (``threading.local``)."""
    return fingerprint(_Watched(loss_fn)).of_a_thread


def _unfollowed(loss_fn: reference.LossFn) -> str | None:
    """Why changes of a loss between calls could go unseen; None where they are followed."""
    if isinstance(loss_fn, functools.partial):
        return _unfollowed(loss_fn.func)
    if isinstance(loss_fn, nn.Module):
        return "has parameters" if any(True for _ in loss_fn.parameters()) else None
    if isinstance(loss_fn, (types.FunctionType, types.BuiltinFunctionType)):
        return None
    return f"expected a function, a partial of one or a module, got an object of {type(loss_fn).__name__}"


def head_names(model: nn.Module, x: reference.Inputs, adapt_norm: bool = False) -> tuple[str, ...]:
    """Names of the parameters of the last module whose output reaches the model's (ANIL's head), by a recording.

    A module is what owns parameters; those that reparametrise its weights belong to it. Norms count with
    ``adapt_norm`` alone.

    Args:
        model: any module.
        x: what it is called with, examples [n, ...].

    Raises:
        ValueError: when no module with trainable parameters is found.
    """
    try:
        recorder = _watched(copy_of(model), x)
    except ValueError:
        recorder = _watched(model, x)
    owners = {name: _owner(name) for name, p in model.named_parameters() if p.requires_grad}
    for names in recorder.layers():
        found = {owners[n] for n in names if n in owners}
        if not adapt_norm:
            found = {o for o in found if not isinstance(model.get_submodule(o), reference.NORMS)}
        if found:
            return tuple(name for name, owner in owners.items() if owner in found)
    raise ValueError("adapt: expected a last module with parameters that reach the output, found none")


def _owner(name: str) -> str:
    path = name.rpartition(".")[0]
    head, cut, _ = f".{path}".partition(".parametrizations.")
    if not cut and path.startswith("parametrizations."):
        return ""
    return head[1:] if cut else path


def _own_copy(model: _Module) -> _Module:
    """What a pass does to the model besides computing, it does to a copy."""
    try:
        return copy_of(model)
    except ValueError as error:
        raise Unsupported(type(model).__name__, str(error).removeprefix("model: ")) from error


def _watched(
    model: nn.Module,
    inputs: reference.Inputs,
    gradient: bool = True,
    places: Shared = NOTHING,
    answers: bool = False,
    stand_in: Callable[[Tensor], Tensor] = as_fast_weight,
    counting: bool = True,
) -> Recorder:
    """Runs one pass under both modes, on stand-ins for the model's tensors, and where ``counting`` for its counts."""
    recorder = Recorder(model, tensors_of(inputs), places, answers, stand_in)
    before = fingerprint(model)
    with undone(model, before.functions):
        _pass(recorder, model, inputs, gradient, counting, before)
    return recorder


def _pass(
    recorder: Recorder,
    model: nn.Module,
    inputs: reference.Inputs,
    gradient: bool,
    counting: bool,
    before: Fingerprint,
) -> None:
    states = before.states()
    counts = StandIns(model) if counting else contextlib.nullcontext()
    with _random_state() as drawn:
        try:
            with (
                reference.swapped(model, recorder.stand_ins),
                torch.set_grad_enabled(gradient),
                OwnGenerators(),
                counts,
                recorder.watch,
                recorder,
            ):
                result = reference.called(model, joined(recorder.inputs, structure_of(inputs)))
                held = dict(model.named_parameters()) | dict(model.named_buffers())
            recorder.finish(result)
            for name, t in recorder.stand_ins.items():
                if held.get(name) is not t:
                    recorder.complain(name, "is replaced in the forward")
        except Exception as error:  # whatever a user's forward raises
            recorder.raised(error)
    if drawn():
        recorder.complain(type(model).__name__, "draws random numbers")
    if recorder.problem is None and (fingerprint(model) != before or before.states() != states):
        recorder.complain(type(model).__name__, _CHANGED)
    if isinstance(counts, StandIns):
        recorder.counts = counts.counts
        if counts.used:
            recorder.complain(type(model).__name__, _COMPUTES)


@contextmanager
def _random_state() -> Iterator[Callable[[], bool]]:
    """Puts the random states of Python and NumPy back; yields whether they moved."""
    own, arrays = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - a user's forward may draw from it
    moved: list[bool] = []
    try:
        yield lambda: moved[0]
    finally:
        now = np.random.get_state(legacy=False)  # noqa: NPY002
        moved.append(random.getstate() != own or not _equal_states(now["state"], arrays["state"]))
        if moved[0]:
            random.setstate(own)
            np.random.set_state(arrays)  # noqa: NPY002


def _equal_states(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a)


def hooks(model: nn.Module) -> Unsupported | None:
    """What has effects of its own in every pass, which a program that runs no Python would leave out."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    for kind in kinds:
        if getattr(_global_hooks, f"_global_{kind}_hooks"):
            return Unsupported("torch.nn", f"has a global {kind} hook on all modules")
    for name, module in model.named_modules():
        for kind in kinds:
            if getattr(module, f"_{kind}_hooks"):
                return Unsupported(name or type(model).__name__, f"has a {kind.replace('_', '-')} hook")
        if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            return Unsupported(name or type(model).__name__, "is compiled")
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return Unsupported(name, "has a hook on its gradient")
    return None
