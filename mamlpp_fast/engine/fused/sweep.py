"""The sweep, written down as a program: inner steps forward, then the adjoint backward with Hessian-vector products.

Notation of ``docs/engine.md``: fast weights θ_k, support gradients g_k, rates α_k, multi-step weights w_k, adjoint λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

import mamlpp_fast.ops.lslr_update  # noqa: F401 - registers the operations
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.network import Network
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

    Attributes:
        support_x, target_x: images [T, N, H, W, C]; support_t, target_t: what the loss stores for labels.
        meta: parameters in the kernels' layout; rows: batch-norm weight and bias [R, C].
        rates: [L, K], or [K, size] like the fast weights of all tasks when every element has its own.
        weights: multi-step weights [K].
        stats: mean and 1/std [K, 2, T, C] that batch norms saw in the support (0) and target (1) passes.
        running: running mean and variance [K, C] that frozen norms read.
        logits: predictions [T, m, O], or of every step [K, T, m, O]; losses: [T].
        meta_grads, row_grads, rate_grads: sums over the groups of tasks so far, already divided by all tasks.
    """

    support_x: Ref
    target_x: Ref
    support_t: Ref
    target_t: Ref
    logits: Ref
    losses: Ref
    weights: Ref
    rates: Ref
    meta: dict[str, Ref] = field(default_factory=dict)
    rows: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    stats: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    running: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    meta_grads: dict[str, Ref] = field(default_factory=dict)
    row_grads: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    rate_grads: Ref | None = None


@dataclass(frozen=True)
class Written:
    """A program, the memory it meets the world through, and how its parameters lie in it."""

    program: Program
    memory: Memory
    slots: dict[str, Slot]
    rows: dict[str, Rows]
    layout: Layout


ops = torch.ops.mamlpp_fast


class _Writer:
    """What training and evaluation share: parameters, passes, the inner update."""

    def __init__(
        self, em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form, *, every_step: bool
    ) -> None:
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
        self.memory = self._memory(every_step)
        # Rates by element need no segments.
        self.segments: Ref | None = None
        if form.rate_names is not None:
            offsets = self.inner_layout.offsets(form.rate_names)
            self.segments = em.own("segments of the rates", offsets.to(em.device))

    def finish(self) -> Written:
        self.write()
        return Written(self.em.finish(), self.memory, self.slots, self.rows, self.inner_layout)

    def write(self) -> None:
        raise NotImplementedError

    def _zeros(self, name: str, *shape: int) -> Ref:
        return self.em.own(name, torch.zeros(shape, dtype=self.em.dtype, device=self.em.device))

    def _memory(self, every_step: bool) -> Memory:
        f, net = self.form, self.net
        outputs = net.shapes[net.output]
        logits = (f.tasks, f.targets, *outputs)
        memory = Memory(
            support_x=self._zeros("support images", f.tasks, f.support, *net.shapes[0]),
            target_x=self._zeros("target images", f.tasks, f.targets, *net.shapes[0]),
            support_t=self._zeros("support labels", f.tasks, f.support, *outputs),
            target_t=self._zeros("target labels", f.tasks, f.targets, *outputs),
            logits=self._zeros("predictions", *((f.steps, *logits) if every_step else logits)),
            losses=self._zeros("losses", f.tasks),
            weights=self._zeros("step weights", f.steps),
            rates=self._zeros("rates", *self._rates_shape()),
        )
        for name, slot in self.slots.items():
            memory.meta[name] = self._zeros(name, *slot.shape)
        for name, rows in self.rows.items():
            shape = (rows.rows, rows.channels)
            memory.rows[name] = self._zeros(f"{name} weights", *shape), self._zeros(f"{name} biases", *shape)
        return memory

    def _rates_shape(self) -> tuple[int, int]:
        f = self.form
        if f.rate_names is None:
            return f.rate_steps, self.inner_layout.size
        return len(f.rate_names), f.rate_steps

    def load(self) -> tuple[Ref, dict[str, Ref]]:
        """θ_0: the meta-parameters, once for every task; those that adapt lie in the flat buffer that comes first."""
        self.em.phase, self.em.label = Phase("load"), "parameters"
        flat = self.inner_layout.new(self.em, "fast weights")
        theta = self.inner_layout.views(flat)
        for name, slot in self.slots.items():
            if name not in theta:
                theta[name] = self.em.new(name, (self.form.tasks, *slot.shape))
            self.em.call(aten.copy_.default, theta[name], self.memory.meta[name])
        return flat, theta

    def rate_row(self, step: int) -> int:
        return min(step, self.form.rate_steps - 1)

    def start(
        self,
        net: Network,
        images: Ref,
        step: int,
        theta: Mapping[str, Ref],
        stats: Mapping[str, tuple[Ref, Ref]],
        goal: Goal | None = None,
    ) -> Pass:
        rows = {
            name: (w[min(step, r.rows - 1)], b[min(step, r.rows - 1)])
            for name, r in net.rows().items()
            for w, b in (self.memory.rows[name],)
        }
        return Pass(self.form.tasks, images.shape[1], step, theta, rows, {0: images}, stats, goal=goal)

    def forward(self, net: Network, ps: Pass) -> None:
        for step in net.steps:
            self.em.label = step.name
            step.forward(self.em, ps)

    def backward(
        self, net: Network, ps: Pass, grad: Ref, out: Gradients, *, keep: bool = False, tangent: bool = False
    ) -> dict[str, Ref]:
        """Gradients of the parameters; ``tangent`` takes the derivative of the backward pass instead."""
        out.add(net.output, grad)
        for step in reversed(net.steps):
            if step.output not in out.wanted_values or step.output not in out.terms:
                continue  # the latter where nothing reads the value, or only as a constant
            self.em.label = step.name
            gy = self.em.sum(f"gradient of {step.name}", out.terms.pop(step.output))
            if tangent:
                step.backward_tangent(self.em, ps, ps.grads.get(step.output), gy, out)
            else:
                if keep:
                    ps.grads[step.output] = gy
                step.backward(self.em, ps, gy, out)
        return out.params

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
        ps = self.start(self.net, m.support_x, step, theta, stats, Goal(m.support_t))
        self.forward(self.net, ps)
        self.em.label = "loss"
        value = self.loss.of_pass(self.em, ps, self.net.output)
        if again:
            self.backward(self.net, ps, value.grad, Gradients(self.inner_values, frozenset()), keep=True)
            return ps, None
        flat, out = self.gradients(self.inner_layout, "support gradient", self.inner_values)
        self.backward(self.net, ps, value.grad, out, keep=True)
        self.complete(out)
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

    def complete(self, out: Gradients) -> None:
        """Clears the places of gradients that the pass did not find."""
        for name, place in out.memory.items():
            if name not in out.params:
                self.em.call(aten.zero_.default, place)

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
        super().__init__(em, net, net, loss, form, every_step=False)
        f, m = form, self.memory
        for name in net.norms:
            channels = next(net.shapes[s.output][-1] for s in net.steps if s.name == name)
            seen = (f.steps, 2, f.tasks, channels)
            m.stats[name] = self._zeros(f"{name} means", *seen), self._ones(f"{name} 1/stds", *seen)
        for name in sorted(self.slots.keys() & self.meta):
            m.meta_grads[name] = self._zeros(f"meta-gradient of {name}", *self.slots[name].shape)
        for name, rows in self.rows.items():
            shape = (rows.rows, rows.channels)
            m.row_grads[name] = (
                self._zeros(f"{name} weights' gradient", *shape),
                self._zeros(f"{name} biases' gradient", *shape),
            )
        m.rate_grads = self._zeros("rates' gradient", *m.rates.shape)
        others = sorted((self.slots.keys() & self.meta) - self.inner)
        self.meta_layout = Layout(self.slots, [*self.inner_layout.names, *others], form.tasks, em.dtype)
        self.rate_terms = self._zeros("rates' gradient of a group", *m.rates.shape)
        self.events = {
            name: tuple(
                self._zeros(f"{name} {what}", f.steps, 2, f.tasks, r.channels)
                for what in ("weight terms", "bias terms")
            )
            for name, r in self.rows.items()
        }
        self.meta_values = net.depends(self.meta)

    def _ones(self, name: str, *shape: int) -> Ref:
        ref = self._zeros(name, *shape)
        ref.tensor().fill_(1)
        return ref

    def _stats(self, step: int, side: int) -> dict[str, tuple[Ref, Ref]]:
        return {
            name: (mean[step, side], rstd[step, side]) for name, (mean, rstd) in self.memory.stats.items()
        }

    def _meta_gradients(self, name: str, step: int, event: int) -> tuple[Ref, Gradients]:
        rows = {norm: (w[step, event], b[step, event]) for norm, (w, b) in self.events.items()}
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
        self._finish(self.meta_layout.views(adjoint))

    def _target_pass(self, k: int, theta: Mapping[str, Ref]) -> Ref:
        """w_k ∇T_k(θ_{k+1}), flat."""
        em, m = self.em, self.memory
        goal = Goal(m.target_t, m.weights[k] if self.form.multi_step else None, want_loss=True)
        ps = self.start(self.net, m.target_x, k, theta, self._stats(k, 1), goal)
        self.forward(self.net, ps)
        em.label = "loss"
        value = self.loss.of_pass(em, ps, self.net.output)
        assert value.loss is not None
        first = k == 0 or not self.form.multi_step
        em.call(aten.copy_.default if first else aten.add_.Tensor, m.losses, value.loss)
        if k == self.form.steps - 1:
            em.call(aten.copy_.default, m.logits, ps.values[self.net.output])
        flat, out = self._meta_gradients("target gradient", k, 0)
        self.backward(self.net, ps, value.grad, out)
        self.complete(out)
        return flat

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
        for step in self.net.steps:
            if step.output in self.inner_values:
                em.label = step.name
                step.tangent(em, ps)
        em.label = "loss"
        grad_dot = self.loss.tangent_of_pass(em, ps, self.net.output)
        product, out = self._meta_gradients("Hessian-vector product", k, 1)
        self.backward(self.net, ps, grad_dot, out, tangent=True)
        em.label = "adjoint"
        self.complete(out)
        return em.sum("adjoint", [adjoint, product])

    def _direction(self, k: int, grads: Ref, adjoint: Ref) -> Ref:
        """−v = −α_k ∘ λ, the derivative of the update by its gradient; leaves ∂L/∂α_k = −⟨g_k, λ⟩."""
        direction = self.inner_layout.new(self.em, "direction")
        inner = adjoint[: self.inner_layout.size]
        self.em.call(
            ops.lslr_update_backward_out.default,
            *(inner, grads, self.memory.rates, self.segments, self.rate_row(k), direction, self.rate_terms),
        )
        return direction

    def _finish(self, adjoint: Mapping[str, Ref]) -> None:
        """Adds this group of tasks to the gradients."""
        em, f, m = self.em, self.form, self.memory
        em.phase, em.label = Phase("finish"), "parameters"
        for name, out in m.meta_grads.items():
            total = em.like(f"meta-gradient of {name}", out)
            em.call(aten.sum.IntList_out, adjoint[name], [0], out=total)
            em.call(aten.add_.Tensor, out, total, alpha=1 / f.total_tasks)
        em.call(aten.add_.Tensor, m.rate_grads, self.rate_terms, alpha=1 / f.total_tasks)
        em.label = "batch-norm rows"
        for name, rows in self.rows.items():
            shares = torch.zeros(rows.rows, f.steps, 2, f.tasks, dtype=em.dtype, device=em.device)
            for k in range(f.steps):
                shares[min(k, rows.rows - 1), k] = 1 / f.total_tasks
            factors = em.own(f"{name} shares", shares.flatten(1))
            for out, terms in zip(m.row_grads[name], self.events[name], strict=True):
                em.call(aten.addmm_.default, out, factors, terms.reshape(-1, rows.channels))


class _Evaluation(_Writer):
    def __init__(self, em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form) -> None:
        super().__init__(em, net, target_net, loss, form, every_step=True)
        for name in net.frozen | target_net.frozen:
            shape = (form.steps, self.rows[name].channels)
            self.memory.running[name] = (
                self._zeros(f"{name} means", *shape),
                self._zeros(f"{name} variances", *shape),
            )

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
            ps = self.start(self.target_net, self.memory.target_x, k, theta, self._stats(self.target_net, k))
            self.forward(self.target_net, ps)
            self.em.call(aten.copy_.default, self.memory.logits[k], ps.values[self.target_net.output])


def write_meta_gradient(em: Emitter, net: Network, loss: Loss, form: Form) -> Written:
    """The program of one group of tasks of a meta-gradient."""
    return _MetaGradient(em, net, loss, form).finish()


def write_evaluation(em: Emitter, net: Network, target_net: Network, loss: Loss, form: Form) -> Written:
    """The program of one group of tasks of an evaluation; ``target_net`` may normalise with running statistics."""
    return _Evaluation(em, net, target_net, loss, form).finish()
