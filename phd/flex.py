"""The FlexAttention backend: PHD attention as one compiled kernel over an analytic block mask."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.functional import pad

from phd.pattern import Pattern

BLOCK = 128  # slots of a block of the mask, FlexAttention's default


def flex_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Attention by `pattern`; shapes and meaning as `phd.attention.attend`. CUDA only.

    Raises:
        ValueError: off CUDA, where FlexAttention has no backward.
    """
    if q.device.type != "cuda":
        raise ValueError(
            f"model.attention=flex: FlexAttention has no backward on the device {q.device}; "
            "choose model.attention=packed, which runs everywhere"
        )
    return masked_flex(_compiled(), q, k, v, pattern)


@lru_cache
def _compiled() -> Any:
    return torch.compile(torch_flex_attention, dynamic=False, fullgraph=True)


def masked_flex(kernel, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:  # type: ignore[no-untyped-def]
    """Run `kernel` (FlexAttention, compiled or eager) over slots in copy-major order.

    Tokens are padded to whole blocks, so that a block belongs to one copy. Padded keys lie behind
    every real query and so are never seen; padded queries are cut off.
    """
    Q, T = q.shape[2:4]
    filler = (0, 0, 0, -T % BLOCK)
    q, k, v = (pad(x, filler) for x in (q, k, v))
    mask = flex_mask(pattern, q.shape[3], Q, q.device)
    out = kernel(
        q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), block_mask=mask, enable_gqa=True
    )
    return out.unflatten(2, (Q, -1))[..., :T, :]


@lru_cache(maxsize=16)
def flex_mask(pattern: Pattern, tokens: int, copies: int, device: torch.device) -> BlockMask:
    """The block mask of the last `copies` copies' queries; `tokens` is a multiple of `BLOCK`.

    Blocks are found from the interval of tokens that each query sees, in O(K^2 T^2 / BLOCK) work
    and no dense mask. Blocks that are seen whole are listed apart: the kernel skips the predicate.
    """
    assert tokens % BLOCK == 0
    T, offset = tokens, (pattern.K - copies) * tokens

    def allowed(b: Tensor, h: Tensor, q_slot: Tensor, k_slot: Tensor) -> Tensor:  # noqa: ARG001
        q_slot = q_slot + offset
        return pattern.allows(q_slot % T, q_slot // T, k_slot % T, k_slot // T)

    seen, whole = (x[-copies * T // BLOCK :].to(device) for x in block_table(pattern, T))
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(copies * T, pattern.K * T),
    )


def block_table(pattern: Pattern, tokens: int) -> tuple[Tensor, Tensor]:
    """(some slot sees some slot, every slot sees every slot), each bool (query, key) blocks."""
    start = torch.arange(0, tokens, BLOCK)
    some, every = [], []
    for s in range(pattern.K):
        ranges = [pattern.seen_tokens(s, r, tokens) for r in range(pattern.K)]
        low, high = (torch.stack(x)[..., None] for x in zip(*ranges, strict=True))  # (K, T, 1)
        meets = torch.maximum(low, start) <= torch.minimum(high, start + BLOCK - 1)
        covers = (low <= start) & (high >= start + BLOCK - 1)
        some.append(meets.unflatten(1, (-1, BLOCK)).any(2).transpose(0, 1).flatten(1))
        every.append(covers.unflatten(1, (-1, BLOCK)).all(2).transpose(0, 1).flatten(1))
    return torch.cat(some), torch.cat(every)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as FlexAttention wants it: how many in each row, and which come first."""
    count = table.sum(1, dtype=torch.int32)
    order = table.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], order[None, None]
