"""Meta-SGD (Li et al. 2017): an inner rate for every element of every parameter, learned. One setting.

    python examples/meta_sgd.py [--iterations 100] [--test-tasks 100] [--data OMNIGLOT]

Trains with `MAMLConfig(rates="element")` and shows what the rates became: those below zero climb the support loss,
which no hand-set rate would. The same class serves a loop of one's own: `mf.LSLR(model, K, 0.1, rates="element")`.
"""

from __future__ import annotations

from collections.abc import Sequence

from few_shot import arguments, samplers, test_accuracy

import mamlpp_fast as mf

TASKS, STEPS, RATE = 4, 2, 0.1


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=100)
    train, test = samplers(args)
    config = mf.MAMLConfig(
        steps=STEPS,
        inner_lr=RATE,
        rates="element",
        msl=False,  # Meta-SGD's target loss is that of the last step
        iterations_per_epoch=max(1, args.iterations // 10),
        epochs=10,
    )
    learner = mf.MAMLPlusPlus(mf.Conv4(1, 5, filters=32, num_steps=STEPS), config)
    steps, elements = learner.rates.rates.shape
    print(f"{elements} rates for each of {steps} steps, all {RATE} at first")
    for i in range(args.iterations):
        metrics = learner.meta_step(train.batch(i * TASKS, TASKS))
        if i % 20 == 0 or i == args.iterations - 1:
            print(f"{i:4d}  target loss {metrics.loss:.3f}  accuracy {100 * metrics.accuracy:.0f} %")

    print(f"engine {learner.engine.name}")
    print(f"{'rates of the first step':<24} {'mean':>7} {'lowest':>7} {'highest':>7}  below zero")
    for name, rates in learner.rates.as_dict().items():  # [steps, *shape of the parameter]
        if name.endswith("conv.bias"):
            continue  # in front of batch norm a bias has no gradient, and its rates stay
        first = rates[0].detach()
        low, high = float(first.min()), float(first.max())
        print(
            f"{name:<24} {first.mean():7.3f} {low:7.3f} {high:7.3f}  {100 * (first < 0).double().mean():.1f} %"
        )
    found = learner.rates.rates.detach()
    return {
        "spread": float(found.std()),
        "negative": float((found < 0).double().mean()),
        "accuracy": test_accuracy(learner, test, args.test_tasks),
    }


if __name__ == "__main__":
    main()
