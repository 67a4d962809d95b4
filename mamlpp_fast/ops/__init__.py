"""The operations, each differentiable as often as its page in ``docs/derivations`` says."""

from mamlpp_fast import _native

__all__: list[str] = []

_native.load()
