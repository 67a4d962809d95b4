"""The tasks of a loop of one's own side by side: each in a thread, with the gradients of one after the other."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from mamlpp_fast._modes import plainly
from mamlpp_fast.copying import tied_function
from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.shared import held
from mamlpp_fast.ops._library import transformed
from mamlpp_fast.reference.code import own_bases, standing_for, values_named

__all__ = ["map_tasks"]

_T = TypeVar("_T")
_Gradients = list[tuple[Tensor, Tensor | None]]
_within = threading.local()


def map_tasks(
    step: Callable[[Any, _T], Any], tasks: Sequence[_T], model: nn.Module, *, threads: int | None = None
) -> list[Any]:
    """Calls ``step(model, task)`` for every task, several at once, and adds the gradients up in the tasks' order.

    It stands for the loop ``for task in tasks: step(model, task).backward()``. Each thread computes on one core, which
    suits operations as small as those of a few-shot task better than several cores at one operation. ``step`` returns
    the task's loss, or a tuple that begins with it; its backward pass is made in the thread, by all leaves of its graph
    (parameters of the model, learned rates, whatever it is), and the gradients go into their ``grad`` as that loop adds
    them. What carries no graph is returned as it is, and with gradients disabled nothing is differentiated.

    The threads share parameters, and each has a copy of the modules around them: ``functional_call`` and the like
    change a module for a while, so a step has to call the model that it is given. Batch norms' running statistics come
    out as task by task, up to rounding, where steps do not read them.

    One after the other on the calling thread run: tasks where ``threads`` is 1, or torch has one thread; models on a
    GPU; steps and models that name a ``threading.local``, whose values are the calling thread's; calls under a
    profiler, a torch-function or dispatch mode, autocast, inference mode, forward mode, a transform of ``torch.func``
    or hooks on saved tensors.

    Args:
        step: called with the model, or a copy that shares its parameters, and a task.
        tasks: of any kind.
        model: any module.
        threads: at most so many at once; None for torch's number.

    Returns:
        What the steps returned, in the tasks' order, losses detached.

    Raises:
        ValueError: a model whose modules or functions refer to the model itself by other ways than submodules, or look
            something up by module (``table[self]``, ``table[id(self)]``);
            ``threads`` below 1; results that carry a graph in another place, or a loss that is no single number.
        RuntimeError: a step that called the original model, or another module with other tensors in it, changed a
            parameter, an attribute of a module or a buffer other than the running statistics of the model's batch
            norms with a momentum, evaluated batch norms or wrote their statistics where steps train them, called
            ``backward`` itself, or drew random numbers on the CPU, whose order threads do not keep. No gradient has
            been added then, nor where a step itself raised.
    """
    tasks = list(tasks)
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    width = min(len(tasks), torch.get_num_threads() if threads is None else threads)
    known = None if width < 2 or _alone(model) else fingerprint(model, step)
    if known is None or known.of_a_thread:
        return [_finished(*_one(step, model, task)) for task in tasks]
    _check(model, known.functions)
    return _Team(step, tasks, model, known.modules(), width).run()


def _alone(model: nn.Module) -> bool:
    """Whether the calling thread has settings that others do not share, or other threads would not help."""
    return (
        lanes.here()
        or plainly.now
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or transformed()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or any(t.device.type != "cpu" for t in itertools.chain(model.parameters(), model.buffers()))
    )


def _check(model: nn.Module, functions: Sequence[types.FunctionType]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected a module that is not compiled by torch.jit, or threads=1")
    if (name := tied_function(model)) is None:
        modules = set(model.modules())
        for path, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute != "_modules" and any(_refers(leaf, modules) for leaf in tree_leaves(value)):
                    name = f"{path}.{attribute}".removeprefix(".")
    if name is not None:
        raise ValueError(
            f"model: expected submodules that are held as such alone, {name} refers to one; threads=1 runs it"
        )
    tables = {f"{f.__qualname__}, {name}": t for f in functions for name, t in values_named(f).items()}
    tables |= {f"{type(m).__name__}.{n}": t for m in modules for n, t in _attributes(m).items()}
    for name, table in tables.items():
        if isinstance(table, (Mapping, Set)) and any(m in table or id(m) in table for m in modules):
            raise ValueError(
                f"model: expected nothing that is looked up by module, which a thread's copy is not, got {name}; "
                "threads=1 runs it"
            )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Of a module and of the user's classes."""
    kind: Any = type(module)
    own = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    return {n: v for cls in own_bases(kind) for n, v in vars(cls).items()} | own


def _refers(value: object, modules: set[nn.Module]) -> bool:
    held = value.__self__ if isinstance(value, types.MethodType) else value
    return isinstance(held, nn.Module) and held in modules


def _one(step: Callable[[Any, _T], Any], model: nn.Module, task: _T) -> tuple[Any, _Gradients]:
    """What a step returned, detached, and the gradients of its loss."""
    result = step(model, task)
    loss, *rest = result if isinstance(result, tuple) and result else (result,)
    if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(rest)):
        raise ValueError("step: expected results without a graph behind the loss, which comes first")
    if not isinstance(loss, Tensor):
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(loss)):
            raise ValueError(
                "step: expected a loss, or a tuple that begins with it, got a container with a graph"
            )
        return result, []
    gradients: _Gradients = []
    if loss.requires_grad and torch.is_grad_enabled():
        if loss.numel() != 1:
            raise ValueError(f"step: expected a loss of one number, got shape {list(loss.shape)}")
        leaves = _leaves(loss)
        gradients = list(zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))
    loss = loss.detach()
    if not isinstance(result, tuple):
        return loss, gradients
    # A named tuple stays one.
    kept = (loss, *rest)
    return (type(result)._make(kept) if hasattr(result, "_make") else kept), gradients


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that ``loss.backward()`` would leave gradients with."""
    if loss.grad_fn is None:
        return [loss]
    found: dict[int, Tensor] = {}
    queue, seen = [loss.grad_fn], {loss.grad_fn}
    for node in queue:  # grows meanwhile
        if node.name().endswith("AccumulateGrad"):
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            if leaf._post_accumulate_grad_hooks:
                raise ValueError(
                    "step: expected parameters without hooks behind the accumulation of gradients"
                )
            found[id(leaf)] = leaf
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
    return list(found.values())


def _finished(result: Any, gradients: _Gradients) -> Any:
    """The result, when the gradients are added to those of the leaves."""
    with torch.no_grad():
        for leaf, g in gradients:
            if g is None:
                continue
            if g.layout is not torch.strided:
                leaf.grad = g if leaf.grad is None else leaf.grad + g
            elif leaf.grad is None:  # in memory of its own, as the next one is added in place
                leaf.grad = torch.empty_like(leaf).copy_(g)
            else:
                leaf.grad += g
    return result


def _constants(model: nn.Module) -> list[tuple[Tensor, int, Tensor | None]]:
    """The tensors of a model that take no gradient and are no buffers, with their versions.

    And the values of those that may be running statistics [C]: norms do not count their changes.
    """
    buffers = {id(b) for b in model.buffers()}
    found = {id(t): t for t in held(model) if id(t) not in buffers and not t.requires_grad}
    return [
        (t, _version(t), t.clone() if t.ndim == 1 and t.layout is torch.strided else None)
        for t in found.values()
    ]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


class _Copy:
    """A thread's modules, around the same parameters."""

    def __init__(self, model: nn.Module) -> None:
        copies: dict[nn.Module | None, nn.Module | None] = {None: None}
        for module in model.modules():
            copied = copies[module] = module._replicate_for_data_parallel()
            copied._parameters = module._parameters.copy()
            for name, value in vars(module).items():
                if name.endswith("_hooks") and isinstance(value, dict):
                    vars(copied)[name] = value.copy()
            copied._is_replica = False
            if isinstance(copied, _BatchNorm):
                kind: Any = type(copied)
                copied.__class__ = _watched(kind)
        for copied in copies.values():
            for name, child in () if copied is None else copied._modules.items():
                copied._modules[name] = copies[child]  # type: ignore[union-attr]
        made = copies[model]
        assert made is not None
        self.model = made
        # In the order of the original's; a module that stands in several places once.
        self.pairs = [(m, c) for m, c in copies.items() if m is not None and c is not None]

    def renew(self) -> dict[tuple[int, str], Tensor]:
        """Gives the copy buffers with the original's values; their clones by module and name."""
        made: dict[int, Tensor] = {}
        for original, copied in self.pairs:
            for name, b in original._buffers.items():
                copied._buffers[name] = b if b is None else made.setdefault(id(b), b.clone())
        return {
            (i, n): b for i, (_, c) in enumerate(self.pairs) for n, b in c._buffers.items() if b is not None
        }


class _Beside:
    """Modules that are no part of the model and that its functions or the step reach: the threads share them.

    They may be called as they are. With other tensors in them, by ``functional_call`` say, one thread would compute
    with those of another; what they keep of a call (statistics) would come in the threads' order.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self.before = [
            (dict(vars(m)), dict(m._parameters), dict(m._buffers), _cloned(m._buffers)) for m in self.modules
        ]
        self.swapped = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it a step that has put other tensors into a module cannot call it; afterwards its own are back."""
        hooks = [m.register_forward_pre_hook(_refusal(m)) for m in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, (_, parameters, buffers, _) in zip(self.modules, self.before, strict=True):
                self.swapped |= _put_back(module, parameters, buffers)

    def check(self) -> None:
        """Raises where the modules are not what they were."""
        if self.swapped:
            raise RuntimeError("map_tasks: a step put other tensors into a module that the threads share")
        for module, (attributes, _, _, buffers) in zip(self.modules, self.before, strict=True):
            name = _changed(attributes, vars(module)) or next(
                (n for n, b in buffers.items() if not _same(module._buffers.get(n), b)), None
            )
            if name is not None:
                with torch.no_grad():
                    for _, _, own, values in self.before:
                        for n, value in values.items():
                            own[n].copy_(value)  # type: ignore[union-attr]
                raise RuntimeError(
                    f"map_tasks: a step changed {name} of a {type(module).__name__} beside the model, which the "
                    "threads share; make it a submodule of the model, or threads=1"
                )


def _refusal(module: nn.Module) -> Callable[[nn.Module, Any], None]:
    held = [(t, dict(t)) for m in module.modules() for t in (m._parameters, m._buffers)]

    def refuse(called: nn.Module, args: Any) -> None:  # a copy that a step makes has the hook as well
        if (
            called is module
            and getattr(_within, "now", False)
            and any(table.get(name) is not t for table, own in held for name, t in own.items())
        ):
            raise RuntimeError(
                f"map_tasks: a step called a {type(module).__name__} beside the model with other tensors than its own, "
                "which the threads share; make it a submodule of the model, or threads=1"
            )

    return refuse


def _put_back(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> bool:
    """Gives a module the tensors that it held; whether it held others."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]]
    pairs = [(module._parameters, parameters), (module._buffers, buffers)]
    swapped = any(table.get(name) is not t for table, own in pairs for name, t in own.items())
    for table, own in pairs:
        table.update(own)
    return swapped


def _cloned(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in buffers.items() if b is not None}


class _Team:
    """One call of :func:`map_tasks` on several threads."""

    def __init__(
        self,
        step: Callable[[Any, _T], Any],
        tasks: list[_T],
        model: nn.Module,
        reached: Iterable[nn.Module],
        width: int,
    ) -> None:
        self.step = step
        self.tasks = tasks
        self.modules = list(model.modules())
        self.beside = _Beside({m for r in reached for m in r.modules()}.difference(self.modules))
        self.constants = _constants(model)
        self.copies = [_Copy(model) for _ in range(width)]
        self.results: list[tuple[Any, _Gradients] | None] = [None] * len(tasks)
        self.buffers: list[dict[tuple[int, str], Tensor]] = [{} for _ in tasks]
        self.errors: dict[int, BaseException] = {}
        self.enabled = torch.is_grad_enabled()
        self.evaluated = self.written = False

    def run(self) -> list[Any]:
        parameters = {id(p): p for m in self.modules for p in m._parameters.values() if p is not None}
        before = [
            (p, p._version, p.grad, None if p.grad is None else p.grad._version) for p in parameters.values()
        ]
        drawn = torch.get_rng_state()

        def on_lane(task: int, lane: int) -> None:
            try:
                self._task(task, self.copies[lane])
            except BaseException as error:
                self.errors[task] = error
                raise

        with self._guarded(), self.beside.watched():
            try:
                lanes.each(on_lane, len(self.tasks), len(self.copies))
            except BaseException:
                if not self.errors:
                    raise
                raise self.errors[min(self.errors)] from None
        for p, version, grad, written in before:
            if p._version != version:
                raise RuntimeError("map_tasks: a step changed a parameter in place, which the threads share")
            if p.grad is not grad or (grad is not None and grad._version != written):
                raise RuntimeError("map_tasks: a step called backward(); return the loss instead")
        if any(_version(t) != v or (was is not None and not _same(t, was)) for t, v, was in self.constants):
            raise RuntimeError(
                "map_tasks: a step changed a tensor of the model in place that is no buffer, which the threads share; "
                "threads=1 runs it"
            )
        self.beside.check()
        if not torch.equal(drawn, torch.get_rng_state()):
            raise RuntimeError(
                "map_tasks: a step drew random numbers, whose order threads do not keep; draw them before, or "
                "threads=1"
            )
        updates = self._updates()
        if updates and (self.evaluated or self.written):
            raise RuntimeError(
                "map_tasks: a step evaluated batch norms, or wrote their running statistics, which steps train one "
                "after the other; threads=1 does"
            )
        results = [_finished(*found) for found in self.results if found is not None]
        with torch.no_grad():
            for buffer, value in updates:
                buffer.copy_(value)
        return results

    def _task(self, task: int, copied: _Copy) -> None:
        """A step of one task."""
        mine = copied.renew()
        before = [dict(vars(c)) for _, c in copied.pairs]
        written = {key: b._version for key, b in mine.items() if key[1] in _STATISTICS}
        _within.now, _within.evaluated = True, False
        try:
            with torch.set_grad_enabled(self.enabled):
                self.results[task] = _one(self.step, copied.model, self.tasks[task])
        finally:
            _within.now = False
        for (_, c), old in zip(copied.pairs, before, strict=True):
            if (name := _changed(old, vars(c))) is not None:
                raise RuntimeError(
                    f"map_tasks: a step changed the attribute {name} of a {type(c).__name__}, which threads do not "
                    "pass on; threads=1 does"
                )
        self.evaluated |= _within.evaluated
        # Batch norms themselves raise no versions.
        self.written |= any(mine[key]._version != version for key, version in written.items())
        ends = [c._buffers for _, c in copied.pairs]
        self.buffers[task] = {key: ends[key[0]].get(key[1]) for key in mine}  # type: ignore[misc]

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Within it the original's forward raises in a step, and afterwards it holds what it held."""
        before = [(vars(m).get("forward"), dict(m._parameters), dict(m._buffers)) for m in self.modules]
        for module, (own, *_) in zip(self.modules, before, strict=True):
            vars(module)["forward"] = _guard(own if own is not None else module.forward)
        try:
            yield
        finally:
            swapped = False
            for module, (own, parameters, buffers) in zip(self.modules, before, strict=True):
                if own is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = own
                swapped |= _put_back(module, parameters, buffers)
        if swapped:
            raise RuntimeError("map_tasks: a step put other tensors into the original model")

    def _updates(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers and their values after all tasks, as if each had gone on from where the last one stopped.

        A task that begins at r_0 and updates n times ends at r = q r_0 + b with q = (1 − momentum)^n; had it begun at
        s, it would end at r + q (s − r_0).
        """
        found: list[tuple[Tensor, Tensor]] = []
        for index, (module, _) in enumerate(self.copies[0].pairs):
            momentum = module.momentum if isinstance(module, _BatchNorm) else None
            counted = None if momentum is None else module._buffers.get("num_batches_tracked")
            ends = [{name: b for (i, name), b in buffers.items() if i == index} for buffers in self.buffers]
            for name, start in module._buffers.items():
                if start is None or all(_same(end[name], start) for end in ends):
                    continue
                if (
                    momentum is None
                    or counted is None
                    or name not in ("running_mean", "running_var", "num_batches_tracked")
                ):
                    raise RuntimeError(
                        f"map_tasks: a step changed the buffer {name} of a {type(module).__name__}, which threads do "
                        "not pass on; threads=1 does"
                    )
                value = start
                for end in ends:
                    times = int(end["num_batches_tracked"] - counted)
                    share = 1 if name == "num_batches_tracked" else (1 - momentum) ** times
                    value = end[name] + share * (value - start)
                found.append((start, value))
        return found


_STATISTICS = ("running_mean", "running_var")


@functools.cache
def _watched(cls: Any) -> Any:
    """A class like ``cls``, of batch norms, that tells when running statistics normalise."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            _within.evaluated = True
        made: Tensor = cls.forward(self, input)
        return made

    return standing_for(cls, {"forward": forward})


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The name of an attribute that is another one now; a module's tables, which calls swap, are left aside."""
    kept = ("_parameters", "_buffers", "_modules", "_flat_weights")
    for name in dict.fromkeys((*before, *now)):
        if name not in kept and before.get(name) is not now.get(name):
            return name
    return None


def _guard(forward: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if getattr(_within, "now", False):
            raise RuntimeError(
                "map_tasks: a step called the model that the threads share; call the one it is given"
            )
        return forward(*args, **kwargs)

    return guarded


def _same(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or bool(((a == b) | (a.isnan() & b.isnan() if a.is_floating_point() else a == b)).all())
