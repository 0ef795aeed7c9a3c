"""The log-likelihoods of texts after contexts, read through the KV cache.

contexts         a a a a b b            one cluster: they begin alike, and that is read once
                 a a a a c c c
continuations    a a a a b b|x x x      each context is read once, then all that may follow it
                 a a a a b b|y
                 a a a a c c c|z z
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conf.errors import ConfigError, Problem
from data.prefetch import never
from phd.device import as_current
from phd.inference.cache import KVCache
from phd.inference.prefill import extend, prefill
from phd.model import Transformer
from phd.transfer import to_device

Tokens = tuple[int, ...]

BATCH_TOKENS = 1 << 15
"""The most tokens, with padding, in the cache of a batch, to bound the memory."""

LOGITS = 1 << 27
"""The most logits at a time: half a GiB in float32."""

PIECE, SMALLEST_PIECE = 512, 8
"""Tokens of a continuation that are read at a time: the most, and the least."""

SHARED_PREFIX, CLUSTER = 32, 8
"""How many tokens so many contexts have to begin with alike to have them read once for all: fewer
would save less than the smaller batches cost."""


class StoppedError(Exception):
    """A signal to stop came before all was measured."""


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would write it.

    It is NaN where the model's logits are not finite.
    """

    nats: float
    is_greedy: bool


@dataclass
class Context:
    """A context, and the continuations whose likelihoods after it are wanted.

    Attributes:
        tokens: at least one.
        continuations: each at least one token.
        places: of each continuation among all results.
    """

    tokens: Tokens
    continuations: list[Tokens] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.continuations)

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


class Batch(NamedTuple):
    """Contexts that are read together, and how many first tokens they share with the next batch."""

    contexts: list[Context]
    shared: int


@torch.no_grad()
def loglikelihoods(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rank: int = 0,
    world_size: int = 1,
    stop_requested: Callable[[], bool] = never,
) -> dict[int, Likelihood]:
    """The likelihood of each continuation after its context, equal to the full forward pass's.

        log p(y | x) = sum over i of log p(y_i | x, y_1 ... y_(i-1))

    Contexts are divided among the ranks. The weights may be sharded: all ranks make the same calls.

    Args:
        model: on the device where it computes. It runs under the autocast of the caller.
        pairs: (context, continuation) in tokens, each at least one. What is too long for the model
            loses the beginning of its context.
        rank, world_size: of the ranks that share the work, all of which are given the same pairs.
        stop_requested: asked between batches, by all ranks at once.

    Returns:
        of this rank's contexts, by their places in `pairs`.

    Raises:
        StoppedError: a stop was requested.
        ConfigError: a continuation is longer than `model.max_seq_len`.
    """
    found: dict[int, Likelihood] = {}
    prefix: tuple[Tokens, KVCache] | None = None
    with as_current(model.embed.weight.device):
        for number, batch in enumerate(planned(pairs, model.config.max_seq_len)):
            if number and stop_requested():
                raise StoppedError
            shared = batch.contexts[0].tokens[: batch.shared]
            if not shared:
                prefix = None
            elif prefix is None or prefix[0] != shared:
                prefix = shared, prefill(model, _padded([shared], model))[1]
            # Where there are fewer contexts than ranks, some read one that is another rank's.
            own = batch.contexts[rank::world_size] or batch.contexts[:1]
            longest = max(context.longest for context in batch.contexts)
            for context, results in zip(own, _read(model, own, prefix, longest), strict=True):
                found |= zip(context.places, results, strict=True)
    return found


def planned(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_seq_len: int
) -> Iterator[Batch]:
    """The batches in which the contexts of all pairs are read: the same on every rank.

    >>> pairs = [([1, 2], [3]), ([4], [5, 6]), ([1, 2], [7, 8])]
    >>> [(c.tokens, c.continuations) for batch in planned(pairs, 8) for c in batch.contexts]
    [((1, 2), [(3,), (7, 8)]), ((4,), [(5, 6)])]
    """
    contexts: dict[Tokens, Context] = {}
    for place, (before, after) in enumerate(pairs):
        tokens, continuation = _fitted(before, after, max_seq_len)
        context = contexts.setdefault(tokens, Context(tokens))
        context.continuations.append(continuation)
        context.places.append(place)
    for cluster, shared in _clusters(sorted(contexts.values(), key=lambda c: c.tokens)):
        # Rows of about one length are padded least.
        cluster.sort(key=lambda context: -len(context.tokens))
        for together in _batches(cluster):
            yield Batch(together, shared)


def _fitted(before: Sequence[int], after: Sequence[int], max_seq_len: int) -> tuple[Tokens, Tokens]:
    """A context without the first tokens that leave no room for the rest."""
    assert len(before) >= 1 <= len(after), (before, after)
    if len(after) > max_seq_len:
        reason = f"a task has a text of {len(after)} tokens to predict after a context"
        hint = "leave that task out, or evaluate a model with a longer one"
        raise ConfigError([Problem("model.max_seq_len", max_seq_len, reason, hint)])
    # The last token is predicted and never fed, so there is room for one more.
    room = max_seq_len + 1 - len(after)
    return tuple(before[-room:]), tuple(after)


def _clusters(contexts: list[Context]) -> Iterator[tuple[list[Context], int]]:
    """Runs of sorted contexts that begin alike, each with the number of tokens they share.

    A run goes on while it keeps half of what its first two contexts share. Contexts that are in no
    long run come last, together.
    """
    alone: list[Context] = []
    start = 0
    while start < len(contexts):
        stop, shared, least = start + 1, len(contexts[start].tokens), SHARED_PREFIX
        while stop < len(contexts):
            common = min(shared, _common(contexts[stop - 1].tokens, contexts[stop].tokens))
            if common < least:
                break
            if stop == start + 1:
                least = max(least, -(-common // 2))
            stop, shared = stop + 1, common
        if stop - start >= CLUSTER:
            yield contexts[start:stop], shared
        else:
            alone += contexts[start:stop]
        start = stop
    if alone:
        yield alone, 0


def _common(a: Tokens, b: Tokens) -> int:
    """How many first tokens are equal; at least one token of each is left over."""
    length = min(len(a), len(b)) - 1
    return next((i for i in range(length) if a[i] != b[i]), max(length, 0))


def _batches(contexts: list[Context]) -> Iterator[list[Context]]:
    """Contexts in their order, as many at a time as `BATCH_TOKENS` allow."""
    batch: list[Context] = []
    rows = length = 0
    for context in contexts:
        rows += context.rows
        length = max(length, len(context.tokens) + context.longest)
        if batch and rows * length > BATCH_TOKENS:
            yield batch
            batch, rows, length = [], context.rows, len(context.tokens) + context.longest
        batch.append(context)
    if batch:
        yield batch


def _read(
    model: Transformer,
    contexts: list[Context],
    prefix: tuple[Tokens, KVCache] | None,
    longest: int,
) -> list[list[Likelihood]]:
    """The likelihoods of all continuations of some contexts, which are read together.

    Args:
        prefix: the tokens with which all of them begin, and the cache that remembers these.
        longest: tokens of the longest continuation on any rank.
    """
    logits, cache = _read_contexts(model, [context.tokens for context in contexts], prefix)
    owners = [row for row, context in enumerate(contexts) for _ in context.continuations]
    rows = to_device(owners, logits.device)
    continuations = [c for context in contexts for c in context.continuations]
    reader = _Reader(model, continuations)
    reader.take(logits.index_select(0, rows)[:, None], [1] * len(owners))
    if longest > 1:
        cache.select(rows)
        reader.read(cache, longest - 1)
    results = iter(reader.results())
    return [[next(results) for _ in context.continuations] for context in contexts]


def _read_contexts(
    model: Transformer, contexts: list[Tokens], prefix: tuple[Tokens, KVCache] | None
) -> tuple[Tensor, KVCache]:
    """The logits (B, V) after contexts, and the cache that remembers them."""
    if prefix is None:
        return prefill(model, _padded(contexts, model), [len(tokens) for tokens in contexts])
    shared, remembered = prefix
    cache = copy(remembered)  # `select` gives the copy tensors of its own
    cache.host_lengths = list(remembered.host_lengths)
    cache.select(torch.zeros(len(contexts), dtype=torch.int64, device=cache.lengths.device))
    rest = [tokens[len(shared) :] for tokens in contexts]
    return extend(model, _padded(rest, model), cache, [len(tokens) for tokens in rest])[:, 0], cache


class _Reader:
    """Adds up the likelihoods of continuations, while they are read piece by piece.

    Attributes:
        total: float64 (rows,), nats so far.
        greedy: bool (rows,), whether each token so far is the most likely one.
        predicted: how many tokens of each row are counted in them.
    """

    def __init__(self, model: Transformer, continuations: list[Tokens]) -> None:
        self.model, self.continuations = model, continuations
        device = model.embed.weight.device
        self.total = torch.zeros(len(continuations), dtype=torch.float64, device=device)
        self.greedy = torch.ones(len(continuations), dtype=torch.bool, device=device)
        self.predicted = [0] * len(continuations)

    def take(self, logits: Tensor, counts: list[int]) -> None:
        """Count the next tokens of each row.

        Args:
            logits: (rows, keep, V), right-aligned: the last `counts[row]` predict a row's tokens.
        """
        keep = logits.shape[1]
        aligned = []
        for row, count in enumerate(counts):
            first = self.predicted[row]
            tokens = self.continuations[row][first : first + count]
            aligned.append([*[-1] * (keep - count), *tokens])
            self.predicted[row] += count
        targets = to_device(aligned, logits.device)
        counted, target = targets >= 0, targets.clamp(min=0)
        logits = logits.float()
        chosen = logits.gather(2, target[..., None])[..., 0]
        nats = (chosen - logits.logsumexp(2)).masked_fill(~counted, 0.0)
        self.total += nats.double().sum(1)
        self.greedy &= ((logits.argmax(2) == target) | ~counted).all(1)

    def read(self, cache: KVCache, longest: int) -> None:
        """Feed the tokens of all continuations but their last, and count what they predict.

        Args:
            longest: tokens that are fed of the longest continuation on any rank.
        """
        rows, size = len(self.continuations), self.model.config.vocab_size
        piece = min(PIECE, max(SMALLEST_PIECE, LOGITS // (rows * size)))
        for start in range(0, longest, piece):
            parts = [tokens[:-1][start : start + piece] for tokens in self.continuations]
            counts = [len(part) for part in parts]
            if any(counts):
                logits = extend(
                    self.model, _padded(parts, self.model), cache, counts, keep=max(counts)
                )
                self.take(logits, counts)
            else:
                # Another rank has longer rows, and its blocks gather weights of this rank, too.
                prefill(self.model, _padded([self.continuations[0][:1]], self.model))

    def results(self) -> list[Likelihood]:
        """Of each row."""
        assert self.predicted == [len(tokens) for tokens in self.continuations]
        return list(map(Likelihood, self.total.tolist(), self.greedy.tolist()))


def _padded(rows: Sequence[Tokens], model: Transformer) -> Tensor:
    """Rows of tokens as one tensor (rows, longest) on the model's device."""
    tensors = [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows]
    return to_device(pad_sequence(tensors, batch_first=True), model.embed.weight.device)
