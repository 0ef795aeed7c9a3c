"""Where the documents of a row begin: what isolating them asks of the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from phd.pattern import Pattern


# Equal only where the tensors are the same ones, as tensors themselves are.
@dataclass(frozen=True)
class Segments:
    """The documents that lie end to end in rows, none of which may see another.

    Positions, chunks and windows restart with each document, so that it gets what it would get
    in a row of its own:

    >>> rows = Segments.of(torch.tensor([[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 0, 0]]))
    >>> rows.position.tolist()
    [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    >>> rows.borders.tolist()
    [0, 3, 5, 6, 12]

    Attributes:
        starts: int64 (B, T), the place in its row where each token's document begins.
        cu_seqlens: int32 (documents + 1,), where documents begin in the B*T tokens of all rows, and
            the end; what variable-length kernels call cu_seqlens.
        cu_seqlens_cpu: the same on the CPU, so that nobody has to wait for the device to know them.
    """

    starts: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor

    @classmethod
    def of(cls, starts: Tensor) -> "Segments":
        """The documents that `starts`, int (B, T) on the CPU, describes."""
        T = starts.shape[1]
        place = torch.arange(T)
        opens = starts == place
        assert torch.equal(starts, torch.where(opens, place, 0).cummax(1).values), starts
        first = opens.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([first, torch.tensor([opens.numel()])]).int()
        return cls(starts.long(), cu_seqlens, cu_seqlens)

    def to(self, device: torch.device | str) -> "Segments":
        """The same documents on a device, without waiting for it."""
        return Segments(
            _sent(self.starts, device), _sent(self.cu_seqlens_cpu, device), self.cu_seqlens_cpu
        )

    @property
    def position(self) -> Tensor:
        """The place of each token in its document, int64 (B, T)."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def repeated(self, K: int) -> "Segments":
        """The same documents when every token takes K places, one after the other."""
        return Segments(
            self.starts.repeat_interleave(K, 1) * K, self.cu_seqlens * K, self.cu_seqlens_cpu * K
        )

    def mask(self, pattern: Pattern) -> Tensor:
        """The dense mask, bool (B, K, T, K, T), as `Pattern.mask`: its rule in each document."""
        copy = torch.arange(pattern.K, device=self.starts.device)
        n, m = self.position[:, None, :, None, None], self.position[:, None, None, None]
        same = self.starts[:, None, :, None, None] == self.starts[:, None, None, None]
        return same & pattern.allows(n, copy[:, None, None, None], m, copy[:, None])


def _sent(x: Tensor, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cuda":
        x = x.pin_memory()  # or the copy would wait for the device
    return x.to(device, non_blocking=True)
