"""Decoding as one CUDA graph: the host starts a token's whole work with a single call."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from phd.inference.cache import KVCache
from phd.inference.prefill import make_room, one_step
from phd.model import Transformer

WARM_UP = 3
# How many models and shapes may be compiled, which all share one function; PyTorch's limit is 8.
COMPILED = 256


class Decoder:
    """`phd.inference.prefill.decode` for one model and one cache, captured once and then replayed.

    Every shape follows from the cache's capacity, and lengths live on the device, so that one
    graph serves all lengths; where the cache has grown, it is captured again. Reserve what will be
    needed beforehand. On the CPU the same work is done without a graph.

    Args:
        compiled: fuse the work by `torch.compile` first, which takes a while.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, compiled: bool = False) -> None:
        self.model, self.cache = model, cache
        self._work: Callable[..., Tensor] = partial(one_step, static=True)
        if compiled:
            work = torch.compile(self._work, fullgraph=True, dynamic=False)
            self._work = torch._dynamo.config.patch(recompile_limit=COMPILED)(work)
        self._tokens = torch.zeros_like(cache.lengths)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: list[int] = []

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 (B,) -> logits (B, V) after them, which the next call overwrites.

        Raises:
            ValueError: a row would be longer than `model.max_seq_len`.
        """
        make_room(self.model, self.cache)
        self._tokens.copy_(tokens)
        if not tokens.is_cuda:
            self._logits = self._step()
        else:
            if self._captured != self._memory():
                self._capture()
            assert self._graph is not None
            self._graph.replay()
        self.cache.host_lengths = [length + 1 for length in self.cache.host_lengths]
        assert self._logits is not None
        return self._logits

    def _memory(self) -> list[int]:
        """Where the cache lies: a graph writes there, and nowhere else."""
        tensors = (*self.cache.originals, *self.cache.ring, self.cache.lengths)
        return [x.data_ptr() for x in tensors]

    def _step(self) -> Tensor:
        kind = self._tokens.device.type
        # Weights that autocast has converted and kept would be freed before a graph's next replay.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            logits = self._work(self.model, self._tokens, self.cache)
        self.cache.lengths += 1
        return logits

    def _capture(self) -> None:
        """Record the work of one token; what the cache held stays as it was."""
        lengths = self.cache.lengths.clone()
        ring = [x.clone() for x in self.cache.ring]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
                # The next token's place has been written to, which it will be again.
                self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
        for kept, x in zip(ring, self.cache.ring, strict=True):
            x.copy_(kept)
        self.cache.lengths.copy_(lengths)
        self._captured = self._memory()
