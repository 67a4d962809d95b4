"""The sweep, written down as a program: inner steps forward, then the adjoint backward with Hessian-vector products.

Notation of ``docs/engine.md``: fast weights θ_k, support gradients g_k, rates α_k, multi-step weights w_k, adjoint λ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

import mamlpp_fast.ops.lslr_update  # noqa: F401 - registers the operations
from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.finish import Finish, Key, Row
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.form import Form, Memory, Written
from mamlpp_fast.engine.fused.masks import PassMasks
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.pairs import can_pair, part
from mamlpp_fast.engine.fused.passes import clear_missing, write_backward, write_forward, write_tangent
from mamlpp_fast.engine.fused.program import Emitter, Phase, Ref
from mamlpp_fast.engine.fused.steps import Goal, Gradients, Loss, Pass, Rows, Slot
from mamlpp_fast.engine.fused.steps.base import aten

__all__ = ["write_evaluation", "write_meta_gradient"]


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
        same = net.depends(self.meta) == self.inner_values
        self.paired = same and can_pair(net, form, em.dtype.itemsize)
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

    def _zeros(self, name: str, *shape: int, dtype: torch.dtype | None = None, each: bool = False) -> Ref:
        stored = torch.zeros(shape, dtype=dtype or self.em.dtype, device=self.em.device)
        return self.em.own(name, stored, each=each)

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
        xs, ts = {}, {}
        if self.paired:
            self.both = both = (
                self._examples("all", f.support, 2 * f.tasks),
                self._labels("all labels", outputs, f.labels[0], 2 * f.tasks),
            )
            for role, side in enumerate(("target", "support")):
                tasks = slice(role * f.tasks, (role + 1) * f.tasks)
                xs[side], ts[side] = tuple(x[tasks] for x in both[0]), both[1][tasks]
        else:
            for side, count, labels in (
                ("support", f.support, f.labels[0]),
                ("target", f.targets, f.labels[1]),
            ):
                xs[side] = self._examples(side, count, f.tasks)
                ts[side] = self._labels(f"{side} labels", outputs, labels, f.tasks)
        memory = Memory(
            support_x=xs["support"],
            target_x=xs["target"],
            support_t=ts["support"],
            target_t=ts["target"],
            weights=self._zeros("step weights", f.steps),
            rates=self._zeros("rates", *self._rates_shape()),
            row=flat,
            table=table,
            all=row.views(table),
        )
        if self.loss.asks:
            memory.answers = self.em.own("answers", torch.ones(f.tasks, dtype=torch.bool), each=True)
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

    def _labels(self, name: str, outputs: tuple[int, ...], labels: tuple[int, ...], tasks: int) -> Ref:
        shape, dtype = self.loss.stored(outputs, labels, self.form.label_dtype, self.em.dtype)
        return self._zeros(name, tasks, *shape, dtype=dtype, each=True)

    def _examples(self, side: str, count: int, tasks: int) -> tuple[Ref, ...]:
        return tuple(
            self._zeros(
                f"{side} images",
                *(tasks, count, *self.net.shapes[i]),
                dtype=None if kind.is_floating_point else kind,
                each=True,
            )
            for i, kind in enumerate(self.net.inputs)
        )

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
            answers=self.memory.answers,
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

    def gradients(self, layout: Layout, name: str, values: frozenset[int]) -> tuple[Ref, Gradients]:
        """A flat buffer for the gradients of the parameters of ``layout``, and what a backward pass fills it by."""
        flat = layout.new(self.em, name)
        return flat, Gradients(values, frozenset(layout.names), memory=layout.views(flat))

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
        self._terms: dict[int, Ref] = {}
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

    def _meta_gradients(self, flat: Ref, step: int, event: int) -> Gradients:
        rows = self._of_pass(self.rows, ("weight", "bias"), step, event)
        return Gradients(self.meta_values, self.meta, row_memory=rows, memory=self.meta_layout.views(flat))

    def _place(self, name: str, k: int, term: int) -> Ref:
        """Where a term of λ in front of step k goes: where calls cost, a row of one table for all of them and g_{k+1}.

        Args:
            name: of the buffer.
            k: the step, -1 for the one behind all.
            term: 0 for G_k, 1 for the Hessian-vector product of step k + 1, 2 for the λ before that, 3 for g_{k+1}.
        """
        em, layout = self.em, self.meta_layout
        if not base.launches_cost(em.device):
            return layout.new(em, name)
        if k not in self._terms:
            step = 64 // em.dtype.itemsize
            size = -(-layout.size // step) * step
            self._terms[k] = em.new(f"terms of the adjoint of step {k}", (4, size))
            if layout.has_gaps:
                em.call(aten.zero_.default, self._terms[k])
        return self._terms[k][term, : layout.size]

    def _adjoint(self, k: int, terms: Sequence[Ref | None]) -> Ref:
        """λ in front of step k from its terms, those of :meth:`_place`."""
        rows = [i for i, term in enumerate(terms) if term is not None]
        found = [term for term in terms if term is not None]
        if len(found) == 1:
            return found[0]
        if not base.launches_cost(self.em.device):
            return self.em.sum("adjoint", found[::-1])
        total = self._place("adjoint", k - 1, 2)
        self.em.strided_sums([(total, self._of_table(k, rows), 1.0)])
        return total

    def _of_table(self, k: int, rows: Sequence[int]) -> Ref:
        """Evenly spaced rows."""
        return self._terms[k][rows[0] : rows[-1] + 1 : rows[1] - rows[0], : self.meta_layout.size]

    def write(self) -> None:
        f = self.form
        flat, theta = self.load()
        thetas, support, targets = [theta], [], {}
        for k in range(f.steps):
            self.em.phase = Phase("support", k)
            if self.paired and k > 0:
                targets[k - 1], ps, grads = self._pair(k, theta)
            else:
                ps, grads = self.support_pass(k, theta, self._stats(k, 0))
            assert grads is not None
            support.append((ps, grads))
            flat, theta = self.update(k, flat, theta, grads)
            thetas.append(theta)
            if k == f.steps - 1 or (f.multi_step and not self.paired):
                self.em.phase = Phase("target", k)
                targets[k] = self._target_pass(k, theta)
        adjoint = targets.pop(f.steps - 1)
        product: Ref | None = None
        for k in reversed(range(f.steps)):
            self.em.phase, self.em.label = Phase("reverse", k), "adjoint"
            if k < f.steps - 1:
                adjoint = self._adjoint(k, (targets.get(k), product, adjoint))
            product = self._reverse(k, thetas[k], support[k], adjoint)
        if product is None or not base.launches_cost(self.em.device):
            self.leave(self.left["adjoint"], self._adjoint(-1, (None, product, adjoint)))
        else:
            self._results.append((self.left["adjoint"], self._of_table(-1, (1, 2)), 1.0))
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
        at = k, 0
        if k == self.form.steps - 1:  # whose gradient is λ as it is
            self.leave(self.left["logits"], ps.values[self.net.output])
            at = k - 1, 2
        flat = self._place("target gradient", *at)
        out = self._meta_gradients(flat, k, 0)
        write_backward(self.em, self.net, ps, value.grad, out)
        clear_missing(self.em, out)
        return flat

    def _pair(self, k: int, theta: Mapping[str, Ref]) -> tuple[Ref, Pass, Ref | None]:
        """Target pass k − 1 and support pass k in one: w_{k−1} ∇T_{k−1}(θ_k), and the latter with its gradient."""
        em, m, tasks = self.em, self.memory, self.form.tasks
        loss = self._loss_row(k - 1, roles=2)
        goal = Goal(self.both[1], m.weights, k - 1, want_loss=True, loss=loss, pair=True)
        rows, scratch, stats = {}, {}, {}
        for name, r in self.rows.items():
            first, last = min(k - 1, r.rows - 1), min(k, r.rows - 1)
            which = first if first == last else slice(first, last + 1)
            rows[name] = m.rows[name][0][which], m.rows[name][1][which]
            shape = 2 * tasks, r.channels
            scratch[name] = (
                em.new(f"{name} weight's gradient", shape),
                em.new(f"{name} bias's gradient", shape),
            )
        for name in self.net.norms:
            # [K, 2, T, C]: a target pass's lie in front of the next support pass's.
            lines = slice((2 * k - 1) * tasks, (2 * k + 1) * tasks)
            mean, rstd = (self.left[name, what] for what in ("mean", "rstd"))
            stats[name] = mean.reshape(-1, mean.shape[-1])[lines], rstd.reshape(-1, rstd.shape[-1])[lines]
        inputs = dict(enumerate(self.both[0]))
        both = Pass(2 * tasks, self.form.support, k, theta, rows, inputs, stats, goal=goal, roles=2)
        write_forward(em, self.net, both)
        flat = self._place("target gradient", k - 1, 0)
        places = self.meta_layout.views_of_each(self._terms[k - 1][::3])
        out = Gradients(self.meta_values, self.meta, row_memory=scratch, memory=places)
        write_backward(em, self.net, both, self.loss.of_pass(em, both, self.net.output).grad, out, keep=True)
        clear_missing(em, out)
        for name, found in scratch.items():
            for what, each in zip(("weight", "bias"), found, strict=True):
                self.leave(self.left[name, what][k - 1, 0], each[:tasks])
        own = self.start(self.net, m.support_x, k, 0, theta, self._stats(k, 0), Goal(m.support_t))
        part(em, both, own, 1)
        return flat, own, self._terms[k - 1][3, : self.inner_layout.size]

    def _loss_row(self, k: int, roles: int = 1) -> Ref | None:
        """Where a target pass leaves its losses [T], in a table that is summed at the end; None: added one by one."""
        if not base.launches_cost(self.em.device):
            return None
        if self._losses is None:
            rows, step = self.form.steps if self.form.multi_step else 1, 16
            # Kernels take pointers to multiples of 16 bytes.
            most = self.form.tasks * (2 if self.paired else 1)
            self._losses = self.em.new("losses of all steps", (rows, -(-most // step) * step))
        return self._losses[k if self.form.multi_step else 0, : roles * self.form.tasks]

    def _reverse(
        self, k: int, theta: Mapping[str, Ref], support: tuple[Pass, Ref], adjoint: Ref
    ) -> Ref | None:
        """One step of the reverse sweep: the Hessian-vector product that λ becomes less, None in first order."""
        em = self.em
        ps, grads = support
        direction = self._direction(k, grads, adjoint)
        if not self.form.second_order:
            return None
        if self.form.recompute:
            ps, _ = self.support_pass(k, theta, {}, again=True)
        ps.directions = self.inner_layout.views(direction)
        write_tangent(em, self.net, ps, self.inner_values)
        em.label = "loss"
        grad_dot = self.loss.tangent_of_pass(em, ps, self.net.output)
        product = self._place("Hessian-vector product", k - 1, 1)
        out = self._meta_gradients(product, k, 1)
        write_backward(self.em, self.net, ps, grad_dot, out, tangent=True)
        em.label = "adjoint"
        clear_missing(self.em, out)
        return product

    def _direction(self, k: int, grads: Ref, adjoint: Ref) -> Ref:
        """−v = −α_k ∘ λ, the derivative of the update by its gradient; leaves ∂L/∂α_k = −⟨g_k, λ⟩."""
        direction = self.inner_layout.new(self.em, "direction")
        inner = adjoint[: self.inner_layout.size]
        results = direction, self.left["rates"]
        rates = self.memory.rates, self.segments, self.rate_row(k)
        self.em.call(ops.lslr_update_backward_out.default, inner, grads, *rates, *results)
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
