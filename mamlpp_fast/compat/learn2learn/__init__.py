"""learn2learn's interface on this package's operations: few-shot scripts run with their import line changed.

    import mamlpp_fast.compat.learn2learn as l2l

Names, arguments, defaults and errors are those of learn2learn 0.2.0 (Arnold et al. 2020, arXiv:2008.12284), and so are
gradients and sampled tasks; ``docs/drop_in.md`` lists what is left out.
"""

from mamlpp_fast.compat.learn2learn import algorithms, data, nn, optim, utils, vision
from mamlpp_fast.compat.learn2learn._batch_norm import plain_batch_norm
from mamlpp_fast.compat.learn2learn.utils import (
    accuracy,
    clone_distribution,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_distribution,
    detach_module,
    magic_box,
    update_module,
    warn_once,
)

__version__ = "0.2.0"
__all__ = [
    "accuracy",
    "algorithms",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "data",
    "detach_distribution",
    "detach_module",
    "magic_box",
    "nn",
    "optim",
    "plain_batch_norm",
    "update_module",
    "utils",
    "vision",
    "warn_once",
]
