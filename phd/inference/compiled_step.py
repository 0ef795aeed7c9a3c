"""A decode step through `torch.compile`: few graphs, for all lengths, capacities and layers."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from phd.block import Block
from phd.inference.cache import KVCache
from phd.inference.decode_step import RaggedDecodeStep, slots_of_token
from phd.inference.incremental import LayerContext
from phd.model import Transformer
from phd.torch_private import mark_dynamic, with_recompile_limit

# Up to this number of layers all are one graph. A layer of a graph takes 2 to 3 s of a core to
# trace, and the loops of any number of layers take 25 s to compile.
MOST_LAYERS = 8
# With more, a graph has one of these numbers.
SIZES = (4, 3, 2, 1)
# All models are compiled from two functions, and torch's own limit is 8 graphs for each.
RECOMPILE_LIMIT = 256


class CompiledStep:
    """`phd.inference.prefill.static_decode_step` as a few calls of two compiled graphs.

        layers    0 1 2 3   4 5 6 7   8 9 10 11
        graph        a         a          b        b has the LM head, too

    A call costs a tenth of a millisecond on the host, and a layer of a graph seconds to compile. So
    a graph has up to four layers, or all where they are few. The cache's capacity is a symbol in a
    graph, as is the number of rows: there is one graph for 1 row and one for more.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        if model.config.passes > 1:
            raise ValueError(
                f"model.passes={model.config.passes}: a decode step of a loop cannot be compiled; "
                "leave compile out"
            )
        self.model, self.cache = model, cache
        self.blocks = [cast(Block, block) for block in model.blocks]
        self.size = layers_per_graph(len(self.blocks))
        self._between, self._last = (
            torch.compile(work, fullgraph=True, dynamic=False, backend=backend)
            for work in (_through, _through_last)
        )
        # Around all calls of a token, because setting the limit takes time.
        self._work = with_recompile_limit(self._through_all, RECOMPILE_LIMIT)
        self._marked: torch.Size | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """A token of each row, int64 (B,) -> logits (B, V); the cache gets its keys and values."""
        logits: Tensor = self._work(tokens)
        return logits

    def _through_all(self, tokens: Tensor) -> Tensor:
        model, cache, blocks, size = self.model, self.cache, self.blocks, self.size
        self._mark()
        x = slots_of_token(model.embedded(tokens[:, None]), cache.pattern.K).contiguous()
        mark_dynamic(x, 0)
        last = len(blocks) - size
        for i in range(0, last, size):
            x = self._between(blocks[i : i + size], x, model, cache.of_layers(i, i + size))
        return self._last(blocks[last:], x, model, cache.of_layers(last, None))

    def _mark(self) -> None:
        """Tell the compiler, when the cache is new or has grown, what may change."""
        shape = self.cache.originals[0].shape
        if shape == self._marked:
            return
        mark_dynamic(self.cache.lengths, 0)
        for x in (*self.cache.originals, *self.cache.ring):
            mark_dynamic(x, 1, 3)
        self._marked = shape


def layers_per_graph(layers: int) -> int:
    """How many layers a graph has; it divides their number.

    >>> [layers_per_graph(layers) for layers in (1, 8, 9, 11, 16)]
    [1, 8, 3, 1, 4]
    """
    if layers <= MOST_LAYERS:
        return layers
    return next(n for n in SIZES if layers % n == 0)


def _through(blocks: Sequence[Block], x: Tensor, model: Transformer, cache: KVCache) -> Tensor:
    step = RaggedDecodeStep(cache, model.rope, reach=cache.capacity, more_layers=True)
    for i, block in enumerate(blocks):
        x = block(x, LayerContext(step, i))
    return x


def _through_last(blocks: Sequence[Block], x: Tensor, model: Transformer, cache: KVCache) -> Tensor:
    step = RaggedDecodeStep(cache, model.rope, reach=cache.capacity)
    for i, block in enumerate(blocks):
        x = block(x, LayerContext(step, i))
    return model.predict(model.norm(x[:, 0]))[:, 0]
