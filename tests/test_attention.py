"""Attention through every inner loop: second derivatives, which its fused kernels lack, and the caller's own choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.adaptation import inner_steps
from tests.inner_loops import CLASSES, RATE, STEPS, assert_as_the_textbook, task


class Attention(nn.Module):
    """Attention of two heads over six tokens [n, 6]: by PyTorch's module or function, or written out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Linear(1, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x[..., None])
        if self.how == "module":
            mixed, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        else:
            joint = F.linear(tokens, self.attend.in_proj_weight, self.attend.in_proj_bias)
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in joint.chunk(3, -1))
            if self.how == "function":
                heads = F.scaled_dot_product_attention(q, k, v)
            else:
                heads = (q @ k.mT / 2**0.5).softmax(-1) @ v
            mixed = self.attend.out_proj(heads.transpose(1, 2).flatten(-2))
        return self.out(mixed.mean(1))


def attention(how: str) -> Attention:
    torch.manual_seed(0)
    return Attention(how).double()


def _switches() -> list[bool]:
    on = torch.backends.cuda
    return [
        on.math_sdp_enabled(),
        on.flash_sdp_enabled(),
        on.mem_efficient_sdp_enabled(),
        on.cudnn_sdp_enabled(),
    ]


@pytest.mark.parametrize("how", ["module", "function"])
@pytest.mark.parametrize("engine", ["reference", "autograd", "auto", None])
def test_attention_has_second_derivatives(how: str, engine: str | None) -> None:
    assert_as_the_textbook(attention(how), attention("written out"), engine)


def test_the_choice_of_attention_is_the_callers_between_steps_and_after_errors() -> None:
    model, data, before = attention("function"), task(0), _switches()
    during: list[list[bool]] = []
    model.out.register_forward_hook(lambda module, x, y: during.append(_switches()))
    for first_order, expected in ((False, [True, False, False, False]), (True, before)):
        for _ in inner_steps(model, data[0], data[1], RATE, steps=STEPS, first_order=first_order):
            assert _switches() == before
        assert during == [expected] * STEPS
        during.clear()

    def fails(prediction: Tensor, target: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        mf.adapt(model, data[0], data[1], RATE, loss_fn=fails)
    assert _switches() == before
