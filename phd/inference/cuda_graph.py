"""Decoding as one CUDA graph: the host starts all work of a token with a single call."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from phd.device import as_current
from phd.inference.cache import KVCache
from phd.inference.compiled_step import CompiledStep
from phd.inference.prefill import make_room, static_decode_step
from phd.model import Transformer
from phd.torch_private import HAS_TRITON, has_hooks

# Steps before the capture, in which libraries allocate what a graph must not; torch's own examples
# take 3.
WARM_UP_STEPS = 3


def can_be_captured(model: Transformer) -> bool:
    """Whether its work is on this device alone, at the same addresses for every token.

    Hooks may do anything; FSDP2's gather a block's weights before it is called, and free them.
    """
    return not any(map(has_hooks, model.modules()))


class Decoder:
    """`phd.inference.prefill.decode` for one model and one cache, captured once and then replayed.

    Every shape follows from the cache's capacity, and lengths are read on the device, so one graph
    serves all lengths. When the cache grows, the work is captured again: `reserve` the room before.
    The same work runs without a graph on the CPU, and where `can_be_captured` says no.

    On CUDA the work is that of `phd.inference.fused_step`, a few kernels for each layer, where
    `why_not_fused` has no objection; elsewhere it is `static_decode_step`.

    Args:
        compiled: fuse the work by `torch.compile` first, which takes up to a minute of a core once.

    Attributes:
        kind: what computes a token: `fused`, `compiled` or `eager`.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, compiled: bool = False) -> None:
        self.model, self.cache = model, cache
        self.kind: Literal["fused", "compiled", "eager"] = "compiled" if compiled else "eager"
        self._work: Callable[[Tensor], Tensor] = lambda tokens: static_decode_step(
            model, tokens, cache
        )
        if compiled:
            self._work = CompiledStep(model, cache)
        elif HAS_TRITON and cache.lengths.is_cuda:
            from phd.inference.fused_step import FusedStep, why_not_fused

            if why_not_fused(model, cache) is None:
                self.kind, self._work = "fused", FusedStep(model, cache)
        # A graph reads its input from a fixed address, to which each call copies its tokens.
        self._tokens = torch.zeros_like(cache.lengths)
        self._logits: Tensor | None = None
        self._captures = cache.lengths.is_cuda and can_be_captured(model)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_addresses: list[int] = []

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 (B,) -> logits (B, V) after them, which the next call overwrites.

        Raises:
            ValueError: a row would be longer than `model.max_seq_len`.
        """
        make_room(self.model, self.cache)
        self._tokens.copy_(tokens)
        if self._captures:
            with as_current(self._tokens.device):
                self._replay()
        else:
            self._logits = self._step()
        self.cache.host_lengths = [length + 1 for length in self.cache.host_lengths]
        assert self._logits is not None
        return self._logits

    def _replay(self) -> None:
        """Do the work of one token, captured before if it has not been."""
        if self._captured_addresses != self._addresses():
            self._capture()
        assert self._graph is not None
        self._graph.replay()

    def _addresses(self) -> list[int]:
        """Where the cache's tensors are: a graph reads and writes these addresses alone."""
        tensors = (*self.cache.originals, *self.cache.ring, self.cache.lengths)
        return [x.data_ptr() for x in tensors]

    def _step(self) -> Tensor:
        kind = self._tokens.device.type
        # Without autocast's cache: it would free converted weights, which a graph reads again.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            logits = self._work(self._tokens)
        self.cache.lengths += 1
        return logits

    def _capture(self) -> None:
        """Record the work of one token, and leave the cache as it was."""
        lengths = self.cache.lengths.clone()
        ring = [x.clone() for x in self.cache.ring]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._step()
                # The slot of the next token has been written; the first replay overwrites it.
                self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
        for kept, x in zip(ring, self.cache.ring, strict=True):
            x.copy_(kept)
        self.cache.lengths.copy_(lengths)
        self._captured_addresses = self._addresses()
