"""`EqualRows` with hidden copies through the fused local kernel of training, on CUDA."""

from functools import cached_property

import torch
from torch import Tensor

from phd.attention.attend import resolve_backend
from phd.attention.blocks import has_local_kernels
from phd.attention.packed import fused_obstacle
from phd.inference.cache import KVCache
from phd.inference.cached_attention import attend_cached
from phd.inference.equal_rows import EqualRows
from phd.inference.incremental import Pair
from phd.torch_private import HAS_TRITON


def has_fused_rows(cache: KVCache) -> bool:
    """Whether `FusedRows` can do the work of a cache, and its model's backend lets it."""
    config, x = cache.config, cache.originals[0]
    device, H, pattern = x.device.type, config.head_dim, cache.pattern
    backend = resolve_backend(config.attention, device, x.dtype, H, HAS_TRITON, pattern)
    if pattern.rule != "hidden" or not has_local_kernels(pattern) or backend != "fused":
        return False
    return fused_obstacle(x.device, x.dtype, config.head_dim) is None


class FusedRows(EqualRows):
    """`EqualRows` whose hidden copies take as many kernels for any number of them.

    rule 1              one call of the split-key kernel, in which each query sees the
                        originals up to its own token
    rules 2 and 3       one call of training's kernel, which starts from rule 1's result
    """

    def attend_hidden(self, q: Tensor, new: Pair, cached: Pair, layer: int) -> Tensor:
        from phd.attention.fused import Suffix, merge_suffix  # Triton comes with CUDA builds alone

        copies = 1 if self.is_last(layer) else self.hidden_per_token
        tokens = q.shape[2] // copies
        first_query = self.end - tokens
        visible = self._visible[-tokens:, None].expand(-1, copies).flatten()
        out, lse = attend_cached(q, *cached, visible.expand(len(q), -1))
        # The kernel would be compiled again for strides that are no multiples of 16.
        whole = lse.new_empty(*lse.shape[:2], -(-lse.shape[2] // 16) * 16)
        lse = whole[..., : lse.shape[2]].copy_(lse)
        k, v, first_key = self._hidden_keys(new, first_query, layer)
        k, v = _by_copy(k, self.hidden_per_token), _by_copy(v, self.hidden_per_token)
        merge_suffix(
            (_by_copy(q.to(k.dtype), copies), k, v),
            (_by_copy(out, copies), _by_copy(lse[..., None], copies)[..., 0]),
            self.cache.pattern,
            Suffix(first_query, first_key),
        )
        return out.to(q.dtype)

    @cached_property
    def _visible(self) -> Tensor:
        """How many originals the hidden copies see, for each token of the first layer."""
        first = self.end - self.spans[0]
        return torch.arange(first + 1, self.end + 1, device=self.cache.lengths.device)

    def _hidden_keys(self, new: Pair, first_query: int, layer: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values of the hidden copies that the queries see, and their first token.

        They are the new ones, and before them those of earlier tokens, from the ring.
        """
        dtype, hidden = self.cache.ring[layer].dtype, self.hidden_per_token
        k, v = (x[:, :, self.cached :].to(dtype) for x in new)
        first = self.cache.pattern.first_influential_token(first_query, layers=1)
        if first >= self.past:
            return k, v, self.end - self.spans[layer]
        # Hidden copies that are no longer in the ring are seen by no new one. In their place is
        # another one, which is as good as any.
        number = torch.arange(first * hidden, self.past * hidden, device=k.device)
        earlier = self.cache.ring[layer].index_select(3, number % self.cache.ring_size)
        keys, values = (torch.cat(x, 2) for x in zip(earlier, (k, v), strict=True))
        return keys, values, first


def _by_copy(x: Tensor, copies: int) -> Tensor:
    """(B, heads, tokens * copies, H), token by token -> (B, heads, copies, tokens, H), a view."""
    return x.unflatten(2, (-1, copies)).transpose(2, 3)
