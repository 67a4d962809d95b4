"""Which parameters the inner loop adapts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mamlpp_fast.reference.norms import NORMS, PerStepBatchNorm2d

__all__ = ["adapted_names"]


def adapted_names(
    model: nn.Module, adapt: str | Sequence[str] = "all", adapt_norm: bool = False
) -> tuple[str, ...]:
    """Names of the parameters that the inner loop adapts, in registration order.

    Args:
        model: any module.
        adapt: ``"all"``, ``"head"`` (ANIL: the last module that holds parameters of its own, in the order they are
            registered in; a learner goes by what its first batch passes through), or names of modules and parameters,
            one string or several. What is no name is a prefix of names.
        adapt_norm: whether weights and biases of normalisation layers adapt too (per-step ones never can).

    Raises:
        ValueError: when nothing is left to adapt, or ``adapt_norm`` meets per-step weights.
    """
    chosen: dict[int, str] = {}
    named = {n: id(p) for n, p in nn.Module.named_parameters(model, remove_duplicate=False)}
    known = {n for n, _ in model.named_modules(remove_duplicate=False)} | named.keys()
    wanted = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    # "layer1" is the module of that name, not "layer10" too.
    prefixes = tuple(f"{name}." if name in known else name for name in wanted)
    asked = {p for n, p in named.items() if adapt == "all" or n in wanted or n.startswith(prefixes)}
    # A tied parameter has several names: it adapts by any of them, under the first.
    first = {id(p): name for name, p in nn.Module.named_parameters(model)}
    owners = [n for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())]
    for owner in owners:
        module = model.get_submodule(owner)
        if isinstance(module, NORMS):
            if not adapt_norm:
                continue
            if isinstance(module, PerStepBatchNorm2d) and module.per_step_affine:
                raise ValueError(
                    f"adapt_norm: expected one weight shared by all steps, {owner} has one per step"
                )
        for p in module._parameters.values():
            if p is None or not p.requires_grad:
                continue
            if owner == owners[-1] if adapt == "head" else id(p) in asked:
                chosen.setdefault(id(p), first[id(p)])
    if not chosen:
        raise ValueError(f"adapt: expected a choice that leaves parameters to adapt, got {adapt!r}")
    return tuple(chosen.values())
