"""ANIL (Raghu et al. 2020): the inner loop adapts the head alone, the body is meta-learned. One setting.

    python examples/anil.py [--iterations 100] [--test-tasks 100] [--data OMNIGLOT]

Trains with `MAMLConfig(adapt="head")`, then shows what that means: after adaptation every parameter of the body is what
it was, and the support set moved the predictions all the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from few_shot import arguments, samplers, test_accuracy

import mamlpp_fast as mf

TASKS = 4


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=100)
    train, test = samplers(args)

    # "head" is the last module with parameters that a batch passes; names, ("blocks.3", "head") say, choose otherwise.
    config = mf.MAMLConfig(adapt="head", iterations_per_epoch=max(1, args.iterations // 10), epochs=10)
    learner = mf.MAMLPlusPlus(mf.Conv4(1, 5, filters=32), config)
    began = time.perf_counter()
    for i in range(args.iterations):
        metrics = learner.meta_step(train.batch(i * TASKS, TASKS))
        if i % 20 == 0 or i == args.iterations - 1:
            print(f"{i:4d}  target loss {metrics.loss:.3f}  accuracy {100 * metrics.accuracy:.0f} %")
    print(f"{1e3 * (time.perf_counter() - began) / args.iterations:.0f} ms an iteration")
    print(f"engine {learner.engine.name}; the inner loop adapts {', '.join(learner.rates.names)}")

    # The same inner loop by hand: the rates name what adapts, so `adapt` returns nothing but the head.
    model, task = learner.model.eval(), test.batch(0, 1)[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():  # it adapts all the same, and returns constants
        fast = mf.adapt(model, task.support_x, task.support_y, learner.rates)
    now = {name: p.detach() for name, p in model.named_parameters()} | fast
    moved = {name: float((now[name] - before[name]).abs().max()) for name in before}
    body = max(change for name, change in moved.items() if not name.startswith("head."))
    head = max(change for name, change in moved.items() if name.startswith("head."))
    print(f"largest change of a parameter in adaptation: body {body:.3g}, head {head:.3g}")

    with torch.no_grad():
        unadapted = (model(task.target_x).argmax(-1) == task.target_y).double().mean()
        adapted = (
            (mf.functional_call(model, fast, (task.target_x,)).argmax(-1) == task.target_y).double().mean()
        )
    print(f"one test task: {100 * unadapted:.0f} % right before adaptation, {100 * adapted:.0f} % after")
    return {"body": body, "head": head, "accuracy": test_accuracy(learner, test, args.test_tasks)}


if __name__ == "__main__":
    main()
