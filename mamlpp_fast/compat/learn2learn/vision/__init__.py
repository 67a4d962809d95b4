"""learn2learn's ``vision``: networks, data sets and benchmarks of images."""

from mamlpp_fast.compat.learn2learn.vision import benchmarks, datasets, models, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]
