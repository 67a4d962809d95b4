"""Scripts written for ``higher``, to run with its import line and with ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.peers.problem import Problem
from bench.peers.torch_parts import conv4, tasks
from bench.peers.worker import Step

BEFORE, AFTER = "import higher", "import mamlpp_fast.compat.higher as higher"

_LOOP = """
model.zero_grad()
total, kept = 0.0, {{}}
for support_x, support_y, target_x, target_y in zip(*batch):
    with higher.innerloop_ctx(model, inner, {arguments}) as (fmodel, diffopt):
        for _ in range(5):
            diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
        loss = F.cross_entropy(fmodel(target_x), target_y) / len(batch[0])
        {backward}
    total += loss.item()
    kept = {{f"fast.{{name}}": p for name, p in fmodel.named_parameters()}}
"""
_SGD = "inner = torch.optim.SGD(model.parameters(), lr=0.05)"
_ADAM = "inner = torch.optim.Adam(model.parameters(), lr=0.01)"
_GROUPS = """
norms = [p for name, p in model.named_parameters() if '.norm.' in name]
others = [p for name, p in model.named_parameters() if '.norm.' not in name]
inner = torch.optim.SGD([{'params': others}, {'params': norms, 'lr': 0.02}], lr=0.05, momentum=0.5)
learned = higher.optim.get_trainable_opt_params(inner)
override = {name: learned[name] for name in ('lr', 'momentum')}
"""
_LEARNED = """
rates = {f'{name}.{i}': v for name, values in override.items() for i, v in enumerate(values)}
kept |= {f'override.{name}': v.grad for name, v in rates.items()}
for v in rates.values(): v.grad = None
"""


def _loop(arguments: str, backward: str = "loss.backward()") -> str:
    return _LOOP.format(arguments=arguments, backward=backward)


SCRIPTS: dict[str, tuple[str, str]] = {
    "maml-sgd": (_SGD, _loop("copy_initial_weights=False")),
    "maml-adam": (_ADAM, _loop("copy_initial_weights=False")),
    "learned-rates": (_GROUPS, _loop("copy_initial_weights=False, override=override") + _LEARNED),
    "copied-weights": (_GROUPS, _loop("copy_initial_weights=True, override=override") + _LEARNED),
    "test-time": (_SGD, _loop("track_higher_grads=False", "loss = loss.detach()")),
}
"""What runs once and what runs every time, below the import line; ``model`` and ``batch`` are there."""


def build(problem: Problem, device: str, argument: str | None) -> Step:
    """The script of the argument, ``NAME:before`` or ``NAME:after``, as a peer's step.

    Its names: of meta-gradients, ``fast.`` of the last task's fast parameters, ``override.`` of settings' gradients.
    """
    name, _, which = str(argument).partition(":")
    once, every_time = (compile(text, name, "exec") for text in SCRIPTS[name])
    batch = tasks(problem, device)
    torch.set_default_dtype(batch[0].dtype)  # of learned settings; this process runs nothing else
    scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    scope |= {"model": conv4(problem, device), "batch": batch}
    exec({"before": BEFORE, "after": AFTER}[which], scope)
    exec(once, scope)

    def step() -> tuple[float, Mapping[str, Any]]:
        exec(every_time, scope)
        found = {n: p.grad for n, p in scope["model"].named_parameters() if p.grad is not None}
        return scope["total"], found | scope["kept"]

    return step
