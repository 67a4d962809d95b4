"""How faithfully five ways of capturing a model's forward keep what it computes, on random models.

    python -m bench.front_ends [--models 1000] [--start 0]

Each way captures ``model(x)`` in training mode; what it captured is then run on other inputs of the same shape and
compared with the model itself: outputs, gradients and a Hessian-vector product, in float64, to 1e-9. Prints, for each
way, how many models it kept, how many it refused with an error, how many it got silently wrong, and the milliseconds of
a capture.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bench.harness import parser_of
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.record import record
from mamlpp_fast.engine.recorder import Buffer, Constant, Parameter, Value
from mamlpp_fast.reference import functional_call
from tests.random_programs import make_program

Captured = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def by_fx(model: nn.Module, x: Tensor) -> Captured:
    """Symbolic tracing of the source: ``torch.fx.symbolic_trace``."""
    graph = torch.fx.symbolic_trace(model)
    return lambda params, inputs: functional_call(
        graph, {n: p for n, p in params.items() if _has(graph, n)}, inputs
    )


def by_make_fx(model: nn.Module, x: Tensor) -> Captured:
    """Operators below autograd: ``make_fx`` of a functional call."""
    from torch.fx.experimental.proxy_tensor import make_fx

    own = dict(model.named_parameters())
    traced = make_fx(lambda params, inputs: functional_call(model, params, inputs))(own, x)
    return lambda params, inputs: traced(dict(params), inputs)


def by_make_fx_before_autograd(model: nn.Module, x: Tensor) -> Captured:
    """Operators above autograd: ``make_fx(pre_dispatch=True)``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    own = dict(model.named_parameters())
    traced = make_fx(lambda params, inputs: functional_call(model, params, inputs), pre_dispatch=True)(own, x)
    return lambda params, inputs: traced(dict(params), inputs)


def by_export(model: nn.Module, x: Tensor) -> Captured:
    """``torch.export.export(strict=False)``: functional operators above autograd."""
    module = torch.export.export(model, (x,), strict=False).module()
    return lambda params, inputs: functional_call(
        module, {n: p for n, p in params.items() if _has(module, n)}, inputs
    )


def by_recording(model: nn.Module, x: Tensor) -> Captured:
    """This package: what Python calls and what it executes, watched together."""
    recording = record(model, x, torch.cat([x, x[:1]]))
    constants = dict(model.named_buffers())

    def run(params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        values = {0: inputs}

        def given(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.index]
            if isinstance(leaf, Parameter):
                return params[leaf.name].detach() if leaf.detached else params[leaf.name]
            if isinstance(leaf, Constant):
                return leaf.tensor
            return constants[leaf.name].clone() if isinstance(leaf, Buffer) else leaf

        recorded = dict(zip(recording.examples, (recording.operations, recording.others), strict=True))
        if len(inputs) not in recorded:
            raise Unsupported("recording", f"not made with {len(inputs)} examples")
        for op in recorded[len(inputs)]:
            args, kwargs = tree_map(given, (op.args, op.kwargs))
            result = op.function(*args, **kwargs)
            made = [t for t in tree_leaves(args[0] if result is None else result) if isinstance(t, Tensor)]
            if len(made) != len(op.outputs):
                raise Unsupported(op.where, f"{op.name} returns a tensor that it was given")
            for index, value in zip(op.outputs, made, strict=True):
                values[index] = value.detach() if op.constant else value
        return values[recording.output]

    return run


WAYS = (by_fx, by_make_fx, by_make_fx_before_autograd, by_export, by_recording)


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_parameters())


def _results(call: Captured, params: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradients of a curved loss, and their derivative along themselves."""
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in params.items()}
    wanted = [p for p in leaves.values() if p.requires_grad]
    y = call(leaves, x)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)
    product = sum((g.square().sum() for g in first if g is not None), y.new_zeros(()))
    second = [None] * len(wanted)
    if product.requires_grad:
        second = list(torch.autograd.grad(product, wanted, allow_unused=True))
    return [
        y,
        *(
            torch.zeros_like(p) if g is None else g
            for g, p in zip((*first, *second), wanted * 2, strict=True)
        ),
    ]


def _outcome(way: Callable[[nn.Module, Tensor], Captured], seed: int) -> tuple[str, float]:
    program = make_program(seed)
    first, second = (program.batch(i)[0][0] for i in (0, 1))
    models = [program.build().double().train() for _ in range(2)]
    params = dict(models[0].named_parameters())
    plain = _results(lambda p, x: functional_call(models[0], p, x), params, second)
    began = time.perf_counter()
    try:
        call = way(models[1], first)
        taken = time.perf_counter() - began
        found = _results(call, params, second)
    except Exception:
        return "refused", time.perf_counter() - began
    same = all(
        (a - b).abs().max() <= 1e-9 * max(1.0, float(b.abs().max()))
        for a, b in zip(found, plain, strict=True)
    )
    return "kept" if same else "silently wrong", taken


def main() -> None:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = [s for s in range(options.start, options.start + options.models) if not make_program(s).draws]
    print(f"torch {torch.__version__}, {len(seeds)} models without draws of random numbers")
    print("| way | kept | refused | silently wrong | ms a capture |\n| --- | ---: | ---: | ---: | ---: |")
    for way in WAYS:
        outcomes = [_outcome(way, seed) for seed in seeds]
        count = Counter(what for what, _ in outcomes)
        median = sorted(t for _, t in outcomes)[len(outcomes) // 2]
        row = (
            (way.__doc__ or "").strip().rstrip("."),
            *(count[k] for k in ("kept", "refused", "silently wrong")),
        )
        print(f"| {' | '.join(map(str, row))} | {1e3 * median:.1f} |", flush=True)


if __name__ == "__main__":
    main()
