"""The fused engine as the learner sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_fast.engine.fused.rules  # noqa: F401 - fills the table of the lowering
from mamlpp_fast._modes import float32_products, plainly
from mamlpp_fast.engine import base
from mamlpp_fast.engine.base import Precision, Seldom, Unsupported, handed_over
from mamlpp_fast.engine.counts import advance
from mamlpp_fast.engine.fused.form import Form, Written
from mamlpp_fast.engine.fused.fusions import fuse
from mamlpp_fast.engine.fused.losses import RecordedLoss, recorded_loss
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.masks import Masks
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.prepared import Prepared
from mamlpp_fast.engine.fused.program import Emitter, Workspace
from mamlpp_fast.engine.fused.recent import Recent, Visits
from mamlpp_fast.engine.fused.steps import Conv, CrossEntropy, FirstLayer, Generic, Loss, loss_of
from mamlpp_fast.engine.fused.sweep import write_evaluation, write_meta_gradient
from mamlpp_fast.engine.fused.transfer import Gradients, Transfer
from mamlpp_fast.engine.graph import capturing, graphed
from mamlpp_fast.engine.record import Recording, record
from mamlpp_fast.engine.running import RunningStats, made_passes
from mamlpp_fast.engine.verify import check_evaluation, check_meta_gradient, sample
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.inputs import examples_of, form_of_inputs, mapped, named, structure_of
from mamlpp_fast.labels import family, ignored_label
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.machine import free_bytes, release_memory
from mamlpp_fast.ops._library import OPERATIONS, served_by
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult

__all__ = ["FusedEngine", "MemoryOption", "Prepared"]

MemoryOption = Literal["auto", "keep", "recompute"]
_Option = Literal["paired", "keep", "recompute"]
_Key = tuple[object, ...]

# Channels of a float64 vector register: below, float32 leaves lanes empty and saves nothing.
_NARROW = 8


class FusedEngine:
    """Meta-gradients by an explicit adjoint over all tasks at once, from operations on fixed buffers.

    The model's forward is recorded at the first batch of a form, lowered, and written down as a program; the first
    meta-gradient of every form is compared with the reference loop's in float64.

    Args:
        model: in the form that it will be called in; a changed one needs a new engine.
        rates: inner learning rates; their names say what adapts.
        loss_fn: (predictions, labels) to a scalar. ``F.cross_entropy``, ``functools.partial`` of it with
            ``label_smoothing``, ``F.mse_loss`` and the modules of these have rules; others are recorded.
        precision: ``"bfloat16"`` rounds the operands of convolutions and accumulates in float32; on a CPU those of
            layers that are faster for it. ``"float32"`` is
            computed in float64, and rounded at the end, where no convolution has more than 8 channels: that costs
            little there.
        memory: ``"keep"`` the activations of all support passes, on a GPU those of target passes too where they share
            calls with support passes, if there is room; or ``"recompute"`` them in the reverse sweep.
        group: tasks that advance together; fewer need less memory and more launches. None: chosen for the device.
        deterministic: the same bits on any number of CPU threads, also without convolutions (with them anyway): what
            torch computes runs on one of them.
        verify: compare the first results of every form with the reference loop in float64.
        waits: once many forms of batches have come, a further one has a program when it has come often, and none
            before.

    Raises:
        Unsupported: for a loss with hooks; by the other methods, names what of model or loss is no fixed list of
            operations. Its subclass :class:`mamlpp_fast.engine.base.Seldom` where ``waits`` is why.
    """

    name = "fused"

    def __init__(
        self,
        model: nn.Module,
        rates: LSLR,
        loss_fn: LossFn = F.cross_entropy,
        *,
        precision: Precision = "float32",
        memory: MemoryOption = "auto",
        group: int | None = None,
        deterministic: bool = False,
        verify: bool = True,
        waits: bool = False,
    ) -> None:
        self.model = model
        self.rates = rates
        self.loss_fn = loss_fn
        self._plain_loss = loss_of(loss_fn)
        self._losses: Recent[_Key, RecordedLoss] = Recent()
        self.adapted = frozenset(rates.names)
        self.trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        self.precision = precision
        self.memory = memory
        self.group = group
        self.verify = verify
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.deterministic = deterministic and self.device.type == "cpu"
        self.workspace = Workspace(self.device)
        self._recordings: Recent[_Key, Recording] = Recent()
        self._networks: Recent[_Key, Network] = Recent()
        self._prepared: Recent[_Key, Prepared] = Recent()
        self._visits = Visits() if waits else None
        self._gone = 0
        # Not looked up again: a thread's first parallel region may change what torch says its number of threads is.
        self._current: Prepared | None = None
        self._unchecked: dict[_Key, Callable[[EpisodeBatch], bool]] = {}
        self._gradients = Gradients(model, rates)
        self._tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._step = graphed(self._iterate, preserve=model.buffers)
        self._captured_generation = 0

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        """See :class:`mamlpp_fast.engine.Engine`."""
        self._current = self.prepare(batch, step_weights is not None, second_order)
        if self.generation != self._captured_generation:
            # Graphs captured before the workspace moved would write to memory that is no longer ours.
            self._step = graphed(self._iterate, preserve=self.model.buffers)
            self._captured_generation = self.generation
        with float32_products(self.device, tf32=self.precision == "tf32"):
            losses, logits = self._step(batch, step_weights, second_order)
        if counts := self._current.network.counts:  # on a CPU alone, where no graph is captured
            passes = int(made_passes(self.rates.num_steps, step_weights is not None).sum())
            advance(self.model, counts, passes * batch.num_tasks)
        self._gradients.hand_over()
        task_losses = losses.clone()
        return MetaResult(task_losses.mean(), task_losses, logits.clone())

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        """See :class:`mamlpp_fast.engine.Engine`."""
        self.model.eval()
        prepared = self.prepare_evaluation(batch, steps, stats)
        with torch.no_grad(), float32_products(self.device, tf32=self.precision == "tf32"):
            prepared.run(batch)
        advance(self.model, prepared.network.counts, 2 * steps * batch.num_tasks)
        return prepared.logits.clone()

    @property
    def generation(self) -> int:
        """See :class:`mamlpp_fast.engine.Engine`."""
        return self.workspace.generation + self._gone

    def explain(self) -> str:
        """What has been prepared so far: forms, memory, operations and bytes of every step."""
        served = ", ".join(
            f"{name}: {served_by(name, self.device.type.upper())}" for name in sorted(OPERATIONS)
        )
        lines = [f"kernels on {self.device}: {served}"]
        for prepared in self._prepared.values():
            f, program = prepared.form, prepared.program
            lanes = f", {prepared.lanes} at once on lanes" if prepared.threads else ""
            option = "recomputed in the reverse sweep" if f.recompute else "kept"
            if any(i.name.endswith("_shared") for i in program.instructions):
                option += ", with those of target passes, each one pass with the next support pass"
            if self._inner_dtype(prepared.network) != self.dtype:
                lines.append(
                    f"computed in float64 and rounded at the end: no layer has more than {_NARROW} channels"
                )
            if self.precision == "bfloat16":
                lines.append(prepared.rounding)
            lines += [
                f"{f.total_tasks} tasks in groups of {f.tasks}{lanes}, "
                f"{f.support} support and {f.targets} target images, "
                f"{f.steps} steps, {'second' if f.second_order else 'first'} order; support activations {option}",
                f"workspace {prepared.workspace_bytes / 2**20:.1f} MiB, "
                f"other buffers {prepared.owned_bytes / 2**20:.1f} MiB, "
                f"{program.flops * f.total_tasks / f.tasks / 1e9:.2f} GFLOP, {len(program.instructions)} calls a group",
                prepared.network.table(f.tasks * f.support),
                program.table(),
            ]
        return "\n".join(lines)

    def prepare(self, batch: EpisodeBatch, multi_step: bool, second_order: bool) -> Prepared:
        """The program for batches of this form: recorded, written, placed and checked on first use, reused afterwards.

        Raises:
            Unsupported: names what of the model has no rules, or which result is not the reference's.
        """
        self.model.train()
        plain = self._check(batch)
        key = ("train", multi_step, second_order, torch.get_num_threads(), plain is None, *batch.form)
        if self._new(key):
            network = self._lower(batch, plain, training=True)
            if network.frozen:
                raise Unsupported(
                    next(iter(network.frozen)), "normalises with running statistics in training"
                )

            def write(given: EpisodeBatch, tasks: int, option: _Option, exact: bool = False) -> Prepared:
                options = {"multi_step": multi_step, "second_order": second_order}
                options |= {name: option == name for name in ("recompute", "paired")}
                form = self._form(given, tasks, self.rates.num_steps, **options)
                own = self._lower(given, plain, training=True)  # a check has fewer examples
                loss = self._loss(given, own, plain)
                with handed_over(self.model):
                    written = write_meta_gradient(self._emitter(own, exact), own, loss, form)
                return self._ready(written, own, own, loss, form, exact)

            options: list[_Option] = ["keep", "recompute"]
            if self.memory != "auto":
                options = [self.memory]
            if not second_order:
                options = ["keep"]
            if options[0] == "keep" and base.launches_cost(self.device):
                options.insert(0, "paired")
            if self.verify:
                about = self.model, self.rates, self.loss_fn
                self._unchecked[key] = lambda task: check_meta_gradient(
                    self._alone(write(task, 1, options[0], True)), *about, task
                )
            self._keep(key, self._fit(batch, network, write, options))
        return self._checked(key, batch)

    def prepare_evaluation(self, batch: EpisodeBatch, steps: int, stats: EvalStats) -> Prepared:
        """Like :meth:`prepare`, for :meth:`evaluate`."""
        plain = self._check(batch)
        key = ("evaluate", steps, stats, torch.get_num_threads(), plain is None, *batch.form)
        if self._new(key):
            network = self._lower(batch, plain, training=False)

            def write(given: EpisodeBatch, tasks: int, option: _Option, exact: bool = False) -> Prepared:
                form = self._form(given, tasks, steps, second_order=False)
                own = self._lower(given, plain, training=False)
                running = stats == "running"
                target = self._lower(given, plain, training=False, running=True) if running else own
                loss = self._loss(given, own, plain)
                with handed_over(self.model):
                    written = write_evaluation(self._emitter(own, exact), own, target, loss, form)
                return self._ready(written, own, target, loss, form, exact)

            if self.verify:
                about = self.model, self.rates, self.loss_fn
                self._unchecked[key] = lambda task: check_evaluation(
                    self._alone(write(task, 1, "keep", True)), *about, task, steps, stats
                )
            self._keep(key, self._fit(batch, network, write, ["keep"]))
        return self._checked(key, batch)

    def _new(self, key: _Key) -> bool:
        """Whether a form has no program, and is to have one.

        Raises:
            Seldom: where it is not to have one yet.
        """
        if key in self._prepared:
            return False
        if self._visits is not None and not self._visits.pays(key):
            raise Seldom("batch", self._visits.why)
        return True

    def _keep(self, key: _Key, prepared: Prepared) -> None:
        before = len(self._prepared)
        self._prepared[key] = prepared
        self._unchecked = {k: check for k, check in self._unchecked.items() if k in self._prepared}
        self._gone += before == len(self._prepared)  # what was captured of the one that went is of no use

    def _checked(self, key: _Key, batch: EpisodeBatch) -> Prepared:
        """The program of a form, with memory; compared with the reference until a batch was good for that."""
        if key in self._unchecked and not capturing():
            check = self._unchecked[key]
            if check(sample(batch, self._prepared[key].network)):
                del self._unchecked[key]
            release_memory()  # the graph of a loop in float64
        prepared = self._prepared[key]
        prepared.bind(self.workspace)
        return prepared

    def _alone(self, prepared: Prepared) -> Prepared:
        """With memory of its own."""
        prepared.bind(Workspace(self.device))
        return prepared

    def _check(self, batch: EpisodeBatch) -> Loss | None:
        """The loss of a batch, as :meth:`_plain`.

        Raises:
            Unsupported, ValueError: examples or labels do not fit.
        """
        if form_of_inputs(batch.support_x, 2) != form_of_inputs(batch.target_x, 2):
            raise _unlike(batch)
        plain = self._plain(batch)
        if plain is not None:
            plain.check("support_y", batch.support_y)
            plain.check("target_y", batch.target_y)
        return plain

    def _plain(self, batch: EpisodeBatch) -> Loss | None:
        """The loss where it has rules of its own that take the labels of a batch; values are read on a CPU alone."""
        loss, sides = self._plain_loss, (batch.support_y, batch.target_y)
        if isinstance(loss, CrossEntropy):
            for y in sides:
                if y.ndim != 2:  # a class for each of several parts of an example, or shares of classes
                    return None
                if not y.is_cuda and bool((y == ignored_label(self.loss_fn)).any()):
                    return None
        elif any(y.ndim != 3 for y in sides):
            return None
        return loss

    def _loss(self, batch: EpisodeBatch, network: Network, plain: Loss | None) -> Loss:
        """The loss for predictions and labels like those of a batch: by its own rules, or as it is recorded.

        Args:
            plain: of :meth:`_plain`; its rules are for predictions [N, O].

        Raises:
            Unsupported: for labels that PyTorch would broadcast, and names what makes it no list of operations.
        """
        outputs = network.shapes[network.output]
        if plain is not None and len(outputs) == 1:
            return plain
        if family(self.loss_fn) == "values" and batch.support_y.shape[2:] != outputs:
            sizes = ", ".join(map(str, ("tasks", "n", *outputs)))
            got = list(batch.support_y.shape)
            raise Unsupported("labels", f"expected a target for each prediction [{sizes}], got {got}")
        labels = (part for y in (batch.support_y, batch.target_y) for part in (y.shape[1:], y.dtype))
        key = self.model.training, outputs, *labels  # by the mode, which a loss may ask for
        if key not in self._losses:
            sides = (outputs, batch.support_y[0]), (outputs, batch.target_y[0])
            self._losses[key] = recorded_loss(self.loss_fn, sides, self.dtype, self.model)
        return self._losses[key]

    def _lower(
        self, batch: EpisodeBatch, loss: Loss | None, *, training: bool, running: bool = False
    ) -> Network:
        """The fused network of the model in training or evaluation mode, for examples like those of a batch."""
        examples = tuple(form_of_inputs(x, 1) for x in (batch.support_x, batch.target_x))
        if (training, *examples) not in self._recordings:
            self.model.train(training)
            task = batch[0]
            x, other = task.support_x, task.target_x
            fixed = examples_of(x) == examples_of(other)
            if fixed:
                other = mapped(lambda t: torch.cat([t, t[:1]]), x)
            with plainly(), handed_over(self.model):  # passes through the model itself are among it
                recording = record(self.model, x, other, fixed=fixed)
            if recording.draws is not None and self.device.type != "cpu":
                # A captured draw there would be another operator's than the one that was recorded.
                raise Unsupported(type(self.model).__name__, f"{recording.draws}, which is for a CPU alone")
            if recording.counts and self.device.type != "cpu":
                raise Unsupported(type(self.model).__name__, "counts its calls, which no captured graph does")
            self._recordings[training, *examples] = recording
        key = training, running, loss, *examples
        if key not in self._networks:
            recording = self._recordings[training, *examples]
            self._networks[key] = fuse(lower(recording, self.model, self.adapted, running), loss)
        network = self._networks[key]
        if not training and any(norm.statistics is not None for norm in network.norms.values()):
            raise Unsupported(type(self.model).__name__, "updates running statistics in evaluation")
        if network.output not in network.depends(self.adapted):
            raise Unsupported("output", "expected predictions that depend on parameters that adapt")
        return network

    def _form(self, batch: EpisodeBatch, tasks: int, steps: int, **options: bool) -> Form:
        return Form(
            tasks=tasks,
            total_tasks=batch.num_tasks,
            support=batch.support_y.shape[1],
            targets=batch.target_y.shape[1],
            labels=(batch.support_y.shape[1:], batch.target_y.shape[1:]),
            label_dtype=batch.support_y.dtype,
            steps=steps,
            rate_steps=self.rates.num_steps,
            adapted=self.adapted,
            trainable=self.trainable,
            rate_names=self.rates.names if self.rates.kind == "tensor" else None,
            **options,
        )

    def _inner_dtype(self, network: Network) -> torch.dtype:
        """float64 for float32 where convolutions are narrow."""
        widths = [s.shape[-1] for s in network.steps if isinstance(s, (Conv, FirstLayer))]
        generic = any(isinstance(s, Generic) for s in network.steps)
        narrow = bool(widths) and max(widths) <= _NARROW and not generic
        return torch.float64 if self.precision == "float32" and narrow else self.dtype

    def _emitter(self, network: Network, exact: bool) -> Emitter:
        rounded = self.precision == "bfloat16" and not exact
        return Emitter(
            self.device,
            torch.float64 if exact else self._inner_dtype(network),
            torch.bfloat16 if rounded else None,
        )

    def _ready(
        self, written: Written, network: Network, target: Network, loss: Loss, form: Form, exact: bool
    ) -> Prepared:
        memory = written.memory
        transfer = Transfer(self.model, self.rates, loss, written, target.frozen | network.frozen)
        running = {}
        made = made_passes(form.steps, form.multi_step)
        table = memory.table.tensor()
        for name, norm in network.norms.items() if "losses" in memory.all else ():
            counts = (form.support * norm.elements, form.targets * norm.elements)
            kept = norm.statistics
            if kept is not None:
                running[name] = RunningStats.of(
                    (kept.mean, kept.var, kept.counted, norm.bias),
                    rows=kept.rows,
                    channels=memory.all[name, "mean"].shape[-1],
                    momentum=kept.momentum,
                    eps=kept.eps,
                    made=made,
                    tasks=form.total_tasks,
                    counts=counts,
                    # A matrix product takes them in, which a GPU may round to TF32 in float32.
                    like=table.double(),
                )
        shape = memory.all["logits"].shape[1:]
        axis = 0 if "losses" in memory.all else 1
        sizes = (*shape[:axis], form.total_tasks, *shape[axis + 1 :])
        dtype = torch.promote_types(self.dtype, table.dtype) if exact else self.dtype
        return Prepared(
            written.program,
            written.finish,
            memory,
            network,
            form,
            transfer,
            running,
            Masks(memory.masks.values(), form.tasks, form.total_tasks // form.tasks),
            table.new_zeros(form.total_tasks, dtype=dtype),
            table.new_zeros(sizes, dtype=dtype),
            axis,
            torch.get_num_threads() if self._on_lanes(network) else 0,
        )

    def _fit(
        self,
        batch: EpisodeBatch,
        network: Network,
        write: Callable[[EpisodeBatch, int, _Option], Prepared],
        options: Sequence[_Option],
    ) -> Prepared:
        """Chooses group size, one of the options and number of lanes: the fastest that fits in memory."""
        most = self.group or (1 if self._convolves(network) else batch.num_tasks)
        sizes = [d for d in range(most, 0, -1) if batch.num_tasks % d == 0]
        if self.group is not None or self.deterministic:
            sizes = sizes[:1]
        prepared = None
        for tasks in sizes:
            first, *others = options
            written = {first: write(batch, tasks, first)}
            for lanes in range(max(1, min(written[first].threads, written[first].groups)), 0, -1):
                for option in (first, *others):
                    if option not in written:
                        written[option] = write(batch, tasks, option)
                    prepared = written[option]
                    prepared.lanes = lanes
                    if prepared.workspace_bytes + prepared.owned_bytes <= free_bytes(self.device):
                        return prepared
        assert prepared is not None
        return prepared

    def _convolves(self, network: Network) -> bool:
        """On a CPU, where a thread then works on a task at a time: what it works on stays in its caches."""
        return self.device.type == "cpu" and any(s.convolves for s in network.steps)

    def _on_lanes(self, network: Network) -> bool:
        return self.deterministic or self._convolves(network)

    def _iterate(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> tuple[Tensor, Tensor]:
        """One meta-gradient on static buffers: losses [T] and predictions [T, m, O], both overwritten by the next."""
        prepared = self._current
        assert prepared is not None
        with torch.no_grad():
            prepared.run(batch, self._tensors, self._gradients, step_weights=step_weights)
        return prepared.losses, prepared.logits


def _unlike(batch: EpisodeBatch) -> Unsupported:
    """In what the inputs of the targets differ from those of the support."""
    if structure_of(batch.support_x) == structure_of(batch.target_x):
        pairs = zip(named("support_x", batch.support_x), named("target_x", batch.target_x), strict=True)
        for (like, x), (name, t) in pairs:
            if (x.shape[2:], x.dtype) != (t.shape[2:], t.dtype):
                return Unsupported(
                    name,
                    f"expected examples of shape {tuple(x.shape[2:])} and {x.dtype} like {like}, "
                    f"got {tuple(t.shape[2:])} and {t.dtype}",
                )
    return Unsupported("target_x", "expected inputs in the form of those of support_x")
