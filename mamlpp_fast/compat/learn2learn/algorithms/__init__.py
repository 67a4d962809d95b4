"""learn2learn's ``algorithms``: the learners."""

from mamlpp_fast.compat.learn2learn.algorithms.base_learner import BaseLearner
from mamlpp_fast.compat.learn2learn.algorithms.gbml import GBML
from mamlpp_fast.compat.learn2learn.algorithms.maml import MAML, maml_update
from mamlpp_fast.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]
