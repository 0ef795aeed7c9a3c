"""One decoded token by the kernels, beside the same by `RaggedDecodeStep` in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phd.attention.blocks import has_local_kernels
from phd.config import ModelConfig
from phd.inference.cache import KVCache
from phd.inference.decode_step import RaggedDecodeStep
from phd.inference.kernels.placement import QkvNorms, place_token
from phd.inference.kernels.token_attention import attend_token
from phd.inference.kernels.token_cache import TokenCache, new_hidden_copies
from phd.model import Transformer
from phd.pattern import Pattern, patterns_of

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def has_token_kernels(config: ModelConfig) -> bool:
    """Whether the kernels follow a model's rule; what else goes the general path."""
    pattern = Pattern.of(config)
    in_all_layers = config.passes == 1 and set(patterns_of(config)) == {pattern}
    return in_all_layers and has_local_kernels(pattern) and pattern.key_copies == pattern.K


class Twins:
    """Rows that a cache of float64 remembers, and one for the kernels.

    Both begin with the same random numbers, also where nothing has been written yet.
    """

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.model = Transformer(config).reset(0)
        for name, weight in self.model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(weight, 0.5, 1.5)
        self.model.to(dtype)
        self.norms = [
            QkvNorms(*(None if x is None else x.to(device) for x in norms[:3]), *norms[3:])
            for norms in (QkvNorms.of(block.attention) for block in self.model.blocks)
        ]
        self.model.double().rope.build(torch.device("cpu"))  # in float32 again
        self.fast_rope = Transformer(config).rope.to(device)
        self.slow = KVCache(config, len(lengths), capacity=capacity, dtype=torch.float64)
        self.fast = KVCache(config, len(lengths), capacity=capacity, dtype=dtype, device=device)
        for x in (*self.fast.originals, *self.fast.ring):
            x.normal_()
        self.new = new_hidden_copies(self.fast)
        for cache in (self.slow, self.fast):
            cache.advance(lengths)

    @torch.no_grad()
    def add_token(self, splits: int | None = None) -> None:
        """Add one token to each row of both in all layers, and compare everything."""
        copies = zip(
            (*self.slow.originals, *self.slow.ring),
            (*self.fast.originals, *self.fast.ring),
            strict=True,
        )
        for slow, fast in copies:
            slow.copy_(fast)
        step = RaggedDecodeStep(self.slow, self.model.rope, reach=self.slow.capacity)
        for layer in range(self.config.layers):
            slow, fast = self._outputs(step, layer, splits)
            self.check(fast, slow)
            self.check(self.fast.originals[layer], self.slow.originals[layer])
            self.check(self.fast.ring[layer], self.slow.ring[layer])
        for cache in (self.slow, self.fast):
            cache.advance([1] * len(cache.host_lengths))

    def _outputs(
        self, step: RaggedDecodeStep, layer: int, splits: int | None
    ) -> tuple[Tensor, Tensor]:
        c, B = self.config, len(self.fast.host_lengths)
        widths = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
        qkv = torch.randn(B * c.K, sum(widths)).to(self.dtype)
        attention, last = self.model.blocks[layer].attention, step.is_last(layer)
        q, k, v = qkv.double().view(B, 1, c.K, -1).split(widths, -1)
        q = q[:, :, -1:] if last else q
        parts = (q, attention.q_norm), (k, attention.k_norm), (v, attention.v_norm)
        q, k, v = (attention._split_heads(x, norm) for x, norm in parts)
        slow = (
            step.attend(q * c.query_gain, k, v, layer)
            .squeeze(2)
            .transpose(1, 2)
            .flatten(0, 1)
            .flatten(1)
        )
        return slow, self.fast_output(qkv, layer, last, splits)

    def fast_output(self, qkv: Tensor, layer: int, last: bool, splits: int | None) -> Tensor:
        cache, pattern = TokenCache.of(self.fast, layer, self.new), self.fast.pattern
        parts = torch.stack([qkv.float() - 1, torch.ones(qkv.shape)])  # two halves of D
        q = place_token(
            parts.to(self.device),
            self.norms[layer],
            self.fast_rope,
            cache,
            pattern,
            last_copy_only=last,
        )
        return attend_token(q, cache, pattern, splits)

    def check(self, fast: Tensor, slow: Tensor) -> None:
        tolerance = TOLERANCE[self.dtype]
        assert fast.dtype == self.dtype
        torch.testing.assert_close(fast.cpu().double(), slow, rtol=tolerance, atol=tolerance)
