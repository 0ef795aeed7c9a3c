"""Where the documents of a row begin, for attention that keeps them apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from phd.pattern import Pattern
from phd.transfer import to_device


# Two values are equal where they hold the very same tensors: so they may be keys of a cache.
@dataclass(frozen=True)
class Segments:
    """The documents packed into rows, none of which may see another.

    Positions, chunks and windows restart with each document, so that it gets what it would get
    in a row of its own:

    >>> rows = Segments.of(torch.tensor([[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 0, 0]]))
    >>> rows.position.tolist()
    [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    >>> rows.cu_seqlens.tolist()
    [0, 3, 5, 6, 12]

    Attributes:
        starts: int64 (B, T), contiguous: where in its row each token's document begins.
        cu_seqlens: int32 (documents + 1,), the cumulative lengths of the documents in the B*T
            tokens of all rows, from 0, as variable-length kernels take them.
        cu_seqlens_cpu: the same on the CPU, so that reading them does not wait for the device.
    """

    starts: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor

    @classmethod
    def of(cls, starts: Tensor) -> "Segments":
        """The documents that `starts`, int (B, T) on the CPU, describes."""
        # Rows of one document may come expanded from one of them, and no such tensor can be pinned.
        starts = starts.long().contiguous()
        index = torch.arange(starts.shape[1], device=starts.device)
        is_first = starts == index
        assert torch.equal(starts, torch.where(is_first, index, 0).cummax(1).values), starts
        first = is_first.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([first, first.new_tensor([is_first.numel()])]).int()
        return cls(starts, cu_seqlens, cu_seqlens)

    def to(self, device: torch.device | str) -> "Segments":
        """The same documents on a device, without waiting for it."""
        starts, cu_seqlens = (to_device(x, device) for x in (self.starts, self.cu_seqlens_cpu))
        return Segments(starts, cu_seqlens, self.cu_seqlens_cpu)

    @property
    def position(self) -> Tensor:
        """The position of each token in its document, int64 (B, T)."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def repeated(self, K: int) -> "Segments":
        """The same documents where every token stands K times, one after another."""
        return Segments(
            self.starts.repeat_interleave(K, 1) * K, self.cu_seqlens * K, self.cu_seqlens_cpu * K
        )

    def mask(self, pattern: Pattern) -> Tensor:
        """The dense mask, bool (B, K, T, K, T): the rule of `Pattern.mask` in each document."""
        copy = torch.arange(pattern.K, device=self.starts.device)
        n, m = self.position[:, None, :, None, None], self.position[:, None, None, None]
        same = self.starts[:, None, :, None, None] == self.starts[:, None, None, None]
        return same & pattern.allows(n, copy[:, None, None, None], m, copy[:, None])
