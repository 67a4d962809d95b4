"""`mf.graphed` around a meta-step of one's own: on a GPU one CUDA graph, on the CPU the step itself.

    python examples/graphed_step.py [--iterations 40] [--data OMNIGLOT]

Thousands of small launches an iteration keep a GPU waiting for Python; a graph is one. What a step must do for that:
leave its results in tensors that exist before (gradients included: `zero_grad(set_to_none=False)`), ask the device
nothing (no `.item()`), and use an optimizer that can be captured. Trains twice from the same start, with and without.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from few_shot import arguments, samplers
from torch import Tensor, nn

import mamlpp_fast as mf

TASKS, STEPS = 4, 3
Step = Callable[[mf.EpisodeBatch], Tensor]


def own_step(model: nn.Module) -> tuple[Step, Callable[[], Iterator[Tensor]]]:
    """A whole meta-update, and the tensors that it changes."""
    rates = mf.LSLR(model, STEPS, 0.1)
    parameters = [*model.parameters(), *rates.parameters()]
    on_gpu = parameters[0].is_cuda
    optimizer = torch.optim.Adam(parameters, lr=1e-3, capturable=on_gpu)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    # A step with zero gradients changes no parameter, and gives Adam its state before the capture.
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()

    def step(batch: mf.EpisodeBatch) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=batch.support_x.device)
        for task in batch:
            fast = mf.adapt(model, task.support_x, task.support_y, rates)
            loss = F.cross_entropy(mf.functional_call(model, fast, (task.target_x,)), task.target_y) / TASKS
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    def changed() -> Iterator[Tensor]:
        yield from parameters
        yield from model.buffers()
        for state in optimizer.state.values():
            yield from state.values()

    return step, changed


def main(argv: Sequence[str] | None = None) -> dict[str, float | int]:
    args = arguments(__doc__, argv, iterations=40)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, _ = samplers(args)
    start = mf.Conv4(1, 5, filters=16, num_steps=STEPS).to(device)
    losses: dict[str, list[float]] = {}
    graphs = 0
    for name in ("plain", "graphed"):
        step, changed = own_step(copy.deepcopy(start))
        if name == "graphed":
            # The runs before the capture are real ones: `preserve` names what they must leave as it was.
            step = captured = mf.graphed(step, preserve=changed)
        losses[name] = []
        began = time.perf_counter()
        for i in range(args.iterations):
            loss = step(train.batch(i * TASKS, TASKS).to(device))
            losses[name].append(float(loss))  # reads from the device, outside the step
            if i % 10 == 0 or i == args.iterations - 1:
                print(f"{name:>7} {i:4d}  target loss {losses[name][-1]:.4f}")
        print(f"{name:>7}: {1e3 * (time.perf_counter() - began) / args.iterations:.0f} ms an iteration")
    graphs = captured.graphs
    gap = max(abs(a - b) for a, b in zip(losses["plain"], losses["graphed"], strict=True))
    what = f"{graphs} CUDA graph" if graphs else "no graph: on the CPU mf.graphed calls the step itself"
    print(f"{device}: {what}; losses of the two runs differ by at most {gap:.1e}")
    return {"graphs": graphs, "difference": gap, "first": losses["graphed"][0], "last": losses["graphed"][-1]}


if __name__ == "__main__":
    main()
