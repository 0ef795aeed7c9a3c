"""The packed backend: PHD attention at little more than K times the cost of vanilla's.

    queries              keys: originals            keys: hidden copies
    originals  (s = 0)   causal over T    --.       -
    hidden     (s >= 1)  causal over T    --'       tiles of a chunk or a window:
                         one stock kernel with      small batched products
                         K*N query heads

Rule 1 is the same causal attention for all copies, so the K copies are K times as many query heads
of the same key/value head, and one stock kernel reads the keys for all of them
(`phd.attention.causal_kernels` chooses it). By rules 2 and 3 a hidden copy sees an interval of the
hidden copies that ends with itself (`phd.attention.tiles`), and so does an original where originals
see hidden copies, too (`sps`); it may see none. The two results merge by their
log-sum-exps, and the backward runs both parts on the merged ones:

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
    p_ij = exp(s_ij - lse)                    ds_ij = p_ij (dout_i . v_j - dout_i . out_i)

which is exact, because p and out there are those of the whole attention.

The fused backend is the same with Triton's kernels for rules 2 and 3 (`phd.attention.fused`).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.attention.blocks import has_kernels, has_local_kernels
from phd.attention.flash import merge
from phd.attention.tiles import TileRange, Tiles
from phd.attention.varlen import causal_attention, isolated_backward, isolated_forward
from phd.pattern import Pattern
from phd.segments import Segments
from phd.torch_private import HAS_TRITON


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """Attention by `pattern`; shapes and meaning as `phd.attention.attend`."""
    return _packed(q, k, v, pattern, segments, fused=False)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """`packed_attention` with rules 2 and 3 in Triton kernels; in half precision and float32.

    Raises:
        ValueError: off CUDA (but for tests, which set TRITON_INTERPRET=1), without Triton, in
            another dtype, with wider heads than there are kernels for, or where originals see
            hidden copies.
    """
    if pattern.rule == "hidden":
        check_fused(q, pattern)
    return _packed(q, k, v, pattern, segments, fused=True)


def check_fused(q: Tensor, pattern: Pattern) -> None:
    """Make sure that there are Triton kernels for these queries and this pattern.

    Raises:
        ValueError: there are none.
    """
    reason = fused_obstacle(q.device, q.dtype, q.shape[-1])
    if not has_local_kernels(pattern):
        reason = "no kernel in which originals see hidden copies"
    if reason is not None:
        hint = "choose model.attention=packed, which runs everywhere"
        raise ValueError(f"model.attention=fused: {reason}; {hint}")


def fused_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused kernels cannot do attention on a device; None: they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from phd.attention.fused import IS_INTERPRETED

    if device.type != "cuda" and not IS_INTERPRETED:
        return f"no Triton kernels on the device {device}"
    if not has_kernels(dtype, head_dim):
        return f"no kernel for {dtype} with model.head_dim={head_dim}"
    return None


def _packed(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None, fused: bool
) -> Tensor:
    B, N, Q, T, H = q.shape
    if pattern.rule == "stream":
        return _streams(q, k[:, :, -Q:], v[:, :, -Q:], segments)
    if pattern.rule != "flat" or Q < pattern.K:
        return _Packed.apply(q, k, v, pattern, segments, fused)
    # Every slot sees every slot before it: a plain causal row of K*T slots, token-major.
    q, k, v = (x.transpose(2, 3).flatten(2, 3) for x in (q, k, v))
    out = causal_attention(q, k, v, None if segments is None else segments.repeated(Q))
    return out.view(B, N, T, Q, H).transpose(2, 3)


def _streams(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """Each copy over its own past: the copies are further key heads, each with its query heads."""
    (B, N, Q, T, H), G = q.shape, k.shape[1]
    heads = q.unflatten(1, (G, -1)).transpose(2, 3).reshape(B, G * Q * (N // G), T, H)
    out = causal_attention(heads, k.flatten(1, 2), v.flatten(1, 2), segments)
    return out.view(B, G, Q, N // G, T, H).transpose(2, 3).reshape(B, N, Q, T, H)


def _causal_copies(pattern: Pattern) -> range:
    """The copies that the queries see causally, up to their own token.

    With `flat` the queries are those of the last copy, which sees all copies of its token.
    """
    return range(pattern.K if pattern.rule == "flat" else 1)


class _Packed(torch.autograd.Function):
    """Causal attention to originals, merged with attention among hidden copies."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        segments: Segments | None,
        fused: bool,
    ) -> Tensor:
        assert pattern.rule != "flat" or q.shape[2] == 1
        B, N, Q, T, H = q.shape
        heads = q.reshape(B, N * Q, T, H)
        out, lse = isolated_forward(heads, k[:, :, 0], v[:, :, 0], H**-0.5, segments)
        for r in _causal_copies(pattern)[1:]:
            part = isolated_forward(heads, k[:, :, r], v[:, :, r], H**-0.5, segments)
            out, lse = merge((out, lse), part)
        out, lse = out.view(B, N, Q, T, H), lse.view(B, N, Q, T)
        if pattern.rule == "hidden":
            # The products among hidden copies are in the precision of lse, float32 at least.
            with torch.autocast(q.device.type, enabled=False):
                hidden_kernels(fused).merge((q, k, v), (out, lse), pattern, segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern, ctx.segments, ctx.fused = pattern, segments, fused
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = grads[0].contiguous()
        B, N, Q, T, H = q.shape
        heads, merged = q.reshape(B, N * Q, T, H), (out.view(B, N * Q, T, H), lse.view(B, N * Q, T))
        dq = None
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for r in _causal_copies(ctx.pattern):
            share, dk[:, :, r], dv[:, :, r] = isolated_backward(
                dout.view(B, N * Q, T, H),
                (heads, k[:, :, r], v[:, :, r]),
                merged,
                H**-0.5,
                ctx.segments,
            )
            dq = share if dq is None else dq.add_(share)
        assert dq is not None
        dq = dq.view(B, N, Q, T, H)
        if ctx.pattern.rule == "hidden":
            with torch.autocast(q.device.type, enabled=False):
                hidden_kernels(ctx.fused).add_gradients(
                    (dq, dk, dv), (q, k, v), (out, lse, dout), ctx.pattern, ctx.segments
                )
        return dq, dk, dv, None, None, None


class HiddenKernels(NamedTuple):
    """Rules 2 and 3, forward and backward; the arguments are those of `_merge_hidden` and
    `_add_hidden_gradients`."""

    merge: Callable[..., None]
    add_gradients: Callable[..., None]


def hidden_kernels(fused: bool) -> HiddenKernels:
    if not fused:
        return HiddenKernels(_merge_hidden, _add_hidden_gradients)
    from phd.attention.fused import add_hidden_gradients, merge_hidden

    return HiddenKernels(merge_hidden, add_hidden_gradients)


def _merge_hidden(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    pattern: Pattern,
    segments: Segments | None,
) -> None:
    """Add rules 2 and 3 to rule 1's result: updates (out, lse) of the local queries in place."""
    (q, k, v), (out, lse) = inputs, result
    copies = min(q.shape[2], pattern.local_copies)
    q, out, lse = (x[:, :, -copies:] for x in (q, out, lse[..., None]))
    for part in _hidden_parts(q, k, pattern, segments, lse.dtype):
        tiles, scores = part.tiles, part.scores
        peak = scores.amax(-1, keepdim=True)
        if pattern.originals_see_hidden:  # some see none, while each hidden copy sees itself
            peak = peak.clamp_(min=torch.finfo(peak.dtype).min)
        weights = _exp_(scores.sub_(peak))
        lse_1, lse_2 = tiles.cut_queries(lse), weights.sum(-1, keepdim=True).log_().add_(peak)
        total = torch.logaddexp(lse_1, lse_2)
        out_2 = (weights @ tiles.cut_keys(v[:, :, 1:]).to(lse.dtype)).mul_((peak - total).exp_())
        out_1, share_1 = out[..., tiles.tokens, :], tiles.join_queries((lse_1 - total).exp_())
        out_1.copy_(torch.addcmul(tiles.join_queries(out_2), out_1, share_1))
        lse[..., tiles.tokens, :] = tiles.join_queries(total)


def _add_hidden_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    segments: Segments | None,
) -> None:
    """Rules 2 and 3's share of the gradients.

    Args:
        gradients: dq, dk, dv, which hold rule 1's share. This adds to the dq of local queries, and
            sets dk and dv of hidden copies, which only local queries see.
        inputs: q, k, v.
        result: the merged out and lse, and dout.
    """
    (dq, dk, dv), (q, k, v), (out, lse, dout) = gradients, inputs, result
    copies, scale = min(q.shape[2], pattern.local_copies), q.shape[-1] ** -0.5
    dq, q, out, lse, dout = (x[:, :, -copies:] for x in (dq, q, out, lse[..., None], dout))
    # dout_i . out_i, which is the mean of dp_ij under p_ij over all keys, those of rule 1 included.
    delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)
    hidden_dk, hidden_dv = (torch.zeros_like(x[:, :, 1:], dtype=lse.dtype) for x in (k, v))
    for part in _hidden_parts(q, k, pattern, segments, lse.dtype):
        tiles = part.tiles
        p = _exp_(part.scores.sub_(tiles.cut_queries(lse)))
        tiled_dout = tiles.cut_queries(dout).to(lse.dtype)
        dp = tiled_dout @ tiles.cut_keys(v[:, :, 1:]).to(lse.dtype).mT
        ds = dp.sub_(tiles.cut_queries(delta)).mul_(p)
        dq[..., tiles.tokens, :] += tiles.join_queries(ds @ part.k)
        tiles.add_to_keys(hidden_dk, ds.mT @ part.q)
        tiles.add_to_keys(hidden_dv, p.mT @ tiled_dout)
    dk[:, :, 1:], dv[:, :, 1:] = hidden_dk.mul_(scale), hidden_dv


class _HiddenPart(NamedTuple):
    """Some tiles of local queries, the hidden keys they meet, times 1/sqrt(H), and the scores.

    q (B, G, tiles, queries, H), k (B, G, tiles, keys, H), scores (B, G, tiles, queries, keys),
    -inf where the pattern does not allow them.
    """

    tiles: TileRange
    q: Tensor
    k: Tensor
    scores: Tensor


def _hidden_parts(
    q: Tensor, k: Tensor, pattern: Pattern, segments: Segments | None, dtype: torch.dtype
) -> Iterator[_HiddenPart]:
    """The local queries q (B, N, copies, T, H) in ranges of tiles, with their keys and scores."""
    B, N, copies, T, H = q.shape
    tiles = Tiles.of(pattern, T, one_document=segments is None)
    position = torch.arange(T, device=q.device)[None] if segments is None else segments.position
    for tile_range in tiles.ranges(B, N, k.shape[1], copies):
        queries = tile_range.cut_queries(q).to(dtype)
        keys = tile_range.cut_keys(k[:, :, 1:]).to(dtype) * H**-0.5
        scores = queries @ keys.mT
        masked = tile_range.masked(position)[:, None, :, None]
        # Adding -inf to the scores is ten times as fast as `masked_fill_` on the CPU.
        bias = torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, -torch.inf)
        scores.unflatten(3, (-1, bias.shape[4])).add_(bias)
        yield _HiddenPart(tile_range, queries, keys, scores)


def _exp_(x: Tensor) -> Tensor:
    """exp(x) in place, also fast where x is -inf.

    On the CPU torch's `exp` is MKL's, which takes 10 to 30 times as long there; its `exp2` is not.
    """
    log2_e = 1.4426950408889634
    return x.mul_(log2_e).exp2_() if x.device.type == "cpu" else x.exp_()
