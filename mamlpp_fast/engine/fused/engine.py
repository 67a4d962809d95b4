"""The fused engine as the learner sees it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.engine.fused.network import Network, lower
from mamlpp_fast.engine.fused.program import Emitter, Program, Workspace
from mamlpp_fast.engine.fused.running import RunningStats
from mamlpp_fast.engine.fused.steps import CrossEntropy, Loss, Rows, Slot, SquaredError, with_head
from mamlpp_fast.engine.fused.sweep import ALL_RATES, Form, Memory, write_evaluation, write_meta_gradient
from mamlpp_fast.engine.fused.trace import Unsupported, trace
from mamlpp_fast.engine.graph import graphed
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.ops._library import OPERATIONS, served_by
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult

__all__ = ["FusedEngine", "MemoryOption"]

MemoryOption = Literal["auto", "keep", "recompute"]
Precision = Literal["float64", "float32", "tf32", "bfloat16"]

# Channels of a float64 vector register: below, float32 leaves lanes empty and saves nothing.
_NARROW = 8

# Tasks of a group where their number must not follow that of threads: sums over tasks are taken group by group.
_DETERMINISTIC_GROUP = 2


@dataclass
class Prepared:
    """A program of one form, ready to run."""

    program: Program
    memory: Memory
    network: Network
    slots: dict[str, Slot]
    rows: dict[str, Rows]
    form: Form
    running: list[tuple[str, RunningStats]]
    losses: Tensor
    logits: Tensor


class FusedEngine:
    """Meta-gradients by an explicit adjoint over all tasks at once, from operations on fixed buffers.

    Args:
        model: built from the modules that :func:`mamlpp_fast.engine.fused.trace.trace` knows.
        rates: inner learning rates; their names say what adapts.
        config: not read beyond what ``rates`` holds; kept for a uniform signature.
        loss_fn: ``F.cross_entropy``, ``functools.partial`` of it with ``label_smoothing``, ``F.mse_loss``, or
            the modules of these.
        precision: ``"bfloat16"`` rounds the operands of convolutions and accumulates in float32. ``"float32"`` is
            computed in float64, and rounded at the end, where no convolution has more than 8 channels: that costs
            little there.
        memory: ``"keep"`` the activations of all support passes, or ``"recompute"`` them in the reverse sweep.
        group: tasks that advance together; fewer need less memory and more launches. None: chosen for the device.
        deterministic: the same bits on any number of CPU threads: ``group`` is not chosen by their number, and what
            torch computes runs on one of them.

    Raises:
        Unsupported: names the module that has no rules.
    """

    name = "fused"

    def __init__(
        self,
        model: nn.Module,
        rates: LSLR,
        config: MAMLConfig,
        loss_fn: LossFn = F.cross_entropy,
        *,
        precision: Precision = "float32",
        memory: MemoryOption = "auto",
        group: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model = model
        self.rates = rates
        self.loss = _loss(loss_fn)
        self.nodes, self.output = trace(model)
        self.adapted = frozenset(rates.names)
        self.trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        self.precision = precision
        self.memory = memory
        self.group = group
        self.deterministic = deterministic and next(model.parameters()).device.type == "cpu"
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.inner_dtype = torch.float64 if precision == "float32" and self._is_narrow() else self.dtype
        self.workspace = Workspace(self.device)
        self._prepared: dict[tuple[object, ...], Prepared] = {}
        self._gradients: dict[str, Tensor] = {}
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters())

        self._step = graphed(self._iterate, preserve=model.buffers)
        self._captured_generation = 0

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        """See :class:`mamlpp_fast.engine.Engine`."""
        self.model.train()
        self._check(batch)
        self.prepare(batch, step_weights is not None, second_order)
        if self.workspace.generation != self._captured_generation:
            # Graphs captured before the workspace moved would write to memory that is no longer ours.
            self._step = graphed(self._iterate, preserve=self.model.buffers)
            self._captured_generation = self.workspace.generation
        fields = (batch.support_x, batch.support_y, batch.target_x, batch.target_y)
        with self._arithmetic():
            losses, logits = self._step(fields, step_weights, second_order)
        for p, gradient in self._gradient_buffers():
            p.grad = gradient
        task_losses = losses.clone()
        return MetaResult(task_losses.mean(), task_losses, logits.clone())

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        """See :class:`mamlpp_fast.engine.Engine`."""
        self.model.eval()
        self._check(batch)
        prepared = self.prepare_evaluation(batch, steps, stats)
        self._load_parameters(prepared)
        for tasks in self._groups(prepared, batch.num_tasks):
            self._load_batch(
                prepared, (batch.support_x, batch.support_y, batch.target_x, batch.target_y), tasks
            )
            prepared.program.run()
            prepared.logits[:, tasks].copy_(prepared.memory.logits.tensor())
        return prepared.logits.clone()

    @property
    def generation(self) -> int:
        """Changes when the workspace moves: graphs captured before must not be replayed."""
        return self.workspace.generation

    def explain(self) -> str:
        """What has been prepared so far: forms, memory, operations and bytes of every step."""
        served = ", ".join(
            f"{name}: {served_by(name, self.device.type.upper())}" for name in sorted(OPERATIONS)
        )
        lines = [f"kernels on {self.device}: {served}"]
        if self.inner_dtype != self.dtype:
            lines.append(
                f"computed in float64 and rounded at the end: no layer has more than {_NARROW} channels"
            )
        for prepared in self._prepared.values():
            f, program = prepared.form, prepared.program
            option = "recomputed in the reverse sweep" if f.recompute else "kept"
            lines += [
                f"{f.total_tasks} tasks in groups of {f.tasks}, {f.support} support and {f.targets} target images, "
                f"{f.steps} steps, {'second' if f.second_order else 'first'} order; support activations {option}",
                f"workspace {program.workspace_bytes / 2**20:.1f} MiB, "
                f"other buffers {program.owned_bytes / 2**20:.1f} MiB, "
                f"{program.flops * f.total_tasks / f.tasks / 1e9:.2f} GFLOP, {len(program.instructions)} calls a group",
                prepared.network.table(f.tasks * f.support),
                program.table(),
            ]
        return "\n".join(lines)

    def prepare(self, batch: EpisodeBatch, multi_step: bool, second_order: bool) -> Prepared:
        """The program for batches of this form: written, placed and bound on first use, reused afterwards."""
        key = ("train", multi_step, second_order, self._group_limit(), *_shapes(batch))
        if key not in self._prepared:
            network = self._lower(batch, lambda module: True)
            self._prepared[key] = self._fit(
                batch.num_tasks,
                lambda tasks, recompute: self._write_training(
                    network, batch, tasks, multi_step, second_order, recompute
                ),
                second_order,
            )
        prepared = self._prepared[key]
        prepared.program.bind(self.workspace)
        return prepared

    def prepare_evaluation(self, batch: EpisodeBatch, steps: int, stats: EvalStats) -> Prepared:
        """Like :meth:`prepare`, for :meth:`evaluate`."""
        key = ("evaluate", steps, stats, self._group_limit(), *_shapes(batch))
        if key not in self._prepared:
            self._prepared[key] = self._fit(
                batch.num_tasks,
                lambda tasks, recompute: self._write_evaluation(batch, tasks, steps, stats),
                False,
            )
        prepared = self._prepared[key]
        prepared.program.bind(self.workspace)
        return prepared

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Whether float32 products on a GPU may round their operands to tf32."""
        if self.device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.precision == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    def _check(self, batch: EpisodeBatch) -> None:
        if batch.support_x.ndim < 3 or (batch.support_x.ndim != 5 and self._takes_images()):
            form = "images [tasks, n, C, H, W]" if self._takes_images() else "features [tasks, n, F]"
            raise ValueError(f"support_x: expected {form}, got {tuple(batch.support_x.shape)}")
        if batch.support_x.shape[2:] != batch.target_x.shape[2:]:
            raise ValueError(
                f"target_x: expected examples of shape {tuple(batch.support_x.shape[2:])} like support_x, "
                f"got {tuple(batch.target_x.shape[2:])}"
            )
        self.loss.check("support_y", batch.support_y)
        self.loss.check("target_y", batch.target_y)

    def _lower(self, batch: EpisodeBatch, batch_stats: Callable[[nn.Module], bool]) -> Network:
        example = tuple(batch.support_x.shape[2:])
        network = lower(self.nodes, self.output, self.model, example, self.adapted, batch_stats)
        return with_head(network, self.loss)

    def _form(self, batch: EpisodeBatch, tasks: int, steps: int, **options: bool) -> Form:
        return Form(
            tasks=tasks,
            total_tasks=batch.num_tasks,
            support=batch.support_x.shape[1],
            targets=batch.target_x.shape[1],
            steps=steps,
            rate_steps=self.rates.num_steps,
            adapted=self.adapted,
            trainable=self.trainable,
            rate_names=self.rates.names if self.rates.kind == "tensor" else None,
            **options,
        )

    def _takes_images(self) -> bool:
        return any(isinstance(n.module, nn.Conv2d) for n in self.nodes)

    def _is_narrow(self) -> bool:
        widths = [n.module.out_channels for n in self.nodes if isinstance(n.module, nn.Conv2d)]
        return bool(widths) and max(widths) <= _NARROW

    def _emitter(self) -> Emitter:
        return Emitter(
            self.device,
            self.inner_dtype,
            torch.bfloat16 if self.precision == "bfloat16" else None,
            deterministic=self.deterministic,
        )

    def _write_training(
        self,
        network: Network,
        batch: EpisodeBatch,
        tasks: int,
        multi_step: bool,
        second_order: bool,
        recompute: bool,
    ) -> Prepared:
        form = self._form(
            batch,
            tasks,
            self.rates.num_steps,
            multi_step=multi_step,
            second_order=second_order,
            recompute=recompute,
        )
        program, memory = write_meta_gradient(self._emitter(), network, self.loss, form)
        made = torch.ones(form.steps, 2, tasks, dtype=torch.bool)
        if not multi_step:
            made[:-1, 1] = False
        running = []
        for name, (bias, elements) in network.norms.items():
            module = self._modules[name]
            assert isinstance(module, (reference.PerStepBatchNorm2d, nn.BatchNorm2d))
            in_front = None if bias is None else self._parameters[bias]
            images = (form.support, form.targets)
            if min(images) * elements < 2:
                raise ValueError(f"{name}: expected more than one value per channel in training, got 1")
            running.append(
                (
                    name,
                    RunningStats.of(module, in_front, elements, made, images, self.inner_dtype, self.device),
                )
            )
        logits = memory.logits.tensor().to(self.dtype)
        return Prepared(
            program,
            memory,
            network,
            network.slots(),
            network.rows(),
            form,
            running,
            losses=logits.new_zeros(batch.num_tasks),
            logits=logits.new_zeros(batch.num_tasks, *logits.shape[1:]),
        )

    def _write_evaluation(self, batch: EpisodeBatch, tasks: int, steps: int, stats: EvalStats) -> Prepared:
        def by_batch(module: nn.Module) -> bool:
            return not isinstance(module, nn.BatchNorm2d) or module.running_mean is None

        network = self._lower(batch, by_batch)
        target = network
        if stats == "running":
            target = self._lower(
                batch, lambda module: by_batch(module) and isinstance(module, nn.BatchNorm2d)
            )
        form = self._form(batch, tasks, steps, second_order=False)
        program, memory = write_evaluation(self._emitter(), network, target, self.loss, form)
        logits = memory.logits.tensor().to(self.dtype)
        return Prepared(
            program,
            memory,
            network,
            target.slots() | network.slots(),
            target.rows() | network.rows(),
            form,
            [],
            losses=logits.new_zeros(0),
            logits=logits.new_zeros(steps, batch.num_tasks, *logits.shape[2:]),
        )

    def _fit(self, total: int, write: Callable[[int, bool], Prepared], second_order: bool) -> Prepared:
        """Chooses group size and memory option: the fastest that fits in memory."""
        most = self._group_limit() or total
        sizes = [d for d in range(most, 0, -1) if total % d == 0]
        if self.group is not None or self.deterministic:
            sizes = sizes[:1]
        options = {
            "keep": [False],
            "recompute": [second_order],
            "auto": [False, True] if second_order else [False],
        }
        prepared = None
        for tasks in sizes:
            for recompute in options[self.memory]:
                prepared = write(tasks, recompute)
                if prepared.program.workspace_bytes + prepared.program.owned_bytes <= _free_bytes(
                    self.device
                ):
                    return prepared
        assert prepared is not None
        return prepared

    def _group_limit(self) -> int | None:
        """The most tasks of a group; None for any number."""
        if self.group is not None:
            return self.group
        if self.deterministic:
            return _DETERMINISTIC_GROUP
        if self.device.type == "cpu" and self._takes_images():
            return torch.get_num_threads()  # a task per thread keeps what a thread works on in its caches
        return None

    def _groups(self, prepared: Prepared, total: int) -> Iterator[slice]:
        size = prepared.form.tasks
        return (slice(start, start + size) for start in range(0, total, size))

    def _iterate(
        self, fields: tuple[Tensor, Tensor, Tensor, Tensor], step_weights: Tensor | None, second_order: bool
    ) -> tuple[Tensor, Tensor]:
        """One meta-gradient on static buffers: losses [T] and predictions [T, m, O], both overwritten by the next."""
        prepared = self.prepare(EpisodeBatch(*fields), step_weights is not None, second_order)
        m = prepared.memory
        with torch.no_grad():
            self._load_parameters(prepared)
            if step_weights is not None:
                m.weights.tensor().copy_(step_weights)
            for ref in (
                *m.meta_grads.values(),
                *m.rate_grads.values(),
                *(r for pair in m.row_grads.values() for r in pair),
            ):
                ref.tensor().zero_()
            for tasks in self._groups(prepared, fields[0].shape[0]):
                self._load_batch(prepared, fields, tasks)
                prepared.program.run()
                prepared.losses[tasks].copy_(m.losses.tensor())
                prepared.logits[tasks].copy_(m.logits.tensor())
                for name, running in prepared.running:
                    mean, rstd = m.stats[name]
                    running.update(mean.tensor(), rstd.tensor())
            self._store_gradients(prepared)
        return prepared.losses, prepared.logits

    def _load_batch(
        self, prepared: Prepared, fields: tuple[Tensor, Tensor, Tensor, Tensor], tasks: slice
    ) -> None:
        m = prepared.memory
        support_x, support_y, target_x, target_y = (t[tasks] for t in fields)
        for stored, x in ((m.support_x.tensor(), support_x), (m.target_x.tensor(), target_x)):
            stored.copy_(x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x)
        self.loss.load(m.support_t.tensor(), support_y)
        self.loss.load(m.target_t.tensor(), target_y)

    def _load_parameters(self, prepared: Prepared) -> None:
        m = prepared.memory
        with torch.no_grad():
            for name, slot in prepared.slots.items():
                slot.arranged(m.meta[name].tensor()).copy_(slot.arrange(self._parameters[name]))
            for name, rows in prepared.rows.items():
                for ref, source, default in zip(
                    m.rows[name], (rows.weight, rows.bias), (1.0, 0.0), strict=True
                ):
                    stored = ref.tensor()
                    if source is None:
                        stored.fill_(default)
                    else:
                        stored.copy_(self._parameters[source].view(stored.shape))
            for name, source_rates in self._rates_by_slot(prepared, self.rates.rates.detach()):
                stored = m.rates[name].tensor()
                stored.view(source_rates.shape).copy_(source_rates)
            for name, (mean, var) in m.running.items():
                module = self._modules[name]
                for ref, values in ((mean, module.running_mean), (var, module.running_var)):
                    assert isinstance(values, Tensor)
                    table = values.view(-1, values.shape[-1])
                    for k, row in enumerate(ref.tensor()):
                        row.copy_(table[min(k, len(table) - 1)])

    def _rates_by_slot(self, prepared: Prepared, rates: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of the rates (or their gradient) in the order of axes that the program keeps them in."""
        if self.rates.kind == "tensor":
            yield ALL_RATES, rates
            return
        for name, part in zip(self.rates.names, rates.split(self.rates.sizes, dim=1), strict=True):
            if name in prepared.memory.rates:
                slot = prepared.slots[name]
                yield name, part.unflatten(1, slot.split).permute(0, *(1 + i for i in slot.order))

    def _gradient_buffers(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, p in (*self._parameters.items(), (ALL_RATES, self.rates.rates)):
            if p.requires_grad:
                if name not in self._gradients:
                    self._gradients[name] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
                yield p, self._gradients[name]

    def _store_gradients(self, prepared: Prepared) -> None:
        m = prepared.memory
        for _, gradient in self._gradient_buffers():
            gradient.zero_()
        for name, ref in m.meta_grads.items():
            if name in self._gradients:
                slot = prepared.slots[name]
                slot.arrange(self._gradients[name]).copy_(slot.arranged(ref.tensor()))
        for name, rows in prepared.rows.items():
            for ref, source in zip(m.row_grads[name], (rows.weight, rows.bias), strict=True):
                if source in self._gradients:
                    self._gradients[source].view(ref.shape).copy_(ref.tensor())
        if ALL_RATES in self._gradients:
            for name, view in self._rates_by_slot(prepared, self._gradients[ALL_RATES]):
                view.copy_(m.rate_grads[name].tensor().view(view.shape))


def _loss(loss_fn: LossFn) -> Loss:
    """The rules of a loss, which must be known to be a mean over the examples."""
    if loss_fn is F.mse_loss or (type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean"):
        return SquaredError()
    if loss_fn is F.cross_entropy:
        return CrossEntropy()
    if isinstance(loss_fn, functools.partial) and loss_fn.func is F.cross_entropy and not loss_fn.args:
        if loss_fn.keywords.keys() <= {"label_smoothing"}:
            return CrossEntropy(loss_fn.keywords.get("label_smoothing", 0.0))
    elif type(loss_fn) is nn.CrossEntropyLoss:
        plain = (loss_fn.weight, loss_fn.ignore_index, loss_fn.reduction) == (None, -100, "mean")
        if plain:
            return CrossEntropy(loss_fn.label_smoothing)
    raise Unsupported(
        "loss",
        "expected F.cross_entropy (with label_smoothing or without) or F.mse_loss, "
        f"got {getattr(loss_fn, '__name__', loss_fn)}",
    )


def _shapes(batch: EpisodeBatch) -> tuple[tuple[int, ...], ...]:
    return tuple(batch.support_x.shape), tuple(batch.target_x.shape)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**33
