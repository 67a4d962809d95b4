"""``mamlpp_fast``'s learner; ARGUMENT is its engine."""

from __future__ import annotations

import torch

import mamlpp_fast as mf
from bench.peers.problem import EPOCH, MSL_EPOCHS, Problem
from bench.peers.torch_parts import finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    sizes = problem.sizes
    settings = {"steps": sizes.steps, "inner_lr": sizes.rate}
    config = (
        mf.MAMLConfig(msl_epochs=MSL_EPOCHS, **settings) if sizes.plus else mf.MAMLConfig.maml(**settings)
    )
    flags = {"per_step_affine": config.bnwb, "per_step_stats": config.bnrs}
    model = mf.Conv4(
        1, sizes.ways, image_size=sizes.image_size, filters=sizes.filters, num_steps=sizes.steps, **flags
    )
    state = {name: torch.from_numpy(value) for name, value in problem.weights.items()}
    rates = state.pop("rates", None)
    model.load_state_dict(state, strict=False)  # it also has running statistics
    precision = str(state["head.weight"].dtype).removeprefix("torch.")
    learner = mf.MAMLPlusPlus(model, config, engine=argument, precision=precision, device=device)
    own = dict(learner.model.named_parameters())
    if rates is not None:
        with torch.no_grad():
            learner.rates.rates.copy_(rates)
        own["rates"] = learner.rates.rates
        learner.iteration = EPOCH * config.iterations_per_epoch
    batch = mf.EpisodeBatch(*tasks(problem, device))

    def step():  # type: ignore[no-untyped-def]
        return finished(learner.meta_gradient(batch).loss, own)

    return step
