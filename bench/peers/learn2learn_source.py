"""learn2learn without what its own imports drag in: gym, Lightning, torchvision and data sets' downloads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

_BARE = ("", ".algorithms", ".vision")


def skeleton() -> None:
    """Makes ``learn2learn``, ``.algorithms`` and ``.vision`` importable without running their own imports.

    Raises:
        ImportError: when it is not there.
    """
    spec = importlib.util.find_spec("learn2learn")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("learn2learn is not there")
    folder = spec.submodule_search_locations[0]
    for name in _BARE:
        package = ModuleType(f"learn2learn{name}")
        package.__path__ = [folder + name.replace(".", "/")]
        sys.modules[f"learn2learn{name}"] = package


@cache
def load() -> ModuleType:
    """``learn2learn`` with what few-shot scripts use: algorithms, data, nn, optim, utils and vision.models.

    Raises:
        ImportError: when it, or something it needs, is not there.
    """
    skeleton()
    top = sys.modules["learn2learn"]
    utils = importlib.import_module("learn2learn.utils")
    for name in ("clone_module", "update_module", "detach_module", "clone_parameters", "magic_box"):
        setattr(top, name, getattr(utils, name))
    for name in ("nn", "optim", "data"):
        importlib.import_module(f"learn2learn.{name}")
    top.algorithms = sys.modules["learn2learn.algorithms"]
    top.vision = sys.modules["learn2learn.vision"]
    for module, names in (("maml", ("MAML", "maml_update")), ("meta_sgd", ("MetaSGD",)), ("gbml", ("GBML",))):
        part = importlib.import_module(f"learn2learn.algorithms.{module}")
        for name in names:
            setattr(top.algorithms, name, getattr(part, name))
    importlib.import_module("learn2learn.vision.models")
    return top
