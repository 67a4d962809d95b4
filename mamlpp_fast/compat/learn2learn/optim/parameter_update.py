"""learn2learn's ``optim.ParameterUpdate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn._gradients import inner_gradients

__all__ = ["ParameterUpdate"]


class ParameterUpdate(nn.Module):
    """``torch.autograd.grad`` whose gradients pass through a transform of each parameter's own.

    Args:
        parameters: the parameters, in the order of every later call.
        transform: makes the transform of a parameter: a module, or None to leave its gradients as they are.

    Raises:
        ValueError: for a transform that is neither.
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Callable[[Tensor], nn.Module | None]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        self.transforms_indices: list[int | None] = []
        for parameter in parameters:
            made = transform(parameter)
            if made is None:
                self.transforms_indices.append(None)
            elif isinstance(made, nn.Module):
                self.transforms_indices.append(len(modules))
                modules.append(made)
            else:
                raise ValueError("Transform should be either a Module or None.")
        self.transforms_modules = nn.ModuleList(modules)

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The update of each parameter; None for what is unused or takes no gradient, where that is allowed.

        Raises:
            AdaptationError: a RuntimeError; a parameter is unused or takes no gradient, and that is not allowed.
        """
        gradients = inner_gradients(
            loss,
            parameters,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
            hint="learn2learn: Maybe try with allow_nograd=True and/or allow_unused=True ?",
        )
        return [
            gradient if index is None or gradient is None else self.transforms_modules[index](gradient)
            for gradient, index in zip(gradients, self.transforms_indices, strict=False)
        ]
