"""A user's model and batch, put into the form that a learner trains."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.distributed import Ranks
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.nn import check_model, convert_batch_norm
from mamlpp_fast.reference import PerStepBatchNorm2d, adapted_names

__all__ = ["adapting", "own_share", "prepared"]

_M = TypeVar("_M", bound=nn.Module)


def prepared(model: _M, config: MAMLConfig, device: torch.device | str | None, dtype: torch.dtype) -> _M:
    """The model, in place, with per-step batch norms, on a device, in a dtype, every parameter dense in memory.

    Raises:
        TypeError, ValueError: as :func:`mamlpp_fast.nn.check_model`.
        TypeError: for a part with parameters that is scripted or traced by ``torch.jit``.
        ValueError: for batch norms of another number of steps, or tensors made under ``torch.inference_mode``.
    """
    if not isinstance(model, nn.Module):
        check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise TypeError(
                "model: expected modules whose parameters can be replaced for a call, "
                f"{name or 'it'} is a torch.jit.{type(module).__name__}"
            )
    for name, tensor in (*nn.Module.named_parameters(model), *nn.Module.named_buffers(model)):
        if not is_lazy(tensor) and tensor.is_inference():
            raise ValueError(f"model: expected one made outside torch.inference_mode, {name} was made in it")
    model = convert_batch_norm(model, config.steps, per_step_affine=config.bnwb, per_step_stats=config.bnrs)
    check_model(model)
    for name, module in model.named_modules():
        if not isinstance(module, PerStepBatchNorm2d):
            continue
        per_step = module.per_step_affine or module.per_step_stats
        if per_step and module.num_steps != config.steps:
            raise ValueError(
                f"model: expected per-step batch norms of {config.steps} steps, {name} has {module.num_steps}"
            )
    if any(t.is_complex() for t in (*model.parameters(), *model.buffers())):

        def cast(t: Tensor) -> Tensor:
            kind = dtype.to_complex() if t.is_complex() else dtype if t.is_floating_point() else None
            return t.to(device=device, dtype=kind)

        model._apply(cast)  # type: ignore[no-untyped-call]  # `to` makes real numbers of complex ones
    else:
        model.to(device=device, dtype=dtype)
    for p in model.parameters():
        # PyTorch's fused Adam goes through memory, whatever the strides (see `optimizer.align`).
        if torch.empty_like(p, device="meta").stride() != p.stride():
            p.data = p.data.contiguous()
    return model


def adapting(
    model: nn.Module, config: MAMLConfig, head: tuple[str, ...] | None = None
) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that the inner loop adapts; ``head``: names that a recording found for ``"head"``."""
    own = dict(model.named_parameters())
    return [(name, own[name]) for name in head or adapted_names(model, config.adapt, config.adapt_norm)]


def own_share(batch: EpisodeBatch, ranks: Ranks, total_tasks: int | None) -> EpisodeBatch:
    """The tasks of a batch that are this rank's.

    Args:
        batch: the same on every rank; or, with ``total_tasks``, this rank's share already.
        ranks: the ranks.
        total_tasks: number of tasks on all of them.

    Raises:
        ValueError: for fewer tasks than ranks, or a batch that is not this rank's share.
    """
    total = batch.num_tasks if total_tasks is None else total_tasks
    if total < ranks.size:
        raise ValueError(f"batch: expected at least one task for each of {ranks.size} ranks, got {total}")
    share = ranks.share(total)
    if total_tasks is None:
        return batch if ranks.size == 1 else batch.tasks(share.start, share.stop)
    if batch.num_tasks != len(share):
        raise ValueError(
            f"batch: expected the {len(share)} tasks of rank {ranks.rank} of {total_tasks} in all, "
            f"got {batch.num_tasks}"
        )
    return batch
