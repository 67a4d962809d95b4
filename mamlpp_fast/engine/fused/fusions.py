"""Fusions: passes over a lowered network, one function each; each leaves out memory or work and no mathematics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.steps import (
    Activation,
    Bias,
    Conv,
    CrossEntropy,
    FirstLayer,
    Head,
    Linear,
    Loss,
    MaxPool,
    NormActPool,
    Smooth,
    Step,
    Times,
)
from mamlpp_fast.ops.linear_cross_entropy import MOST_CLASSES
from mamlpp_fast.ops.pointwise import FUNCTIONS

__all__ = ["drop_inert_biases", "fuse", "fuse_factors", "fuse_first_layer", "fuse_head", "fuse_norms"]

# Colours; above, the covariance of a patch is no longer small beside the feature map.
_COLOURS = 3


def fuse(network: Network, loss: Loss | None) -> Network:
    """All fusions, in the order that they build on each other; ``loss`` where it has rules of its own."""
    for one in (drop_inert_biases, fuse_norms, fuse_first_layer, fuse_factors):
        network = one(network)
    return fuse_head(network, loss)


def drop_inert_biases(network: Network) -> Network:
    """Leaves out the biases that batch statistics take out again: no gradient, and only the running mean sees them."""
    for bias in [step for step in network.steps if isinstance(step, Bias)]:
        norm = network.reader(bias.output)
        if isinstance(norm, NormActPool) and (norm.norm in network.norms or norm.group == 1):
            norms, inert = dict(network.norms), network.inert
            if norm.norm in norms:
                norms[norm.norm] = replace(norms[norm.norm], bias=bias.bias.name)
            else:
                inert += (bias.bias.name,)
            network = replace(
                _replaced(network, {bias.output: None, norm.output: replace(norm, inputs=bias.inputs)}),
                norms=norms,
                inert=inert,
            )
    return network


def fuse_norms(network: Network) -> Network:
    """Batch norm, the leaky ReLU and the max-pooling behind it in one step."""
    for norm in [step for step in network.steps if isinstance(step, NormActPool)]:
        if norm.per_image or norm.pool or norm.slope != 1:  # the latter: fused already
            continue
        gone: list[int] = []
        slope, output, shape, pool = 1.0, norm.output, norm.shape, False
        if isinstance(act := network.reader(output), Activation):
            slope, output = act.slope, act.output
            gone.append(act.output)
        if isinstance(pooling := network.reader(output), MaxPool) and pooling.halves:
            pool, output, shape = True, pooling.output, pooling.shape
            gone.append(pooling.output)
        if gone:
            whole = replace(norm, output=output, shape=shape, slope=slope, pool=pool)
            network = _replaced(network, {norm.output: whole, **dict.fromkeys(gone)})
    return network


def fuse_first_layer(network: Network) -> Network:
    """Convolution of the images, norm, activation and pooling in one, whose feature map is never stored."""
    for conv in [step for step in network.steps if isinstance(step, Conv)]:
        norm = network.reader(conv.output)
        fits = conv.inputs[0] < len(network.inputs) and conv.stride == 1 and conv.weight.shape[2] <= _COLOURS
        fits = fits and type(conv) is Conv and conv.weight.shape[:2] in ((1, 1), (3, 3))
        if not (fits and isinstance(norm, NormActPool) and norm.pool and norm.slope >= 0):
            continue
        if norm.group:  # its statistics are not a task's
            continue
        first = FirstLayer(
            norm.name,
            conv.inputs,
            norm.output,
            norm.shape,
            conv.weight,
            conv.padding,
            norm.affine,
            norm.eps,
            norm.slope,
            norm.norm,
        )
        network = _replaced(network, {conv.output: None, norm.output: first})
    return network


def fuse_factors(network: Network) -> Network:
    """A sine or cosine of an activation times a number in one."""
    for times in [step for step in network.steps if isinstance(step, Times)]:
        wave = network.reader(times.output)
        if isinstance(wave, Smooth) and FUNCTIONS[wave.function] in ("sine", "cosine"):
            whole = replace(wave, inputs=times.inputs, a=wave.a * times.factor)
            network = _replaced(network, {times.output: None, wave.output: whole})
    return network


def fuse_head(network: Network, loss: Loss | None) -> Network:
    """The last layer and the cross-entropy of its output in one."""
    last = network.steps[-1]
    fits = (
        isinstance(loss, CrossEntropy)
        and type(last) is Linear
        and last.output == network.output
        and last.shape[0] <= MOST_CLASSES
        and network.uses()[network.output] == 1
    )
    if not (fits and isinstance(last, Linear)):
        return network
    head = Head(last.name, last.inputs, last.output, last.shape, last.weight, last.bias)
    return _replaced(network, {last.output: head})


def _replaced(network: Network, changes: dict[int, Step | None]) -> Network:
    """The network with other steps, or none, in the places of those that write these values."""
    steps: Iterable[Step | None] = (changes.get(step.output, step) for step in network.steps)
    return replace(network, steps=tuple(step for step in steps if step is not None))
