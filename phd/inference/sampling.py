"""Sampling text from a model, token by token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phd.config import SamplingConfig
from phd.inference.cache import CAPACITY_STEP, KVCache
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import decode, prefill
from phd.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Draws the next token from logits."""

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) -> token ids (B,), drawn by `generator`, which is on the CPU."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float().cpu()
        # Less the largest first: a small temperature would make the others overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, order, ordered)
        return logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    max_tokens: int,
    *,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield `max_tokens` times the new token ids (B,), one for each text.

    When a text fills the model's context, generation continues from a new prefill of its last half.

    Args:
        prompts: int64 (T,) each, T >= 1, of any lengths.
        generators: one for each text, so that a text does not depend on the texts beside it.
        compiled: decode by `torch.compile`, which compiles once for each number of texts and each
            capacity of the cache.
    """
    limit = model.config.max_seq_len
    texts = [prompt if len(prompt) <= limit else _end(prompt, limit) for prompt in prompts]
    while max_tokens:
        longest = max(map(len, texts))
        capacity = min(limit, longest + max_tokens)
        if compiled:
            # Few different capacities, so that little is compiled.
            capacity = min(limit, ceil(capacity / CAPACITY_STEP) * CAPACITY_STEP)
        logits, cache = _prefill_texts(model, texts, capacity)
        new: list[Tensor] = []
        step: Callable[[Tensor], Tensor] = partial(decode, model, cache=cache)
        if compiled or logits.is_cuda:
            step = Decoder(model, cache, compiled=compiled)
        while True:
            rows = zip(logits, generators, strict=True)
            new.append(torch.cat([sampling.draw(row[None], generator) for row, generator in rows]))
            yield new[-1]
            max_tokens -= 1
            if not max_tokens or max(cache.host_lengths) == limit:
                break
            logits = step(new[-1].to(logits.device))
        added = torch.stack(new, 1).to(prompts[0].device)
        texts = [torch.cat(pair) for pair in zip(texts, added, strict=True)]
        texts = [text if len(text) <= limit else _end(text, limit) for text in texts]


def _prefill_texts(
    model: Transformer, texts: list[Tensor], capacity: int
) -> tuple[Tensor, KVCache]:
    return prefill(
        model,
        pad_sequence(texts, batch_first=True),
        [len(text) for text in texts],
        capacity=capacity,
    )


def _end(text: Tensor, limit: int) -> Tensor:
    """The last tokens of a text, half as many as the context has room for."""
    return text[-max(1, limit // 2) :]
