"""The FlexAttention backend: PHD attention as one compiled kernel over an analytic block mask."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.functional import pad

from phd.pattern import Pattern
from phd.segments import Segments

MASK_BLOCK_SIZE = 128  # slots in a block of the mask, FlexAttention's default


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """Attention by `pattern`; shapes and meaning as `phd.attention.attend`. CUDA only.

    Raises:
        ValueError: off CUDA, where FlexAttention has no backward.
    """
    if q.device.type != "cuda":
        raise ValueError(
            f"model.attention=flex: FlexAttention has no backward on the device {q.device}; "
            "choose model.attention=packed, which runs everywhere"
        )
    return masked_flex(_compiled(), q, k, v, pattern, segments)


@lru_cache
def _compiled() -> Any:
    # At the first call, because importing must do no work.
    return torch.compile(torch_flex_attention, dynamic=False, fullgraph=True)


def masked_flex(  # type: ignore[no-untyped-def]
    kernel, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """Run `kernel` (FlexAttention, compiled or eager) over slots in copy-major order.

    Tokens are padded to whole blocks, so that a block belongs to one copy. Padded keys come after
    every real query, so no query sees them; the outputs of padded queries are dropped.
    """
    Q, T = q.shape[2:4]
    padding = (0, 0, 0, -T % MASK_BLOCK_SIZE)
    q, k, v = (pad(x, padding) for x in (q, k, v))
    mask = flex_mask(pattern, q.shape[3], Q, q.device, segments)
    out = kernel(
        q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), block_mask=mask, enable_gqa=True
    )
    return out.unflatten(2, (Q, -1))[..., :T, :]


@lru_cache(maxsize=16)
def flex_mask(
    pattern: Pattern,
    tokens: int,
    copies: int,
    device: torch.device,
    segments: Segments | None = None,
) -> BlockMask:
    """The block mask of the last `copies` copies' queries; `tokens` is whole blocks.

    Blocks are found from the interval of tokens that each query sees, which takes
    O(K^2 T^2 / MASK_BLOCK_SIZE) work and no dense mask. Blocks that are seen whole are listed
    apart: for them the kernel does not call the predicate. Tokens past the end of `segments` are a
    document of their own. The cache gives all layers of a step one mask, because a step has one
    `Segments` object.
    """
    assert tokens % MASK_BLOCK_SIZE == 0
    T, offset = tokens, (pattern.K - copies) * tokens
    starts = torch.zeros(1, T, dtype=torch.int64, device=device)
    if segments is not None:
        end = segments.starts.shape[1]
        starts = pad(segments.starts, (0, T - end), value=end)

    def in_row(b: Tensor, h: Tensor, q_slot: Tensor, k_slot: Tensor) -> Tensor:  # noqa: ARG001
        q_slot = q_slot + offset
        return pattern.allows(q_slot % T, q_slot // T, k_slot % T, k_slot // T)

    def in_document(b: Tensor, h: Tensor, q_slot: Tensor, k_slot: Tensor) -> Tensor:  # noqa: ARG001
        q_slot = q_slot + offset
        n, m = q_slot % T, k_slot % T
        start = starts[b, n]
        allowed = pattern.allows(n - start, q_slot // T, m - start, k_slot // T)
        return (start == starts[b, m]) & allowed

    some, every = (x[:, -copies * T // MASK_BLOCK_SIZE :] for x in block_table(pattern, starts))
    return BlockMask.from_kv_blocks(
        *_block_lists(some & ~every),
        *_block_lists(every),
        BLOCK_SIZE=MASK_BLOCK_SIZE,
        mask_mod=in_row if segments is None else in_document,
        seq_lengths=(copies * T, pattern.key_copies * T),
    )


def block_table(pattern: Pattern, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(some slot sees some slot, every slot sees every slot), each bool (B, query, key) blocks.

    starts, int64 (B, T), says where each token's document begins.
    """
    position = torch.arange(starts.shape[1], device=starts.device) - starts
    first = torch.arange(0, starts.shape[1], MASK_BLOCK_SIZE, device=starts.device)
    last = first + MASK_BLOCK_SIZE - 1
    some, every = [], []
    for s in range(pattern.K):
        ranges = [pattern.visible_tokens(s, r, position) for r in range(pattern.key_copies)]
        low, high = (
            (torch.stack(x, 2) + starts[..., None])[..., None] for x in zip(*ranges, strict=True)
        )  # (B, T, key copies, 1)
        meets = torch.maximum(low, first) <= torch.minimum(high, last)
        covers = (low <= first) & (high >= last)
        some.append(meets.unflatten(1, (-1, MASK_BLOCK_SIZE)).any(2).flatten(2))
        every.append(covers.unflatten(1, (-1, MASK_BLOCK_SIZE)).all(2).flatten(2))
    return torch.cat(some, 1), torch.cat(every, 1)


def _block_lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks in FlexAttention's form: how many each row has, and their indices first."""
    count = table.sum(-1, dtype=torch.int32)
    order = table.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None], order[:, None]
