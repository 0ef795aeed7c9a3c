"""Continuous batching: requests share a batch, and a row that is done takes the next request."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conf.errors import ConfigError, Problem
from phd.config import SamplingConfig
from phd.device import as_current
from phd.inference.cache import CAPACITY_STEP, KVCache
from phd.inference.cuda_graph import Decoder
from phd.inference.fused_rows import has_fused_rows
from phd.inference.prefill import decode, new_cache, prefill
from phd.inference.sampling import NOT_FINITE, Sampler
from phd.model import Transformer
from phd.transfer import to_device

# Prompts of up to this length are prefilled together, whatever padding that takes, if the copies of
# their tokens are no more than `SHORT_SLOTS`: among unequal rows, a mask has that number squared.
SHORT_PROMPT, SHORT_SLOTS = 64, 1024
# The most tokens, with padding, of prompts that are prefilled together, to bound the memory.
PREFILL_TOKENS = 1 << 15
# So many numbers are drawn at once, which takes little more time than to draw one.
UNIFORMS_AT_ONCE = 64


class FinishReason(Enum):
    """Why a text got its last token."""

    STOP = "stop"
    """It is one of the request's `stop_ids`."""
    LENGTH = "length"
    """It is the last of `max_tokens`."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued.

    Attributes:
        prompt: token ids, at least one. Of a prompt longer than `model.max_seq_len` only the last
            `model.max_seq_len / 2` are used.
        max_tokens: the most new tokens.
        sampling: how they are sampled.
        seed: of the request's own random numbers, one for each new token. So what is drawn does not
            depend on the other requests.
        stop_ids: the tokens that end the text, which are given to the caller like the others.
    """

    prompt: Sequence[int]
    _: KW_ONLY
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    stop_ids: Collection[int] = ()

    def problems(self, vocab_size: int) -> list[Problem]:
        """Why a model with this vocabulary cannot serve the request."""
        found = []
        if not self.prompt:
            found.append(Problem("prompt", expected="has no token; begin with the separator"))
        elif not 0 <= min(self.prompt) <= max(self.prompt) < vocab_size:
            wrong = next(token for token in self.prompt if not 0 <= token < vocab_size)
            expected = f"token {wrong} is not in the vocabulary; model.vocab_size={vocab_size}"
            found.append(Problem("prompt", expected=expected))
        if self.max_tokens < 1:
            expected = "expected an integer of at least 1"
            found.append(Problem("max_tokens", self.max_tokens, expected))
        return found


class NewToken(NamedTuple):
    """A token that a request got.

    Attributes:
        request: what `Generator.submit` returned.
        token: its id.
        finish_reason: why this token is the request's last; None: more will come.
    """

    request: int
    token: int
    finish_reason: FinishReason | None


class Generator:
    """Continues many prompts at once, and keeps the batch full (arXiv 2309.06180, section 2.3).

        row 0    a a a a a a|d d d d d d d d        request d is prefilled into the row of a, whose
        row 1    b b b b b b b b b|e e e e e        place in the batch is free
        row 2    c c c|f f f f f f f f f f f

    Requests may be submitted and cancelled at any time. Each gets the tokens that it would get
    alone, except for rounding. A text that fills `model.max_seq_len` goes on from a new prefill of
    its last half.

    On CUDA the host launches the work of a token before it reads the token before it, so the device
    computes while the caller handles tokens, and the host waits once a token. It learns one token
    late that a text has ended, and drops that token.

        device    | token 1 | token 2 | token 3 |
        host            launch 2 | read 1 | launch 3 | read 2 | ...

    >>> from phd.config import ModelConfig
    >>> model = Transformer(ModelConfig(dim=8, ffn_dim=8, vocab_size=9)).reset(0)
    >>> requests = [Request([1, n], max_tokens=n) for n in (2, 3, 1)]
    >>> [len(tokens) for tokens in Generator(model, batch=2).generate(requests)]
    [2, 3, 1]

    Args:
        model: on the device where it computes. Steps run under the autocast of their caller.
        batch: the most requests that are decoded at once.
        capacity: tokens that each row of the cache has room for, allocated at the first step; None:
            as many as the requests need, and the cache grows with them.
        compiled: decode by `torch.compile`; see `phd.inference.cuda_graph.Decoder`.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        batch: int = 8,
        capacity: int | None = None,
        compiled: bool = False,
    ) -> None:
        assert batch >= 1, batch
        assert capacity is None or capacity >= 1, capacity
        self.model, self.batch, self.capacity, self.compiled = model, batch, capacity, compiled
        self.device = model.embed.weight.device
        self._limit = model.config.max_seq_len
        # Graphs and compiled work have a fixed number of rows; otherwise there are no idle ones.
        self._is_fixed = compiled or self.device.type == "cuda"
        # How many launches the host does not wait for; on the CPU nothing runs meanwhile.
        self._ahead = int(self.device.type == "cuda")
        self._unfinished: dict[int, _Text] = {}
        self._waiting: deque[_Text] = deque()
        self._rows: list[_Text | None] = []
        self._unread: deque[_Unread] = deque()
        # What a step has returned to `__iter__`, whose caller has not taken it yet.
        self._read_ahead: deque[NewToken] = deque()
        self._submitted = 0
        self._cache: KVCache | None = None
        self._decoder: Decoder | None = None
        self._sampler: Sampler | None = None
        self._row_sampling: list[SamplingConfig] = []
        # The last token of each row, int64 (rows,), on the device.
        self._tokens = torch.zeros(0, dtype=torch.int64, device=self.device)

    @property
    def unfinished(self) -> int:
        """How many requests have not got their last token."""
        return len(self._unfinished)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, which counts from 0.

        Raises:
            ConfigError: the request is impossible, or has no room in `capacity`.
        """
        found = request.problems(self.model.config.vocab_size)
        text = _Text(self._submitted, request)
        room = text.room(self._limit)
        if self.capacity is not None and room > self.capacity and not found:
            prompt = len(text.context(self._limit))
            expected = (
                f"a prompt of {prompt} tokens with max_tokens={request.max_tokens} needs {room}"
            )
            hint = "shorten the prompt, lower max_tokens, or give the generator more capacity"
            found.append(Problem("capacity", self.capacity, expected, hint))
        if found:
            raise ConfigError(found, "the request")
        self._submitted += 1
        self._unfinished[text.number] = text
        self._waiting.append(text)
        return text.number

    def cancel(self, request: int) -> None:
        """Give a request no more tokens. It may have finished already."""
        assert 0 <= request < self._submitted, request
        self._read_ahead = deque(new for new in self._read_ahead if new.request != request)
        text = self._unfinished.get(request)
        if text is None:
            return
        self._finish(text)
        if text in self._waiting:
            self._waiting.remove(text)

    def __iter__(self) -> Iterator[NewToken]:
        """All tokens until no request is left; those of a request come in order."""
        while self._unfinished or self._read_ahead:
            if self._read_ahead:
                yield self._read_ahead.popleft()
            else:
                self._read_ahead.extend(self.step())

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """Submit requests to an idle generator; returns the new tokens of each, in order."""
        assert not self._unfinished, "requests in progress would lose their tokens"
        texts: dict[int, list[int]] = {}
        try:
            for request in requests:
                texts[self.submit(request)] = []
            for new in self:
                texts[new.request].append(new.token)
            return list(texts.values())
        finally:  # after an error or Ctrl-C, none of them is in progress
            for number in texts:
                self.cancel(number)

    @torch.no_grad()
    def step(self) -> list[NewToken]:
        """Launch one token of each row, and return those that were read then.

        Waiting requests come first: where a row is free, a step is their prefill.

        Raises:
            FloatingPointError: the model's logits for a request are not finite. The request is
                finished, and the others go on at the next step.
        """
        was_running = any(self._rows)
        with as_current(self.device):
            is_launched = self._fill_rows() or self._decode()
        # The first tokens are read at once: the next launch may have to capture a graph.
        ahead = self._ahead if is_launched and was_running else 0
        while len(self._unread) > ahead:
            self._read_ahead.extend(self._read(self._unread.popleft()))
        new = [*self._read_ahead]
        self._read_ahead.clear()
        return new

    def _fill_rows(self) -> bool:
        """Prefill waiting requests into free rows; False if there are none of either."""
        free = self.batch - sum(text is not None for text in self._rows)
        entering = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        if entering:
            self._make_room(max(text.room(self._limit) for text in entering))
        self._arrange_rows(len(entering))
        rows = [row for row, text in enumerate(self._rows) if text is None]
        lengths = [len(text.context(self._limit)) for text in entering]
        for group in _prefilled_together(lengths, self._shares_prefill):
            self._prefill([rows[i] for i in group], [entering[i] for i in group])
        return bool(entering)

    def _shares_prefill(self, shortest: int, longest: int) -> bool:
        """Whether prompts of these lengths are prefilled together."""
        assert self._cache is not None
        if longest <= min(SHORT_PROMPT, SHORT_SLOTS // self._cache.pattern.K):
            return True
        # The fused kernels take rows of one length, and in others hidden copies are far slower. So
        # they are where originals see them, and all have to be computed.
        one_length = has_fused_rows(self._cache) or self._cache.pattern.originals_see_hidden
        return longest <= (1 if one_length else 2) * shortest

    def _make_room(self, tokens: int) -> None:
        """Allocate the cache, or let it grow."""
        if self._cache is None:
            capacity = self.capacity or min(CAPACITY_STEP, self._limit)
            self._cache = new_cache(self.model, self.batch if self._is_fixed else 1, capacity)
            self._rows = [None] * len(self._cache.host_lengths)
            self._tokens = torch.zeros_like(self._cache.lengths)
            if self._is_fixed:
                self._decoder = Decoder(self.model, self._cache, compiled=self.compiled)
        self._cache.reserve(tokens)

    def _arrange_rows(self, entering: int) -> None:
        """Where nothing fixes the number of rows, have as many as there will be texts."""
        kept = [row for row, text in enumerate(self._rows) if text is not None]
        wanted = len(kept) + entering
        if self._is_fixed or wanted in (0, len(self._rows)):
            return
        free = [row for row, text in enumerate(self._rows) if text is None]
        # Rows beyond these are copies of any, which prefills overwrite.
        chosen = [*kept, *free[:entering], *[0] * (entering - len(free))]
        index = torch.tensor(chosen, device=self.device)
        assert self._cache is not None
        self._cache.select(index)
        self._tokens = self._tokens.index_select(0, index)
        self._rows = [*(self._rows[row] for row in kept), *[None] * entering]

    def _prefill(self, rows: list[int], texts: "list[_Text]") -> None:
        """Let texts that enter have these rows, and draw their next tokens."""
        assert self._cache is not None
        contexts = [torch.tensor(t.context(self._limit), device="cpu") for t in texts]
        tokens = to_device(pad_sequence(contexts, batch_first=True), self.device)
        logits, filled = prefill(self.model, tokens, [len(context) for context in contexts])
        self._cache.replace(rows, filled)
        sampler = Sampler([text.request.sampling for text in texts], self.device)
        drawn = self._draw(sampler, logits, texts)
        self._tokens.index_copy_(0, to_device(rows, self.device), drawn)
        for row, text in zip(rows, texts, strict=True):
            self._rows[row], text.has_row = text, True
        self._leave_rows()

    def _decode(self) -> bool:
        """Launch the next token of each row; False if no row has a text."""
        running = [text for text in self._rows if text is not None]
        if not running:
            return False
        assert self._cache is not None
        idle = [row for row, text in enumerate(self._rows) if text is None]
        if idle:
            self._cache.clear(idle)  # else they would run out of room
        if self._decoder is not None:
            logits = self._decoder(self._tokens)
        else:
            logits = decode(self.model, self._tokens, self._cache)
        # Idle rows are sampled like one of the others.
        sampling = [(text or running[0]).request.sampling for text in self._rows]
        if self._sampler is None or sampling != self._row_sampling:
            self._sampler, self._row_sampling = Sampler(sampling, self.device), sampling
        self._tokens = self._draw(self._sampler, logits, self._rows)
        self._leave_rows()
        return True

    def _draw(self, sampler: Sampler, logits: Tensor, texts: "Sequence[_Text | None]") -> Tensor:
        """Draw a token for each row, start to copy them to the host, and return what is fed next.

        Args:
            texts: of each row; None: idle.
        """
        uniforms = None
        if not sampler.all_greedy:
            numbers = [0.0 if text is None else text.next_uniform() for text in texts]
            uniforms = to_device(numbers, self.device, torch.float64)
        drawn = sampler.draw(logits, uniforms)
        self._unread.append(_Unread.of(texts, drawn))
        for text in texts:
            if text is not None:
                text.launched += 1
        return drawn.clamp(min=0)

    def _leave_rows(self) -> None:
        """Free the rows of texts whose last token is launched, and of those that fill the context.

        The latter are prefilled again when all of their tokens have been read.
        """
        assert self._cache is not None
        for row, text in enumerate(self._rows):
            if text is not None and (
                text.launched == text.request.max_tokens
                or self._cache.host_lengths[row] == self._limit
            ):
                self._rows[row], text.has_row = None, False

    def _finish(self, text: "_Text") -> None:
        del self._unfinished[text.number]
        if text.has_row:
            self._rows[self._rows.index(text)] = None

    def _read(self, unread: "_Unread") -> Iterator[NewToken]:
        """Wait for tokens that were launched; those of texts that have finished are dropped."""
        for i, (text, token) in enumerate(zip(unread.texts, unread.wait(), strict=True)):
            if text is None or text.number not in self._unfinished:
                continue
            if token == NOT_FINITE:
                self._finish(text)
                rest = _Unread(unread.texts[i + 1 :], unread.tokens[i + 1 :], None)
                self._unread.appendleft(rest)  # for the next step
                raise FloatingPointError(
                    f"request {text.number}: the model's logits of new token {text.read} are not "
                    "finite; its weights are damaged, or its training has diverged"
                )
            reason = text.add(token)
            if reason is not None:
                self._finish(text)
            elif text.read == text.launched and not text.has_row:
                self._waiting.appendleft(text)
            yield NewToken(text.number, token, reason)


class _Text:
    """A request in progress.

    Attributes:
        number: of the request.
        tokens: the prompt, and the new tokens that have been read.
        launched: how many new tokens the device computes or has computed.
        read: how many of them have been read.
        has_row: whether it is in the batch.
    """

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.tokens = list(request.prompt)
        self.launched = self.read = 0
        self.has_row = False
        self._random = torch.Generator("cpu").manual_seed(request.seed)
        self._uniforms: list[float] = []

    def context(self, limit: int) -> list[int]:
        """What is prefilled: all tokens, or the last half of a context where there are too many."""
        return self.tokens if len(self.tokens) <= limit else self.tokens[-max(1, limit // 2) :]

    def room(self, limit: int) -> int:
        """The tokens that a cache has to have room for; the last new one is never fed."""
        left = self.request.max_tokens - self.read
        return min(limit, len(self.context(limit)) + left - 1)

    def next_uniform(self) -> float:
        """The next of the request's random numbers, of [0, 1)."""
        if not self._uniforms:
            numbers = torch.rand(
                UNIFORMS_AT_ONCE, generator=self._random, dtype=torch.float64, device="cpu"
            )
            self._uniforms = numbers.tolist()[::-1]
        return self._uniforms.pop()

    def add(self, token: int) -> FinishReason | None:
        """Take a new token; returns why it is the last, if it is."""
        self.tokens.append(token)
        self.read += 1
        if token in self.request.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.read == self.request.max_tokens else None


class _Unread(NamedTuple):
    """Drawn tokens on their way to the host.

    Attributes:
        texts: of each row; None: idle.
        tokens: int64 (rows,) on the host.
        is_copied: the event after the copy; None: it is done.
    """

    texts: "list[_Text | None]"
    tokens: Tensor
    is_copied: torch.cuda.Event | None

    @classmethod
    def of(cls, texts: "Sequence[_Text | None]", drawn: Tensor) -> "_Unread":
        if not drawn.is_cuda:
            return cls(list(texts), drawn, None)
        tokens = torch.empty(drawn.shape, dtype=drawn.dtype, device="cpu", pin_memory=True)
        tokens.copy_(drawn, non_blocking=True)
        return cls(list(texts), tokens, torch.cuda.current_stream(drawn.device).record_event())

    def wait(self) -> list[int]:
        if self.is_copied is not None:
            self.is_copied.synchronize()
        return self.tokens.tolist()


def _prefilled_together(
    lengths: Sequence[int], share: Callable[[int, int], bool]
) -> list[list[int]]:
    """Groups of prompts, by their indices, which are prefilled together with little padding.

    Args:
        lengths: of the prompts.
        share: whether prompts of two lengths, the lower one first, may be in a group.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        longest = lengths[i]
        if (
            groups
            and share(lengths[groups[-1][0]], longest)
            and longest * (len(groups[-1]) + 1) <= PREFILL_TOKENS
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
