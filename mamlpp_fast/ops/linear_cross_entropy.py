"""Linear head and softmax cross-entropy of a batch of tasks, with its tangents.

Every task has a head of its own: features f [T, N, F], weight [T, O, F], bias [T, O], labels int64 [T, N]. The four
orders are those of ``norm_act_pool``; every op writes into its last arguments and returns nothing. The backward leaves
gz = (P - Y) / N, the gradient of the logits, for the tangent of the backward. Formulas:
``docs/derivations/linear_cross_entropy.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamlpp_fast.ops._library import define


def _check(f: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    if f.dim() != 3 or weight.dim() != 3 or weight.shape[::2] != f.shape[::2]:
        raise ValueError(
            f"f, weight: expected [T, N, F] and [T, O, F], got {tuple(f.shape)} and {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"bias: expected {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    if labels.shape != f.shape[:2]:
        raise ValueError(f"labels: expected {tuple(f.shape[:2])}, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")


def _forward(
    f: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    loss: Tensor,
) -> None:
    torch.baddbmm(bias[:, None], f, weight.mT, out=logits)
    torch.softmax(logits, -1, out=probabilities)
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    loss.copy_((logits.logsumexp(-1) - chosen).mean(-1))


def _backward(
    f: Tensor,
    weight: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    gz: Tensor,
    gf: Tensor,
    gweight: Tensor,
    gbias: Tensor,
) -> None:
    gz.copy_(probabilities)
    gz.scatter_add_(-1, labels[..., None], gz.new_full((1, 1, 1), -1.0).expand(*labels.shape, 1))
    gz.div_(f.shape[1])
    torch.bmm(gz, weight, out=gf)
    torch.bmm(gz.mT, f, out=gweight)
    torch.sum(gz, 1, out=gbias)


def _tangent(
    f_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor, f: Tensor, weight: Tensor, z_dot: Tensor
) -> None:
    torch.baddbmm(bias_dot[:, None], f_dot, weight.mT, out=z_dot)
    z_dot.baddbmm_(f, weight_dot.mT)


def _backward_tangent(
    z_dot: Tensor,
    f_dot: Tensor,
    weight_dot: Tensor,
    f: Tensor,
    weight: Tensor,
    probabilities: Tensor,
    gz: Tensor,
    gz_dot: Tensor,
    gf_dot: Tensor,
    gweight_dot: Tensor,
    gbias_dot: Tensor,
) -> None:
    torch.mul(probabilities, z_dot, out=gz_dot)
    gz_dot.addcmul_(probabilities, gz_dot.sum(-1, keepdim=True), value=-1.0).div_(f.shape[1])
    torch.bmm(gz_dot, weight, out=gf_dot)
    gf_dot.baddbmm_(gz, weight_dot)
    torch.bmm(gz_dot.mT, f, out=gweight_dot)
    gweight_dot.baddbmm_(gz.mT, f_dot)
    torch.sum(gz_dot, 1, out=gbias_dot)


def _fake(*args: Tensor) -> None:
    return None


_linear_cross_entropy = define(
    "linear_cross_entropy(Tensor f, Tensor weight, Tensor bias, Tensor labels, "
    "Tensor(a!) logits, Tensor(b!) probabilities, Tensor(c!) loss) -> ()",
    fallback=_forward,
    fake=_fake,
)
_linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor f, Tensor weight, Tensor labels, Tensor probabilities, "
    "Tensor(a!) gz, Tensor(b!) gf, Tensor(c!) gweight, Tensor(d!) gbias) -> ()",
    fallback=_backward,
    fake=_fake,
)
_linear_cross_entropy_tangent = define(
    "linear_cross_entropy_tangent(Tensor f_dot, Tensor weight_dot, Tensor bias_dot, Tensor f, Tensor weight, "
    "Tensor(a!) z_dot) -> ()",
    fallback=_tangent,
    fake=_fake,
)
_linear_cross_entropy_backward_tangent = define(
    "linear_cross_entropy_backward_tangent(Tensor z_dot, Tensor f_dot, Tensor weight_dot, Tensor f, Tensor weight, "
    "Tensor probabilities, Tensor gz, "
    "Tensor(a!) gz_dot, Tensor(b!) gf_dot, Tensor(c!) gweight_dot, Tensor(d!) gbias_dot) -> ()",
    fallback=_backward_tangent,
    fake=_fake,
)


def linear_cross_entropy(
    f: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    loss: Tensor,
) -> Tensor:
    """Mean cross-entropy of every task: ``F.cross_entropy(f @ weight.T + bias, labels)``.

    Args:
        f: features [T, N, F].
        weight, bias: [T, O, F] and [T, O].
        labels: int64 [T, N], each 0 <= label < O.
        logits, probabilities: [T, N, O], overwritten.
        loss: [T], overwritten.

    Returns:
        `loss`.

    Raises:
        ValueError: shapes do not belong together.
        TypeError: labels are not int64.
    """
    _check(f, weight, bias, labels)
    _linear_cross_entropy(f, weight, bias, labels, logits, probabilities, loss)
    return loss


def linear_cross_entropy_backward(
    f: Tensor,
    weight: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    gz: Tensor,
    gf: Tensor,
    gweight: Tensor,
    gbias: Tensor,
) -> None:
    """Gradients of `linear_cross_entropy`, every task's loss having weight 1.

    Args:
        f, weight, labels: as in the forward; probabilities as it wrote them.
        gz: gradient of the logits [T, N, O], overwritten.
        gf, gweight, gbias: gradients of f, weight and bias, of their shapes, overwritten.
    """
    _linear_cross_entropy_backward(f, weight, labels, probabilities, gz, gf, gweight, gbias)


def linear_cross_entropy_tangent(
    f_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor, f: Tensor, weight: Tensor, z_dot: Tensor
) -> Tensor:
    """Tangent of the logits along tangents of f, weight and bias.

    Args:
        f_dot, weight_dot, bias_dot: tangents, of the shapes of f, weight and bias.
        f, weight: as in the forward.
        z_dot: [T, N, O], overwritten.

    Returns:
        `z_dot`.
    """
    _linear_cross_entropy_tangent(f_dot, weight_dot, bias_dot, f, weight, z_dot)
    return z_dot


def linear_cross_entropy_backward_tangent(
    z_dot: Tensor,
    f_dot: Tensor,
    weight_dot: Tensor,
    f: Tensor,
    weight: Tensor,
    probabilities: Tensor,
    gz: Tensor,
    gz_dot: Tensor,
    gf_dot: Tensor,
    gweight_dot: Tensor,
    gbias_dot: Tensor,
) -> None:
    """Tangent of `linear_cross_entropy_backward` along the tangents that gave z_dot.

    Args:
        z_dot: what `linear_cross_entropy_tangent` wrote for f_dot, weight_dot and the bias's tangent.
        probabilities, gz: what the forward and the backward wrote.
        gz_dot, gf_dot, gweight_dot, gbias_dot: tangents of the backward's results, overwritten.
    """
    _linear_cross_entropy_backward_tangent(
        z_dot, f_dot, weight_dot, f, weight, probabilities, gz, gz_dot, gf_dot, gweight_dot, gbias_dot
    )
