"""What is known of a loss without calling it: the labels it takes, those it ignores, the accuracy with it."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.reference import LossFn

__all__ = ["accuracy", "family", "ignored_label", "label_dtype", "mistake", "out_of_range", "unsuited"]

Family = Literal["classes", "values"]

_CLASSES = (F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss)
_VALUES = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
    *(nn.BCELoss, nn.BCEWithLogitsLoss),
)


def family(loss_fn: LossFn) -> Family | None:
    """``"classes"`` for PyTorch's cross-entropy and its like, ``"values"`` for its regression losses, else None."""
    known: Any = loss_fn
    while isinstance(known, functools.partial):
        known = known.func
    if isinstance(known, nn.Module):
        known = type(known)
    return "classes" if known in _CLASSES else "values" if known in _VALUES else None


def label_dtype(loss_fn: LossFn, dtype: torch.dtype) -> torch.dtype | None:
    """What integer and boolean labels become: None leaves booleans as they are, other integers become int64."""
    return {"classes": torch.int64, "values": dtype, None: None}[family(loss_fn)]


def ignored_label(loss_fn: LossFn) -> int:
    """The label that does not count: the loss's own ``ignore_index`` where it can be told, else PyTorch's -100."""
    known: Any = loss_fn
    index = None
    while isinstance(known, functools.partial):
        index = known.keywords.get("ignore_index") if index is None else index
        known = known.func
    if index is None and isinstance(known, nn.Module):
        index = getattr(known, "ignore_index", None)
    return index if isinstance(index, int) else -100


def unsuited(batch: EpisodeBatch, loss_fn: LossFn, given: EpisodeBatch | None = None) -> str | None:
    """Why the fused engine cannot take a batch; None where it can, as far as can be told without the model.

    Args:
        batch: as :meth:`EpisodeBatch.to` leaves it for the model.
        loss_fn: the loss.
        given: the batch before that, which may have been on a CPU.
    """
    if any(t.requires_grad for t in batch.tensors):
        return "inputs: require gradients"
    kind, ignored = family(loss_fn), ignored_label(loss_fn)
    given = batch if given is None else given
    for y, values in ((batch.support_y, given.support_y), (batch.target_y, given.target_y)):
        # On a CPU the engine looks itself; of a GPU's labels it reads no values. More labels an example are recorded.
        unseen = y.is_cuda and not values.is_cuda and not y.is_floating_point() and y.ndim == 2
        if kind == "classes" and unseen and bool((values.to(torch.int64) == ignored).any()):
            return f"labels: some are {ignored}, which does not count"
    return None


def out_of_range(batch: EpisodeBatch, loss_fn: LossFn, classes: int) -> str | None:
    """Names labels that are none of 0 .. classes - 1 and not ignored either (on a CPU; elsewhere None)."""
    if family(loss_fn) != "classes":
        return None
    ignored = ignored_label(loss_fn)
    for name, y in (("support_y", batch.support_y), ("target_y", batch.target_y)):
        if y.is_floating_point() or y.device.type != "cpu" or y.numel() == 0:
            continue
        y = y.to(torch.int64)
        low, high = (int(v) for v in torch.aminmax(y))
        if low >= 0 and high < classes:
            continue
        wrong = y[((y < 0) | (y >= classes)) & (y != ignored)].unique().tolist()
        if wrong:
            shown = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
            return (
                f"{name}: expected labels from 0 to {classes - 1}, as the model predicts {classes} classes "
                f"(or {ignored}, which does not count), got {shown}"
            )
    return None


def mistake(batch: EpisodeBatch, prediction: Tensor, loss_fn: LossFn) -> str | None:
    """What is wrong with the labels of a batch for a model that predicts like this; None where nothing seems to be.

    Args:
        batch: the batch.
        prediction: of the first task's support set, [n, ...].
        loss_fn: the loss.
    """
    kind = family(loss_fn)
    y = batch.support_y[0]
    if kind == "values" and prediction.shape != y.shape:
        return (
            f"support_y: expected a target for each prediction, {list(prediction.shape)}, got {list(y.shape)}"
        )
    if kind == "classes" and not y.is_floating_point():
        if prediction.ndim < 2 or prediction.shape[:1] + prediction.shape[2:] != y.shape:
            return (
                f"support_y: expected labels {list(prediction.shape[:1] + prediction.shape[2:])} for predictions "
                f"{list(prediction.shape)} (classes are the second axis, as for F.cross_entropy; "
                f"another order needs a loss_fn of your own), got {list(y.shape)}"
            )
        return out_of_range(batch, loss_fn, prediction.shape[1])
    return None


def accuracy(prediction: Tensor, target: Tensor, loss_fn: LossFn, lead: int = 1) -> Tensor:
    """Share of target labels that are predicted right, those that do not count left out.

    Integer labels [tasks, m, ...] are compared with the largest prediction: along the last axis, or, where the labels
    have more axes and the loss is cross-entropy, along the one behind m, as that loss has it. Shares of classes under
    cross-entropy, float [tasks, m, classes], are right where the largest of them is predicted (the first of
    several). NaN for other targets, and for a task whose every label is ignored.

    Args:
        prediction: [tasks, m, ...], or more axes in front.
        target: [tasks, m, ...].
        loss_fn: the loss.
        lead: axes of the predictions up to the tasks, the last of them.

    Returns:
        float32 [..., tasks].
    """
    by_class = family(loss_fn) == "classes"
    shape = prediction.shape[lead:]
    if target.is_floating_point():
        if by_class and len(shape) > 1 and shape == target.shape[1:]:
            right = prediction.argmax(lead + 1) == target.argmax(2)
            return right.to(torch.float32).flatten(lead).mean(-1)
    else:
        last = len(shape) - 1
        for axis in (1,) if by_class else (last, 1):
            if 0 < axis <= last and shape[:axis] + shape[axis + 1 :] == target.shape[1:]:
                ignored = ignored_label(loss_fn)
                counts = (target != ignored).flatten(1)
                right = (prediction.argmax(lead + axis) == target).flatten(lead)
                if ignored >= 0:  # else none of them is predicted
                    right &= counts
                return right.sum(-1, dtype=torch.float32) / counts.sum(-1)
    return torch.full(prediction.shape[:lead], torch.nan, device=prediction.device)
