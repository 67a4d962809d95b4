"""Few-shot data sets and the episodes drawn from them.

>>> data = mamlpp_fast.data.load("strokes")
>>> sampler = data.sampler("train", ways=20, shots=1, targets=1, seed=0)
>>> batch = sampler.batch(0, 8)  # an EpisodeBatch: tasks 0 .. 7
"""

from mamlpp_fast.data.authors import authors_episode, authors_seed
from mamlpp_fast.data.classes import FewShotData, ImageClasses, from_arrays
from mamlpp_fast.data.errors import DataError
from mamlpp_fast.data.registry import DATASETS, load, protocols
from mamlpp_fast.data.sampler import EpisodeSampler

__all__ = [
    "DATASETS",
    "DataError",
    "EpisodeSampler",
    "FewShotData",
    "ImageClasses",
    "authors_episode",
    "authors_seed",
    "from_arrays",
    "load",
    "protocols",
]
