"""The sweep, written down as a program: inner steps forward, then the adjoint backward with Hessian-vector products.

Notation of ``docs/engine.md``: fast weights θ_k, support gradients g_k, rates α_k, multi-step weights w_k, adjoint λ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

import mamlpp_fast.ops.lslr_update  # noqa: F401 - registers the operations
from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.finish import Finish, Key, Row
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.masks import PassMasks
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.passes import clear_missing, write_backward, write_forward, write_tangent
from mamlpp_fast.engine.fused.program import Emitter, Phase, Program, Ref
from mamlpp_fast.engine.fused.steps import Goal, Gradients, Loss, Pass, Rows, Slot
from mamlpp_fast.engine.fused.steps.base import aten

__all__ = ["Form", "Memory", "write_evaluation", "write_meta_gradient"]


@dataclass(frozen=True)
class Form:
    """What decides the shape of a program.

    Attributes:
        tasks: tasks of one group; all of them advance together.
        total_tasks: tasks of the meta-batch, which the mean is over.
        support, targets: images a task.
        labels, label_dtype: of a task's support and target set, [N, ...] each.
        steps: inner updates.
        rate_steps: rates (and batch-norm rows) there are; later steps use the last.
        adapted: parameters that the inner loop adapts.
        trainable: parameters that want a meta-gradient.
        rate_names: the parameters of the rows of the rates [L, K]; None when every element has its own rate.
        multi_step: a weighted target loss after every update, or the last one's alone.
        second_order: with Hessian-vector products.
        recompute: run the support pass again in the reverse sweep instead of keeping its activations.
    """

    tasks: int
    total_tasks: int
    support: int
    targets: int
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    label_dtype: torch.dtype
    steps: int
    rate_steps: int
    adapted: frozenset[str]
    trainable: frozenset[str]
    rate_names: tuple[str, ...] | None
    multi_step: bool = True
    second_order: bool = True
    recompute: bool = False


@dataclass
class Memory:
    """The tensors through which a program meets the world; all keep their place.

    T are the tasks of a group, G the groups. What a run writes to, each lane has its own of.

    Attributes:
        support_x, target_x: inputs of the network, images [T, N, H, W, C]; support_t, target_t: what the loss stores
            for labels.
        meta: parameters in the kernels' layout; rows: batch-norm weight and bias [R, C]; buffers: of the model.
        rates: [L, K], or [K, size] like the fast weights of all tasks when every element has its own.
        weights: multi-step weights [K].
        running: running mean and variance [K, C] that frozen norms read.
        masks: of dropout, by inner step and side (0 support, 1 target), in the order of the passes.
        row: what a group leaves, flat; table: the rows of all groups [G, size]; all: what lies in them, [G, *shape]:
            ``"logits"``, predictions [T, m, O], or of every step [K, T, m, O]; in training ``"losses"`` [T],
            ``"adjoint"``, ``"rates"``, and of each batch norm ``"mean"`` and ``"rstd"`` [K, 2, T, C] that it saw in the
            support (0) and target (1) passes, ``"weight"`` and ``"bias"`` likewise.
        meta_grads, row_grads, rate_grads: means over all tasks.
    """

    support_x: tuple[Ref, ...]
    target_x: tuple[Ref, ...]
    support_t: Ref
    target_t: Ref
    weights: Ref
    rates: Ref
    row: Ref
    table: Ref
    all: dict[Key, Ref]
    meta: dict[str, Ref] = field(default_factory=dict)
    rows: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    buffers: dict[str, Ref] = field(default_factory=dict)
    running: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    masks: dict[tuple[int, int], PassMasks] = field(default_factory=dict)
    meta_grads: dict[str, Ref] = field(default_factory=dict)
    row_grads: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    rate_grads: Ref | None = None


@dataclass(frozen=True)
class Written:
    """The programs of a group and of the sums over groups, their memory, and how parameters lie in it."""

    program: Program
    finish: Program
    memory: Memory
    slots: dict[str, Slot]
    rows: dict[str, Rows]
    layout: Layout


ops = torch.ops.mamlpp_fast


class _Writer:
    """What training and evaluation share: parameters, passes, the inner update."""

    def __init__(self, em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form) -> None:
        self.em = em
        self.net = net
        self.target_net = target_net
        self.loss = loss
        self.form = form
        self.slots: dict[str, Slot] = target_net.slots() | net.slots()
        self.rows: dict[str, Rows] = target_net.rows() | net.rows()
        params = frozenset().union(*(s.params() for s in net.steps))
        self.inner = form.adapted & params
        self.meta = (form.trainable | form.adapted) & params
        self.inner_values = net.depends(self.inner)
        inner = [name for name in form.rate_names or sorted(self.inner) if name in self.inner]
        self.inner_layout = Layout(self.slots, inner, form.tasks, em.dtype)
        others = sorted((self.slots.keys() & self.meta) - self.inner)
        self.meta_layout = Layout(self.slots, [*self.inner_layout.names, *others], form.tasks, em.dtype)
        self.finish = Emitter(em.device, em.dtype)
        self._results: list[tuple[Ref, Ref, float]] = []
        self.memory = self._memory()
        # Rates by element need no segments.
        self.segments: Ref | None = None
        if form.rate_names is not None:
            offsets = self.inner_layout.offsets(form.rate_names)
            self.segments = em.own("segments of the rates", offsets.to(em.device))

    def written(self) -> Written:
        self.write()
        programs = self.em.finish(), self.finish.finish()
        return Written(*programs, self.memory, self.slots, self.rows, self.inner_layout)

    def write(self) -> None:
        raise NotImplementedError

    def results(self) -> dict[Key, tuple[int, ...]]:
        """Shapes of what a group leaves."""
        raise NotImplementedError

    def _zeros(self, name: str, *shape: int, each: bool = False) -> Ref:
        return self.em.own(name, torch.zeros(shape, dtype=self.em.dtype, device=self.em.device), each=each)

    def _memory(self) -> Memory:
        f, net = self.form, self.net
        outputs = net.shapes[net.output]
        row, groups = Row(self.results(), self.em.dtype), f.total_tasks // f.tasks
        flat = self._zeros("results", row.size, each=True)
        self.left = row.views(flat)
        table = flat.reshape(1, row.size)
        if groups > 1:
            every = torch.zeros(groups, row.size, dtype=self.em.dtype, device=self.em.device)
            table = self.finish.own("results of all groups", every)
        memory = Memory(
            support_x=self._examples("support", f.support),
            target_x=self._examples("target", f.targets),
            support_t=self._labels("support labels", outputs, f.labels[0]),
            target_t=self._labels("target labels", outputs, f.labels[1]),
            weights=self._zeros("step weights", f.steps),
            rates=self._zeros("rates", *self._rates_shape()),
            row=flat,
            table=table,
            all=row.views(table),
        )
        for name, slot in self.slots.items():
            memory.meta[name] = self._zeros(name, *slot.shape)
        for step in (*self.net.steps, *self.target_net.steps, *self.loss.steps):
            for name, b in step.buffers.items():
                dtype = self.em.dtype if b.is_floating_point() else b.dtype
                if name not in memory.buffers:
                    memory.buffers[name] = self.em.own(name, b.detach().to(dtype, copy=True))
        for name, rows in self.rows.items():
            shape = (rows.rows, rows.channels)
            memory.rows[name] = self._zeros(f"{name} weights", *shape), self._zeros(f"{name} biases", *shape)
        return memory

    def _labels(self, name: str, outputs: tuple[int, ...], labels: tuple[int, ...]) -> Ref:
        shape, dtype = self.loss.stored(outputs, labels, self.form.label_dtype, self.em.dtype)
        stored = torch.zeros(self.form.tasks, *shape, dtype=dtype, device=self.em.device)
        return self.em.own(name, stored, each=True)

    def _examples(self, side: str, count: int) -> tuple[Ref, ...]:
        found = []
        for i, kind in enumerate(self.net.inputs):
            dtype = self.em.dtype if kind.is_floating_point else kind
            shape = self.form.tasks, count, *self.net.shapes[i]
            x = torch.zeros(shape, dtype=dtype, device=self.em.device)
            found.append(self.em.own(f"{side} images", x, each=True))
        return tuple(found)

    def _rates_shape(self) -> tuple[int, int]:
        f = self.form
        if f.rate_names is None:
            return f.rate_steps, self.inner_layout.size
        return len(f.rate_names), f.rate_steps

    def load(self) -> tuple[Ref, dict[str, Ref]]:
        """θ_0: the meta-parameters, once for every task; those that adapt lie in the flat buffer that comes first."""
        self.em.phase, self.em.label = Phase("load"), "parameters"
        pairs = []
        flat = self.inner_layout.new(self.em, "fast weights")
        theta = self.inner_layout.views(flat)
        for name, slot in self.slots.items():
            if name not in theta:
                theta[name] = self.em.new(name, (self.form.tasks, *slot.shape))
            pairs.append((theta[name], self.memory.meta[name]))
        self.em.move(pairs)
        return flat, theta

    def leave(self, place: Ref, result: Ref) -> None:
        """Copies a result of the group: at once, or with all others at the end where launches cost."""
        if base.launches_cost(self.em.device):
            self._results.append((place, result, 1.0))
        else:
            self.em.call(aten.copy_.default, place, result)

    def leave_all(self) -> None:
        if self._results:
            self.em.strided_sums(self._results)

    def rate_row(self, step: int) -> int:
        return min(step, self.form.rate_steps - 1)

    def start(
        self,
        net: Network,
        inputs: tuple[Ref, ...],
        step: int,
        side: int,
        theta: Mapping[str, Ref],
        stats: Mapping[str, tuple[Ref, Ref]],
        goal: Goal | None = None,
    ) -> Pass:
        rows = {
            name: (w[min(step, r.rows - 1)], b[min(step, r.rows - 1)])
            for name, r in net.rows().items()
            for w, b in (self.memory.rows[name],)
        }
        return Pass(
            self.form.tasks,
            inputs[0].shape[1],
            step,
            theta,
            rows,
            dict(enumerate(inputs)),
            stats,
            goal=goal,
            buffers=self.memory.buffers,
            masks=self.memory.masks.setdefault((step, side), PassMasks(self.form.tasks)),
        )

    def support_pass(
        self,
        step: int,
        theta: Mapping[str, Ref],
        stats: Mapping[str, tuple[Ref, Ref]],
        *,
        again: bool = False,
    ) -> tuple[Pass, Ref | None]:
        """Support pass and its flat gradient; ``again``: for the activations and their gradients only."""
        m = self.memory
        ps = self.start(self.net, m.support_x, step, 0, theta, stats, Goal(m.support_t))
        write_forward(self.em, self.net, ps)
        self.em.label = "loss"
        value = self.loss.of_pass(self.em, ps, self.net.output)
        if again:
            write_backward(
                self.em, self.net, ps, value.grad, Gradients(self.inner_values, frozenset()), keep=True
            )
            return ps, None
        flat, out = self.gradients(self.inner_layout, "support gradient", self.inner_values)
        write_backward(self.em, self.net, ps, value.grad, out, keep=True)
        clear_missing(self.em, out)
        return ps, flat

    def gradients(
        self,
        layout: Layout,
        name: str,
        values: frozenset[int],
        rows: Mapping[str, tuple[Ref, Ref]] | None = None,
    ) -> tuple[Ref, Gradients]:
        """A flat buffer for the gradients of the parameters of ``layout``, and what a backward pass fills it by."""
        flat = layout.new(self.em, name)
        return flat, Gradients(
            values, frozenset(layout.names), row_memory=rows or {}, memory=layout.views(flat)
        )

    def update(
        self, step: int, flat: Ref, theta: Mapping[str, Ref], grads: Ref
    ) -> tuple[Ref, dict[str, Ref]]:
        """θ_{k+1} = θ_k − α_k ∘ g_k."""
        em, row = self.em, self.rate_row(step)
        em.label = "inner update"
        new = em.like("fast weights", flat)
        em.call(ops.lslr_update_out.default, flat, grads, self.memory.rates, self.segments, row, new)
        return new, {**theta, **self.inner_layout.views(new)}


class _MetaGradient(_Writer):
    def __init__(self, em: Emitter, net: Network, loss: Loss, form: Form) -> None:
        super().__init__(em, net, net, loss, form)
        self.meta_values = net.depends(self.meta)
        self._losses: Ref | None = None
        for name in net.norms:
            self.left[name, "rstd"].tensor().fill_(1)  # also of passes that are not made

    def results(self) -> dict[Key, tuple[int, ...]]:
        f, net = self.form, self.net
        results: dict[Key, tuple[int, ...]] = {
            "adjoint": (self.meta_layout.size,),
            "rates": self._rates_shape(),
            "losses": (f.tasks,),
            "logits": (f.tasks, f.targets, *net.shapes[net.output]),
        }
        for name in net.norms:
            for what in ("mean", "rstd"):
                results[name, what] = f.steps, 2, f.tasks, net.channels(name)
        for name, rows in self.rows.items():
            for what in ("weight", "bias"):
                results[name, what] = f.steps, 2, f.tasks, rows.channels
        return results

    def _of_pass(
        self, names: Iterable[str], whats: tuple[str, str], step: int, side: int
    ) -> dict[str, tuple[Ref, Ref]]:
        first, second = whats
        return {n: (self.left[n, first][step, side], self.left[n, second][step, side]) for n in names}

    def _stats(self, step: int, side: int) -> dict[str, tuple[Ref, Ref]]:
        return self._of_pass(self.net.norms, ("mean", "rstd"), step, side)

    def _meta_gradients(self, name: str, step: int, event: int) -> tuple[Ref, Gradients]:
        rows = self._of_pass(self.rows, ("weight", "bias"), step, event)
        flat, out = self.gradients(self.meta_layout, name, self.meta_values, rows)
        return flat, replace(out, wanted_params=self.meta)

    def write(self) -> None:
        f = self.form
        flat, theta = self.load()
        thetas, support, targets = [theta], [], {}
        for k in range(f.steps):
            self.em.phase = Phase("support", k)
            ps, grads = self.support_pass(k, theta, self._stats(k, 0))
            assert grads is not None
            support.append((ps, grads))
            flat, theta = self.update(k, flat, theta, grads)
            thetas.append(theta)
            if f.multi_step or k == f.steps - 1:
                self.em.phase = Phase("target", k)
                targets[k] = self._target_pass(k, theta)
        adjoint: Ref | None = None
        for k in reversed(range(f.steps)):
            terms = [r for r in (adjoint, targets.get(k)) if r is not None]
            self.em.phase, self.em.label = Phase("reverse", k), "adjoint"
            adjoint = self._reverse(k, thetas[k], support[k], self.em.sum("adjoint", terms))
        assert adjoint is not None
        self.leave(self.left["adjoint"], adjoint)
        if self._losses is not None:
            self._results.append((self.left["losses"], self._losses[:, : f.tasks], 1.0))
        self.leave_all()
        finish, m = Finish(self.finish, self.memory.all, f.total_tasks), self.memory
        m.meta_grads = finish.parameters(self.meta_layout)
        m.rate_grads = finish.rates()
        m.row_grads = finish.rows(self.rows, f.steps)
        finish.sum_all()

    def _target_pass(self, k: int, theta: Mapping[str, Ref]) -> Ref:
        """w_k ∇T_k(θ_{k+1}), flat."""
        em, m = self.em, self.memory
        weights = m.weights if self.form.multi_step else None
        goal = Goal(m.target_t, weights, k, want_loss=True, loss=self._loss_row(k))
        ps = self.start(self.net, m.target_x, k, 1, theta, self._stats(k, 1), goal)
        write_forward(self.em, self.net, ps)
        em.label = "loss"
        value = self.loss.of_pass(em, ps, self.net.output)
        assert value.loss is not None
        if goal.loss is None:
            first = k == 0 or not self.form.multi_step
            em.call(aten.copy_.default if first else aten.add_.Tensor, self.left["losses"], value.loss)
        if k == self.form.steps - 1:
            self.leave(self.left["logits"], ps.values[self.net.output])
        flat, out = self._meta_gradients("target gradient", k, 0)
        write_backward(self.em, self.net, ps, value.grad, out)
        clear_missing(self.em, out)
        return flat

    def _loss_row(self, k: int) -> Ref | None:
        """Where a target pass leaves its losses [T], in a table that is summed at the end; None: added one by one."""
        if not base.launches_cost(self.em.device):
            return None
        if self._losses is None:
            rows, step = self.form.steps if self.form.multi_step else 1, 16
            # Kernels take pointers to multiples of 16 bytes.
            self._losses = self.em.new("losses of all steps", (rows, -(-self.form.tasks // step) * step))
        return self._losses[k if self.form.multi_step else 0, : self.form.tasks]

    def _reverse(self, k: int, theta: Mapping[str, Ref], support: tuple[Pass, Ref], adjoint: Ref) -> Ref:
        """One step of the reverse sweep: λ after the update to λ before it."""
        em = self.em
        ps, grads = support
        direction = self._direction(k, grads, adjoint)
        if not self.form.second_order:
            return adjoint
        if self.form.recompute:
            ps, _ = self.support_pass(k, theta, {}, again=True)
        ps.directions = self.inner_layout.views(direction)
        write_tangent(em, self.net, ps, self.inner_values)
        em.label = "loss"
        grad_dot = self.loss.tangent_of_pass(em, ps, self.net.output)
        product, out = self._meta_gradients("Hessian-vector product", k, 1)
        write_backward(self.em, self.net, ps, grad_dot, out, tangent=True)
        em.label = "adjoint"
        clear_missing(self.em, out)
        return em.sum("adjoint", [adjoint, product])

    def _direction(self, k: int, grads: Ref, adjoint: Ref) -> Ref:
        """−v = −α_k ∘ λ, the derivative of the update by its gradient; leaves ∂L/∂α_k = −⟨g_k, λ⟩."""
        direction = self.inner_layout.new(self.em, "direction")
        inner = adjoint[: self.inner_layout.size]
        self.em.call(
            ops.lslr_update_backward_out.default,
            *(
                inner,
                grads,
                self.memory.rates,
                self.segments,
                self.rate_row(k),
                direction,
                self.left["rates"],
            ),
        )
        return direction


class _Evaluation(_Writer):
    def __init__(self, em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form) -> None:
        super().__init__(em, net, target_net, loss, form)
        for name in net.frozen | target_net.frozen:
            shape = (form.steps, self.rows[name].channels)
            self.memory.running[name] = (
                self._zeros(f"{name} means", *shape),
                self._zeros(f"{name} variances", *shape),
            )

    def results(self) -> dict[Key, tuple[int, ...]]:
        f, net = self.form, self.net
        return {"logits": (f.steps, f.tasks, f.targets, *net.shapes[net.output])}

    def _stats(self, net: Network, k: int) -> dict[str, tuple[Ref, Ref]]:
        return {
            name: (mean[k], var[k]) for name, (mean, var) in self.memory.running.items() if name in net.frozen
        }

    def write(self) -> None:
        flat, theta = self.load()
        for k in range(self.form.steps):
            self.em.phase = Phase("support", k)
            _, grads = self.support_pass(k, theta, self._stats(self.net, k))
            assert grads is not None
            flat, theta = self.update(k, flat, theta, grads)
            self.em.phase = Phase("target", k)
            stats = self._stats(self.target_net, k)
            ps = self.start(self.target_net, self.memory.target_x, k, 1, theta, stats)
            write_forward(self.em, self.target_net, ps)
            self.leave(self.left["logits"][k], ps.values[self.target_net.output])
        self.leave_all()


def write_meta_gradient(em: Emitter, net: Network, loss: Loss, form: Form) -> Written:
    """The program of one group of tasks of a meta-gradient."""
    return _MetaGradient(em, net, loss, form).written()


def write_evaluation(em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form) -> Written:
    """The program of one group of tasks of an evaluation; ``target_net`` may normalise with running statistics."""
    return _Evaluation(em, net, target_net, loss, form).written()
