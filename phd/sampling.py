"""Drawing text from a model, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phd.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: only the k most likely tokens; None: all.
        top_p: only the most likely tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751); None: all.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Every impossible setting, one sentence each."""
        found = []
        if self.temperature < 0:
            found.append(f"temperature={self.temperature}: expected a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k}: expected an integer of at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: expected a number above 0 and up to 1, or null")
        return found

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) -> token ids (B,), with the randomness of `generator` (on the CPU)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float().cpu()
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
    prompt: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    max_tokens: int,
) -> Iterator[Tensor]:
    """Yield up to `max_tokens` new token ids (B,), one position at a time.

    Args:
        prompt: int64 (B, T), T >= 1.

    Each is drawn from a full forward pass over everything so far; where that is longer than
    RoPE's table, over its end.
    """
    tokens = prompt
    for _ in range(max_tokens):
        context = tokens[:, -model.config.max_seq_len :]
        logits = model.predict(model(context)[:, -1])
        new = sampling.draw(logits, generator).to(tokens.device)
        yield new
        tokens = torch.cat([tokens, new[:, None]], dim=1)
