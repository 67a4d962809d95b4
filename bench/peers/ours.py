"""``mamlpp_fast``'s learner at plain MAML; ARGUMENT is its engine."""

from __future__ import annotations

import torch

import mamlpp_fast as mf
from bench.peers.problem import Problem
from bench.peers.torch_parts import finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    sizes = problem.sizes
    config = mf.MAMLConfig.maml(steps=sizes.steps, inner_lr=sizes.rate)
    flags = {"per_step_affine": False, "per_step_stats": False}
    model = mf.Conv4(
        1, sizes.ways, image_size=sizes.image_size, filters=sizes.filters, num_steps=sizes.steps, **flags
    )
    state = {name: torch.from_numpy(value) for name, value in problem.weights.items()}
    model.load_state_dict(state, strict=False)  # it also has running statistics
    precision = str(state["head.weight"].dtype).removeprefix("torch.")
    learner = mf.MAMLPlusPlus(model, config, engine=argument, precision=precision, device=device)
    batch = mf.EpisodeBatch(*tasks(problem, device))

    def step():  # type: ignore[no-untyped-def]
        return finished(learner.meta_gradient(batch).loss, learner.model)

    return step
