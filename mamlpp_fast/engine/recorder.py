"""The two modes that watch a forward pass; see :mod:`mamlpp_fast.engine.record`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mamlpp_fast import reference
from mamlpp_fast.engine.base import Unsupported, called_modules, first_line
from mamlpp_fast.engine.counts import Count
from mamlpp_fast.engine.executions import Draw, Executions
from mamlpp_fast.engine.operation import Buffer, Constant, Operation, Parameter, Value, is_reference, name_of
from mamlpp_fast.engine.questions import OF_A_CALL, asked_by_own_code
from mamlpp_fast.engine.shared import NOTHING, Shared, held
from mamlpp_fast.nn import PerStepBatchNorm2d

__all__ = ["Recorder", "as_fast_weight"]


def as_fast_weight(p: Tensor) -> Tensor:
    """What an inner loop has in a parameter's place: no ``nn.Parameter``, and without attributes of its own."""
    return p.detach().requires_grad_(p.requires_grad)


class Recorder(TorchFunctionMode):
    """The mode above, with what it found.

    Args:
        model: called with stand-ins for its tensors.
        inputs: the first values; whether one requires a gradient tells what of it is made a constant (``detach``,
            ``no_grad``).
        shared: of the model that this one is a copy of.
        stand_in: makes what a parameter is called as.
        answers: whether what ``torch.distributions`` (and ``F.gaussian_nll_loss``) asks of its arguments goes to
            ``asked``, values and the answers that they gave; else that is a problem like all questions that decide.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        shared: Shared = NOTHING,
        answers: bool = False,
        stand_in: Callable[[Tensor], Tensor] = as_fast_weight,
    ) -> None:
        super().__init__()
        self.root = type(model).__name__
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.watch = Executions()
        self.problem: Unsupported | None = None
        self.asked: list[tuple[int, bool]] = []
        self._answers = answers
        self.operations: list[Operation] = []
        self.result: int | None = None
        self.stand_ins: dict[str, Tensor] = {}
        self.inputs = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)
            for t in inputs
        ]
        self._references: dict[int, Value | Parameter | Buffer | Constant] = {}
        self._memory: dict[int, set[int]] = {}
        self._stale: set[int] = set()
        self._read_constants: set[int] = set()
        self._overwritten: set[int] = set()
        self._in_graph: dict[int, bool] = {}
        self._alive: list[Tensor] = []
        self._from: dict[int, tuple[bool, frozenset[str]]] = {}
        self._count = 0
        for name, p in model.named_parameters():
            self.stand_ins[name] = stand_in(p)
            self._references[id(self.stand_ins[name])] = Parameter(name)
        for name, b in model.named_buffers():
            self.stand_ins[name] = b.detach().clone()
            self.stand_ins[name].__dict__.update(b.__dict__)
            self._references[id(self.stand_ins[name])] = Buffer(name)
        self._fixed = {_storage(t): name for name, t in self.stand_ins.items()}
        self._shared, self._aliases = shared, dict[int, str]()
        for i, t in enumerate(held(model)):
            if id(t) in self._references:  # its own stand-in
                continue
            if not t.requires_grad:
                self._references[id(t)] = Constant(t)
                self._fixed.setdefault(_storage(t), "an attribute")
            if i in shared.held:
                self._aliases[id(t)] = shared.held[i]
        self._attributes = {name: _identities(t) for name, t in self.stand_ins.items()}
        self._buffers = {name: self.stand_ins[name].clone() for name, _ in model.named_buffers()}
        self._statistics: set[str] = set()
        self.counted: list[str] = []
        self.counts: tuple[Count, ...] = ()
        self.asks_gradients = False
        for t in self.inputs:
            self._new(t, [])

    # What was found

    def complain(self, where: str, why: str) -> None:
        """Keeps the first reason why the pass is no fixed list of operations; the pass itself goes on."""
        if self.problem is None:
            self.problem = Unsupported(where or self.root, why)

    def here(self) -> str:
        """Path of the innermost module that is being called."""
        innermost = next(called_modules(traceback.walk_stack(sys._getframe(1))), None)
        path: str = self.paths.get(id(innermost), "")
        return path

    def raised(self, error: Exception) -> None:
        """Takes in that the forward raised, which another number of examples, or another engine, may not."""
        where = ""
        for module in called_modules(traceback.walk_tb(error.__traceback__)):
            where = self.paths.get(id(module), where)
        self.complain(where, f"its forward raises, {first_line(error)}")

    def finish(self, result: Any) -> None:
        """Looks, after the pass and outside the modes, at what it left and returned."""
        self._nothing_beside()
        for name, given in self._attributes.items():
            if _identities(self.stand_ins[name]) != given:
                self.complain(name, "is given attributes by the forward")
        if any(t.__dict__ for t in (*self.inputs, result) if isinstance(t, Tensor)):
            self.complain(self.root, "gives attributes to its input, or to its result")
        for name, before in self._buffers.items():
            if torch.equal(before, self.stand_ins[name]):
                continue
            if name not in self._statistics:
                self.complain(name, "is a buffer that the forward changes")
                continue
            # Passes side by side take them in when all are done.
            calls = self._readers(name)
            if any(op.function not in _NORMS for op in calls):
                self.complain(name, "is a running statistic that more than its norm reads")
            elif len(calls) > 1:
                self.complain(name.rpartition(".")[0], f"{name} is used more than once in a pass")
        known = self._known(result) if isinstance(result, Tensor) else None
        if not isinstance(known, Value) or known.index < len(self.inputs):
            self.complain(self.root, "expected forward to return one tensor of predictions made of its input")
        else:
            self._check_read(result, known)
            self.result = known.index

    def _readers(self, statistic: str) -> list[Operation]:
        """The operations that read the memory of a running statistic."""
        names = {statistic, *self._shared.beside.get(statistic, ())}
        return [op for op in self.operations if any(getattr(r, "name", None) in names for r in op.inputs())]

    def layers(self) -> Iterator[frozenset[str]]:
        """Parameters that meet an activation in one operation, from the last operation that reaches the output back."""
        reached = set() if self.result is None else {self.result}
        for op in reversed(self.operations):
            if op.output is None or (reached and op.output not in reached):
                continue
            names: frozenset[str] = frozenset()
            active = False
            for r in op.inputs():
                if isinstance(r, Parameter):
                    names |= {r.name}
                elif isinstance(r, Value):
                    reached.add(r.index)
                    on_input, made_of = self._from[r.index]
                    active |= on_input
                    names |= frozenset() if on_input else made_of
            if active and names:
                yield names

    # The two modes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        watch = self.watch
        self._nothing_beside()
        if func is F.gaussian_nll_loss and self._answers:
            self._looks_at_variances(*args, **kwargs)
        norm = func is reference.per_step_norm
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        references = {id(t): self._read(t) for t in given}
        if norm:
            given += [t for t in (args[0].weight, args[0].bias) if t is not None]
        if norm and type(args[0]).normalise not in _KNOWN_NORMS:
            self.complain(self.here(), f"{type(args[0]).__name__} normalises in a way of its own")
        recorded = self._norm(*args) if norm else None
        before = self._copies(references)
        kept = self._kept(func, given)
        result = func(*args, **kwargs)
        executed, written, reads, drawn = watch.executed, watch.written, watch.reads, tuple(watch.drawn)
        references |= {
            i: c for i, c in before.items() if _storage(references[i].tensor) in map(_storage, written)
        }
        if recorded is None:
            recorded = tree_map(lambda t: references.get(id(t), t), (args, kwargs))
        noise = bool(drawn) and self._noise(func, given, result, drawn)
        # Of what is drawn otherwise, or for nothing that depends on the input, each pass would get the same numbers.
        fixed = func not in _DROPOUTS or _all_constant(references.values())
        draws = watch.draws or (drawn and fixed and not noise)
        if noise:
            recorded = (), {}
        written = [*written, *(t for t, value in kept if not torch.equal(t, value))]
        watch.clear()
        name = name_of(func)
        for known in (self._aliases[id(t)] for t in given if executed and id(t) in self._aliases):
            self.complain(self.here(), f"{name} reads the memory of {known} under another name")
        if draws:
            self.complain(self.here(), f"{name} draws random numbers")
        # Only for what they raise.
        reads &= not (func is F.one_hot and _classes(args, kwargs) >= 0)
        reads &= not (func is F.gaussian_nll_loss and self._answers)
        if (reads or name in _ASKS) and not _all_constant(references.values()):
            known = next(iter(references.values()))
            if self._answers and name == "__bool__" and isinstance(known, Value) and _for_what_is_raised():
                self.asked.append((known.index, result))
                return result
            self.complain(self.here(), f"{name} asks for values, which decide what is executed")
        if name.endswith("__set__") or name in _CHANGES:
            self.complain(self.here(), f"{name} changes how a tensor takes part in gradients")
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self.complain(self.here(), "runs under hooks on saved tensors (a checkpoint, say)")
        if torch.is_autocast_enabled(self.inputs[0].device.type):
            self.complain(self.here(), "computes under torch.autocast")
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not executed and not written and all(self._known(t) is not None for t in made):
            if name in OF_A_CALL and not _all_constant(references.values()) and asked_by_own_code():
                self._asked(name)
            return result  # a question about a tensor, or the tensor itself
        if func in _NORMS:
            self._statistics.update(r.name for r in tree_leaves(recorded) if isinstance(r, Buffer))
        elif self._counts(func, recorded):
            return result
        self._write(written, name, not noise and _all_constant(references.values()))
        self._keep(func, recorded, result, made, given, args, drawn)
        return result

    def _noise(self, func: Any, given: Sequence[Tensor], result: Any, drawn: Sequence[Draw]) -> bool:
        """Whether a call's result is nothing but what it draws, whatever is in the tensors that it is given."""
        if func not in _NOISE or len(drawn) != 1 or not isinstance(result, Tensor):
            return False
        draw = drawn[0]
        whole = (tuple(result.shape), tuple(result.stride())) == (draw.shape, draw.strides) and draw.dense
        if draw.by_values:
            whole &= all(isinstance(self._known(t), Constant) for t in given)
        # A gradient of what is overwritten, or gives the form, is zero, which is another thing than none.
        return whole and not result.requires_grad

    def _looks_at_variances(self, input: Any, target: Any, var: Any, *_: Any, **__: Any) -> None:
        """Records the question that ``F.gaussian_nll_loss`` begins with: it raises where a variance is negative."""
        if isinstance(var, Tensor):
            with self:
                bool(torch.any(var < 0))

    def _asked(self, name: str) -> None:
        """Takes in a question whose answer may be another for tensors of the same shapes and types."""
        if name == "requires_grad":
            self.asks_gradients = True
        else:
            self.complain(self.here(), f"asks a tensor for its {name}, which may differ from call to call")

    def _nothing_beside(self) -> None:
        if self.watch.executed:
            self.complain(
                self.here(), f"{self.watch.executed[0]} is executed behind torch's Python functions"
            )
        self.watch.clear()

    # Tensors

    def _known(self, t: Tensor) -> Value | Parameter | Buffer | Constant | None:
        return self._references.get(id(t))

    def _read(self, t: Tensor) -> Any:
        """What a tensor that is read stands for."""
        known = self._known(t)
        if known is None:
            self.complain(
                self.here(),
                "uses a tensor that is neither its input, a parameter nor a buffer, nor made from them by torch's "
                "functions",
            )
            return "another tensor"
        if isinstance(known, Value):
            self._check_read(t, known)
        elif isinstance(known, Constant) and _storage(t) in self._overwritten:
            self.complain(self.here(), _STALE)
        return known

    def _copies(self, references: Mapping[int, Any]) -> dict[int, Constant]:
        """The constants of the forward's own among what a call reads, as they are before it may write to them."""
        if _all_constant(references.values()):
            return {}
        found = {i: r for i, r in references.items() if isinstance(r, Constant)}
        copies = {i: Constant(r.tensor.clone()) for i, r in found.items() if self._own(_storage(r.tensor))}
        self.watch.clear()
        return copies

    def _kept(self, func: Any, given: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What may be running statistics of a norm and are no buffers, with their values before it writes to them."""
        if func not in _WRITERS:
            return []
        others = [
            t for t in given if isinstance(self._known(t), (Parameter, Constant)) and not t.requires_grad
        ]
        kept = [(t, t.clone()) for t in others]
        self.watch.clear()
        return kept

    def _own(self, place: int) -> bool:
        """Whether memory is of constants of the forward's own that no operation has read."""
        return self._fixed.get(place) == _OWN and place not in self._read_constants

    def _check_read(self, t: Tensor, known: Value) -> None:
        if known.index in self._stale:
            self.complain(self.here(), _STALE)
        if t.requires_grad != self._in_graph[known.index] or t.is_inference():
            self.complain(self.here(), "passes through an autograd.Function or another change of the graph")

    def _next(self) -> int:
        """The number of a value, which has no name yet."""
        self._count += 1
        return self._count - 1

    def _new(self, t: Tensor, made_of: Sequence[Any]) -> int:
        index = self._next()
        self._references[id(t)] = Value(index)
        self._alive.append(t)
        self._in_graph[index] = t.requires_grad
        self._memory.setdefault(_storage(t), set()).add(index)
        on_input, names = index < len(self.inputs), frozenset[str]()
        for r in made_of:
            if isinstance(r, Parameter):
                names |= {r.name}
            elif isinstance(r, Buffer):
                on_input = True
            elif isinstance(r, Value):
                on_input |= self._from[r.index][0]
                names |= self._from[r.index][1]
        self._from[index] = (on_input, names)
        return index

    def _write(self, written: list[Tensor], name: str, constant: bool) -> None:
        """Values whose memory is overwritten may be read no more by the names they had.

        Constants of the forward's own may be made in several calls, until an operation has read them. What an
        activation is written into (``zeros(n, 5).index_add_(1, i, x)``) is one from then on.
        """
        for t in written:
            place = _storage(t)
            if self._own(place):
                if constant:
                    continue
                del self._fixed[place]
                self._overwritten.add(place)
            if place in self._fixed and self._fixed[place] not in self._statistics:
                self.complain(self._fixed[place], f"is changed in place by {name}")
            if t.requires_grad and not torch.is_grad_enabled():
                self.complain(
                    self.here(), f"{name} changes an activation in place where no gradient is taken"
                )
            if place in map(_storage, self.inputs):
                self.complain(self.here(), f"{name} changes the network's input in place")
            self._stale |= self._memory.get(place, set())

    def _keep(
        self,
        func: Any,
        recorded: Any,
        result: Any,
        made: list[Tensor],
        given: list[Tensor],
        args: Any,
        drawn: tuple[Draw, ...],
    ) -> None:
        args_, kwargs_ = recorded
        in_graph = any(t.requires_grad for t in given)
        references = [r for r in tree_leaves(recorded) if is_reference(r)]
        # Of a tensor that makes another out of plain numbers only the type counts.
        constant = _all_constant(references) and not drawn
        if constant or (func is Tensor.new_tensor and len(references) == 1):
            for t in made:
                self._references[id(t)] = Constant(t)
                self._fixed.setdefault(_storage(t), _OWN)
                self._alive.append(t)
            return
        self._read_constants |= {_storage(r.tensor) for r in references if isinstance(r, Constant)}
        target = result if isinstance(result, Tensor) else None
        if target is None and result is None and args and isinstance(args[0], Tensor):
            target = args[0]  # ``x[0] = 1`` leaves its result in x
        if target is None:
            new = [t for t in made if self._known(t) is None]
            constant = in_graph and not any(t.requires_grad for t in new)
            # A tensor that is returned twice, or is an argument (`broadcast_tensors`), keeps the name that it has.
            outputs = tuple(
                self._new(t, references) if self._known(t) is None else self._next() for t in made
            )
            tensors = tuple((tuple(t.shape), t.dtype) for t in made)
            op = Operation(func, self.here(), args_, kwargs_, outputs, tensors, constant, drawn)
        elif (
            isinstance(result, Tensor) and func in _DETACHES and isinstance(first := references[0], Parameter)
        ):
            self._references[id(result)] = Parameter(first.name, detached=True)
            self._alive.append(result)
            return
        else:
            constant = in_graph and not target.requires_grad and torch.is_floating_point(target)
            output = self._new(target, references)
            tensors = ((tuple(target.shape), target.dtype),)
            op = Operation(func, self.here(), args_, kwargs_, (output,), tensors, constant, drawn)
        self.operations.append(op)

    def _norm(
        self, module: reference.PerStepBatchNorm2d, x: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A per-step batch norm: its tensors by name, its settings as they are."""
        tensors = {
            name: None if t is None else self._known(t)
            for name, t in (
                ("weight", module.weight),
                ("bias", module.bias),
                ("running_mean", module.running_mean),
                ("running_var", module.running_var),
            )
        }
        settings = ("eps", "momentum", "num_steps", "per_step_affine", "per_step_stats", "negative_slope")
        return (self._known(x),), {
            **tensors,
            **{name: getattr(module, name) for name in settings},
            "training": module.training,
        }

    def _counts(self, func: Any, recorded: Any) -> bool:
        """Whether this is a batch norm of PyTorch's counting its batches, which running statistics answer for."""
        target, *rest = recorded[0] or (None,)
        counts: bool = (
            func is Tensor.add_
            and isinstance(target, Buffer)
            and target.name.endswith("num_batches_tracked")
            and rest == [1]
        )
        if isinstance(target, Buffer) and counts:
            self._statistics.add(target.name)
            self.counted.append(target.name)
        return counts


_OWN = "a tensor of the forward's own"
_STALE = "reads memory that an operation in place has changed under another name"


def _all_constant(references: Iterable[Any]) -> bool:
    return all(isinstance(r, Constant) for r in references)


def _identities(t: Tensor) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in t.__dict__.items()]


def _for_what_is_raised() -> bool:
    """Whether the call that is watched is made by PyTorch's distributions, or for a loss that asks as they do."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith(("torch.distributions.", __name__))


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _classes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return int(kwargs.get("num_classes", args[1] if len(args) > 1 else -1))


_NORMS = (reference.per_step_norm, F.batch_norm)
_WRITERS = frozenset(
    {F.batch_norm, torch.batch_norm, torch.native_batch_norm, F.instance_norm, torch.instance_norm}
)
"""Of which the operators' schemas do not say that they write to running statistics."""
_KNOWN_NORMS = (reference.PerStepBatchNorm2d.normalise, PerStepBatchNorm2d.normalise)
# What they draw is part of what they compute.
_DROPOUTS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_),
        *(torch.alpha_dropout, torch.alpha_dropout_),
        *(torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
        *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
        *(torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu),
        F.gumbel_softmax,
    }
)
# Their result is what they draw.
_NOISE = frozenset(
    {
        *(torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.normal),
        *(torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_),
        *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_),
    }
)
_DETACHES = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
_ASKS = frozenset({"tolist", "numpy", "__array__", "item", "__bool__", "__int__", "__float__", "__index__"})
_CHANGES = frozenset(
    {"register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "backward"}
)
