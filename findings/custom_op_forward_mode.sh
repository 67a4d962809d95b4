#!/usr/bin/env bash
# Forward mode through an operation made with torch.library.custom_op and register_autograd.
#
# Guessed: NotImplementedError, as an operation of PyTorch's own without a forward formula raises it (torch.func.jvp, jacfwd)
# and as torch.autograd.Function without a static jvp does; torch.func.grad through the same operation is refused, too.
# Seen: no error; the result has no tangent, so torch.func.jvp and torch.func.jacfwd give zero. The error comes only where
# an argument requires a gradient besides.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0: derivative of x * x at 3: reverse 6.0, jvp 0.0, jacfwd 0.0; torch.autograd.Function: NotImplementedError
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
from torch import Tensor


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, g: 2 * ctx.saved_tensors[0] * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


x = torch.tensor(3.0)
leaf = x.clone().requires_grad_()
(reverse,) = torch.autograd.grad(square(leaf), leaf)
jvp = torch.func.jvp(square, (x,), (torch.ones_like(x),))[1]
jacfwd = torch.func.jacfwd(square)(x)
try:
    function = torch.func.jvp(Square.apply, (x,), (torch.ones_like(x),))[1].item()
except (NotImplementedError, RuntimeError) as error:
    function = type(error).__name__
print(
    f"torch {torch.__version__.partition('+')[0]}: derivative of x * x at 3: reverse {reverse.item()}, "
    f"jvp {jvp.item()}, jacfwd {jacfwd.item()}; torch.autograd.Function: {function}"
)
sys.exit((reverse.item(), jvp.item(), jacfwd.item(), function) != (6.0, 0.0, 0.0, "NotImplementedError"))
PYTHON
