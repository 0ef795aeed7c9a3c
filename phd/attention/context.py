"""What a layer's attention gets to see: whole rows in training, a cache at inference."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from phd.attention.attend import attend
from phd.config import Backend
from phd.pattern import Pattern
from phd.rope import rotate
from phd.segments import Segments


class AttentionContext(Protocol):
    """How one layer looks at slots: which of them go on, and what their queries see."""

    def select_queries(self, x: Tensor) -> Tensor:
        """The slots of x (B, K or 1, T, D) that the layer computes; all give keys and values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Turn by RoPE, and attend.

        q (B, K or 1, N, T', H) of the slots asked, k, v (B, K or 1, G, T, H) of all; returns
        (B, N, K or 1, T', H).
        """


@dataclass(frozen=True)
class RowContext:
    """Whole rows, each slot of which sees what the pattern lets it.

    Attributes:
        rope: (cos, sin) of all copies.
        last_copy_only: only the last copy is computed; the others give keys and values alone.
        segments: documents that do not see each other; None: rows are one each.
    """

    pattern: Pattern
    backend: Backend
    rope: tuple[Tensor, Tensor]
    last_copy_only: bool
    segments: Segments | None

    def select_queries(self, x: Tensor) -> Tensor:
        return x[:, -1:] if self.last_copy_only else x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = self.rope
        K, asked = self.pattern.K, 1 if self.last_copy_only else self.pattern.K
        q = rotate(q, cos[:, -asked:], sin[:, -asked:])
        k, v = rotate(k, cos, sin), v.transpose(1, 2)
        # Copies that are still equal were projected once.
        q, k, v = (y.expand(-1, -1, copies, -1, -1) for y, copies in ((q, asked), (k, K), (v, K)))
        return attend(q, k, v, self.pattern, self.backend, self.segments)
