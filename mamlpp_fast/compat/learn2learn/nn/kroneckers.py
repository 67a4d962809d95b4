"""learn2learn's ``nn.kroneckers``: linear maps and recurrent cells of Kronecker factors (Jose et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["KroneckerLSTM", "KroneckerLinear", "KroneckerRNN"]


class KroneckerLinear(nn.Module):
    """X ↦ L·X·R + B, the linear map Rᵀ ⊗ L of n·m elements; the identity at first.

    Args:
        n: side of the left factor L.
        m: side of the right factor R.
        bias: add B [n, m], zero at first.
        psd: use LᵀL and RᵀR for L and R.
        device: of the factors; inputs are moved there, results back.

    Shape:
        [..., n, m] to the same; or a vector [n·m], X column by column, to the same.

    Raises:
        ValueError: for an input of another shape.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, psd: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        device = x.device
        if self.device is not None:
            x = x.to(self.device)
        left: Tensor = self.left
        right: Tensor = self.right
        if self.psd:
            left, right = left.t() @ left, right.t() @ right
        n, m = len(left), len(right)
        if x.dim() == 1:
            if x.numel() != n * m:
                raise ValueError("Input vector must have size n*m")
            return self._product(left, x.reshape(m, n).t(), right).t().flatten().to(device)
        if x.shape[-2:] != (n, m):
            raise ValueError("Final two dimensions of input tensor must have shape (n, m)")
        return self._product(left, x, right).to(device)

    def _product(self, left: Tensor, x: Tensor, right: Tensor) -> Tensor:
        y = left @ x @ right
        return y if self.bias is None else y + self.bias


class KroneckerRNN(nn.Module):
    """A recurrent cell of :class:`KroneckerLinear`: (x, h) to (y, new h).

    Args:
        n, m, bias: as there.
        sigma: activation of the hidden state, tanh by default.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, sigma: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.W_h, self.U_h, self.W_y = (KroneckerLinear(n, m, bias=bias) for _ in range(3))
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(hidden), hidden


class KroneckerLSTM(nn.Module):
    """An LSTM cell of :class:`KroneckerLinear`: (x, (h, c)) to (h, (h, c)).

    Args:
        n, m, bias: as there.
        sigma: activation of the gates, sigmoid by default.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, sigma: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        for gate in "ifgo":
            for side in "ih":
                setattr(self, f"W_{side}{gate}", KroneckerLinear(n, m, bias=bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = hidden
        i, f, g, o = (getattr(self, f"W_i{gate}")(x) + getattr(self, f"W_h{gate}")(h) for gate in "ifgo")
        c = self.sigma(f) * c + self.sigma(i) * self.tanh(g)
        h = self.sigma(o) * self.tanh(c)
        return h, (h, c)
