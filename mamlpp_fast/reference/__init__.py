"""MAML++ in plain PyTorch: the specification that every faster path is held against.

"How to train your MAML", Antoniou, Edwards, Storkey, ICLR 2019 (arXiv:1810.09502). One task at a time, nested
autograd, any ``nn.Module``. Section and equation numbers are the paper's. Nothing of the package outside this folder is
imported in it, so that it is an independent witness.

Read in order: ``schedules.py`` (multi-step loss, derivative order, meta learning rate), ``norms.py`` (the per-step
batch norm), ``orders.py`` (norms where the forward takes gradients itself, ``code.py`` by which code), ``weights.py``
(weight norm), ``calling.py`` (a model with other tensors), ``adapting.py`` (which parameters adapt), ``inner.py`` (the
inner loop), ``meta.py`` (the meta-gradient, evaluation).
"""

from mamlpp_fast.reference.adapting import adapted_names
from mamlpp_fast.reference.calling import (
    Arguments,
    Inputs,
    Tensors,
    called,
    functional_call,
    predicted,
    swapped,
)
from mamlpp_fast.reference.inner import (
    LossFn,
    check_recomputation,
    inner_loop,
    math_attention,
    right_second_order,
    support_gradients,
)
from mamlpp_fast.reference.meta import MetaResult, Task, evaluate_task, meta_gradient, task_loss
from mamlpp_fast.reference.norms import (
    NORMS,
    EvalStats,
    PerStepBatchNorm2d,
    per_step_norm,
    set_eval_stats,
    set_step,
)
from mamlpp_fast.reference.orders import (
    Watch,
    group_norm,
    instance_norm,
    layer_norm,
    normalises,
    norms_of_any_order,
    rightly,
)
from mamlpp_fast.reference.schedules import cosine_annealing, is_second_order, msl_weights
from mamlpp_fast.reference.weights import WeightNormByFormula, right_weight_norm, weight_norm

__all__ = [
    "NORMS",
    "Arguments",
    "EvalStats",
    "Inputs",
    "LossFn",
    "MetaResult",
    "PerStepBatchNorm2d",
    "Task",
    "Tensors",
    "Watch",
    "WeightNormByFormula",
    "adapted_names",
    "called",
    "check_recomputation",
    "cosine_annealing",
    "evaluate_task",
    "functional_call",
    "group_norm",
    "inner_loop",
    "instance_norm",
    "is_second_order",
    "layer_norm",
    "math_attention",
    "meta_gradient",
    "msl_weights",
    "normalises",
    "norms_of_any_order",
    "per_step_norm",
    "predicted",
    "right_second_order",
    "right_weight_norm",
    "rightly",
    "set_eval_stats",
    "set_step",
    "support_gradients",
    "swapped",
    "task_loss",
    "weight_norm",
]
