"""Decoding the last tokens of a batch of rows: ours, and that of transformers."""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from phd.hf.convert import to_hugging_face
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import decode, new_cache
from phd.model import Transformer
from train.benchmarks.family import random_tokens
from train.engines.device import autocast


class Decode:
    """Greedy decoding of the last `steps` tokens of some rows, the same tokens in every turn.

    The keys and values of earlier tokens are random numbers: their values do not change the time,
    and filling the cache by a prefill would take minutes at 8192 tokens and K = 256. A ring of
    hidden copies still holds those of the turn before.

    Args:
        lengths: the tokens of each row in the end.
        steps: how many tokens of each row are decoded in a turn.
        compiled: decode by `torch.compile`.

    Attributes:
        step: what computes a token: `fused`, `compiled` or `eager`.
    """

    def __init__(
        self, model: Transformer, lengths: Sequence[int], steps: int, *, compiled: bool = False
    ) -> None:
        self.model, self.config = model, model.config
        self.lengths, self.steps = list(lengths), steps
        weight = model.embed.weight
        self.precision = partial(autocast, weight.device, weight.dtype)
        with self.precision():
            self.cache = new_cache(model, len(lengths), capacity=max(lengths))
        for x in (*self.cache.originals, *self.cache.ring):
            x.normal_()
        self.begins = torch.tensor(lengths, device=weight.device) - steps
        self.first = random_tokens(self.config.vocab_size, len(lengths)).to(weight.device)
        self.decode: Callable[[Tensor], Tensor] = partial(decode, model, cache=self.cache)
        self.step = "eager"
        # `Decoder` replays a CUDA graph. On the CPU it pays off only if it is compiled.
        if compiled or self.first.is_cuda:
            self.decode = decoder = Decoder(model, self.cache, compiled=compiled)
            self.step = decoder.kind

    @torch.inference_mode()
    def __call__(self) -> None:
        # The cache is set back, so that every turn does the same work.
        self.cache.host_lengths = [length - self.steps for length in self.lengths]
        self.cache.lengths.copy_(self.begins)
        tokens = self.first
        with self.precision():
            for _ in range(self.steps):
                tokens = self.decode(tokens).argmax(-1)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that is allocated."""
        return self.cache.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes that the last step must read: each weight once, and what each row has cached."""
        # A token reads one row of a table: of an untied embedding, and of those of hidden copies.
        tables = [] if self.config.tied else ["embed.weight"]
        tables += ["copy_input.weight"] * (self.config.hidden_input == "table")
        named = self.model.named_parameters(remove_duplicate=False)
        weights = sum(weight.nbytes for name, weight in named if name not in tables)
        originals = sum(x.nbytes for x in self.cache.originals)
        share = sum(self.lengths) / (len(self.lengths) * self.cache.capacity)
        return weights + round(originals * share) + sum(x.nbytes for x in self.cache.ring)


def floor(work: Decode, seconds: float, copy_speed: float) -> dict[str, float]:
    """The columns that compare a token's time with reading what it must read at a copy's speed."""
    least = work.bytes_read / copy_speed
    return {"floor_ms": least * 1e3, "of_copy": least / seconds}


def in_transformers(vanilla: Transformer) -> Olmo2ForCausalLM:
    """A model with the weights of `vanilla`."""
    weight = vanilla.embed.weight
    shape, weights = to_hugging_face(vanilla.config, vanilla.state_dict())
    with weight.device:  # weights that are replaced at once take the CPU longer
        model = Olmo2ForCausalLM(Olmo2Config(**shape)).to(weight.dtype).eval()  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return model


class TokenTimes(BaseStreamer):
    """A streamer of transformers that notes the time at which each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class TransformersDecode:
    """The same decoding by transformers: greedy `generate` with its static cache.

    On CUDA, transformers compiles the work of a token by itself. Shorter prompts are padded on the
    left, as it asks for.

    Args:
        model: of `in_transformers`.
        lengths: the tokens of each row in the end.
        steps: how many tokens of each row are decoded in a turn.

    Attributes:
        seconds: time per token of each turn. The clock starts when the prompts have given the first
            token, so that prefill does not count.
    """

    def __init__(self, model: Olmo2ForCausalLM, lengths: Sequence[int], steps: int) -> None:
        self.model, self.steps = model, steps
        longest = max(lengths) - steps
        self.prompt = random_tokens(model.config.vocab_size, len(lengths), longest).to(model.device)
        begins = torch.tensor([longest - (length - steps) for length in lengths])[:, None]
        self.mask = (torch.arange(longest) >= begins).long().to(model.device)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        arrivals = TokenTimes()
        self.model.generate(  # type: ignore[misc]
            self.prompt,
            attention_mask=self.mask,
            max_new_tokens=self.steps + 1,
            do_sample=False,
            cache_implementation="static",
            streamer=arrivals,
        )
        # The streamer is also called with the prompt.
        _prompt, first, *_, last = arrivals.times
        self.seconds.append((last - first) / self.steps)
