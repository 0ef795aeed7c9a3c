"""The PHD transformer: K copies of every token in, one prediction per token out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from phd.attention.attend import attend
from phd.block import Block
from phd.config import Backend, ModelConfig
from phd.initialization import initial_weights
from phd.linear import Linear, fuse_weights, project
from phd.loss import Loss, cross_entropy_per_target, next_token_loss
from phd.norm import RMSNorm
from phd.pattern import Pattern, patterns_of
from phd.rope import Rope, rotate
from phd.segments import Segments
from phd.torch_private import has_hooks


class RowPart(Protocol):
    """The tokens of each row that are computed here, where others are computed elsewhere.

    Attributes:
        position: int64 (B or 1, T), each token's position in its document.
    """

    position: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: Backend) -> Tensor:
        """`phd.attention.attend.attend` of these tokens' queries to the keys of the whole row.

        q, k and v are of the tokens that are here, as is the result.
        """


@dataclass(frozen=True)
class RowContext:
    """The `phd.block.AttentionContext` of whole rows, whose slots see what the pattern lets them.

    Attributes:
        rope: (cos, sin) of all copies.
        last_copy_only: only the last copy is computed; the others give keys and values alone.
        segments: documents that do not see each other; None: each row is one document.
        part: the rows' tokens that are here; None: all of them.
        first_pass: what the layer was given in the first pass of a loop, if keys and values are of
            that; None: they are of what it is given now.
    """

    pattern: Pattern
    backend: Backend
    rope: tuple[Tensor, Tensor]
    last_copy_only: bool
    segments: Segments | None
    part: RowPart | None = None
    first_pass: Tensor | None = None

    def select_queries(self, x: Tensor) -> Tensor:
        return x[:, -1:] if self.last_copy_only else x

    def select_keys(self, x: Tensor) -> Tensor:
        if self.first_pass is not None:
            return self.first_pass
        return x if self.pattern.key_copies == self.pattern.K else x[:, : self.pattern.key_copies]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.rotated(q, k, v)
        if self.part is not None:
            return self.part.attend(q, k, v, self.pattern, self.backend)
        return attend(q, k, v, self.pattern, self.backend, self.segments)

    def rotated(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `phd.attention.attend` takes: (B, heads, copies, T, H), rotated by RoPE."""
        cos, sin = self.rope
        K, Q = self.pattern.key_copies, 1 if self.last_copy_only else self.pattern.K
        q = rotate(q, cos[:, -Q:], sin[:, -Q:])
        k, v = rotate(k, cos[:, :K], sin[:, :K]), v.transpose(1, 2)
        # Copies that are still equal were projected once.
        q, k, v = (x.expand(-1, -1, copies, -1, -1) for x, copies in ((q, Q), (k, K), (v, K)))
        return q, k, v


class Transformer(nn.Module):
    """A decoder that computes K copies of each token and predicts from the last.

        tokens (B, T)
          | embed, copy_input, + copy_embedding
        x (B, K, T, D)          equal copies are kept as one until attention tells them apart
          | blocks[0 .. L-2]    every copy; with free_pause only originals have keys and values
          | blocks[L-1]         keys and values of every copy, all else of the last alone
          | norm                after model.passes times through all blocks; with muP, times 1/m
        hidden (B, T, D)        the last copy
          | head
        logits (B, T, V)

    Built on any device; on `meta`, call `to_empty` and then `reset` or `load`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patterns = patterns_of(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        if config.hidden_input != "token":
            # Copy s has the rows from (s-1) * V on of one table, or all have one row.
            tables = config.hidden_input == "table"
            rows = (config.K - 1) * config.vocab_size if tables else 1
            self.copy_input = nn.Embedding(rows, config.dim)
        if config.copy_embedding:
            self.copy_embed = nn.Embedding(config.K, config.dim)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        # Logits divided by m: hidden states are linear in the norm, and logits in hidden states.
        self.norm = RMSNorm(config.dim, config.norm_eps, 1 / config.width_ratio)
        if not config.tied:
            self.head = Linear(config.dim, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The LM head's weight (V, D).

        A tied head is not a second parameter, so moving or sharding the model cannot separate it
        from the embedding.
        """
        return self.embed.weight if self.config.tied else self.head.weight

    @property
    def unrolled(self) -> list[nn.Module]:
        """The blocks in the order in which a token goes through them, in all passes."""
        return [*self.blocks] * self.config.passes

    @torch.no_grad()
    def reset(self, seed: int) -> "Transformer":
        """Draw the weights (see `phd.initialization`) and rebuild the tables; returns itself."""
        for name, value in initial_weights(self, seed):
            self.get_parameter(name).copy_(value)
        self.rope.build(self.embed.weight.device)
        return self

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> "Transformer":
        """Take the parameters from `weights`, by name, and rebuild the tables; returns itself."""
        own = dict(self.named_parameters())
        assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
        for name, parameter in own.items():
            parameter.copy_(weights[name])
        self.rope.build(self.embed.weight.device)
        return self

    def set_copies(self, K: int) -> "Transformer":
        """Feed each token K times from here on; returns itself.

        No weight changes: all copies go through the same ones. `config` says the new K, so that
        whatever computes with the model (a cache, a count of FLOPs) follows. Vectors of
        `copy_embedding`, and tables of `copy_input`, that are for further copies wait.
        """
        self.config = replace(self.config, K=K)
        assert not self.config.copy_embedding or len(self.copy_embed.weight) >= K, K
        tables = (K - 1) * self.config.vocab_size
        assert self.config.hidden_input != "table" or len(self.copy_input.weight) >= tables, K
        self.patterns = patterns_of(self.config)
        self.rope.set_copies(K)
        return self

    def fuse_projections(self) -> "Transformer":
        """Multiply q, k, v and gate, up by one product each, which makes inference faster.

        The weights move into one tensor, and keep their names. A move to another device or dtype
        undoes it, as does loading by `assign`; `torch.compile` ignores it. Layers with hooks are
        called one by one. Returns itself.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            attention, ffn = block.attention, block.ffn
            fuse_weights((attention.q, attention.k, attention.v))
            fuse_weights((ffn.gate, ffn.up))
        return self

    def forward(
        self,
        tokens: Tensor,
        segments: Segments | None = None,
        part: RowPart | None = None,
    ) -> Tensor:
        """tokens, int (B, T) -> the last copy's normalised hidden states (B, T, D).

        With segments, each document gets the result that it would get in a row of its own. With a
        part, which knows the documents itself, the tokens are those of the part.

        Raises:
            ValueError: if T is longer than RoPE's table (`model.max_seq_len`).
        """
        T = tokens.shape[1]
        if self.config.max_seq_len < T:
            raise ValueError(
                f"model.max_seq_len={self.config.max_seq_len}: a row of {T} tokens is longer; "
                "raise model.max_seq_len or pass fewer tokens"
            )
        x = self.embedded(tokens)
        assert segments is None or part is None
        place = segments if part is None else part
        rope = self.rope.tables(T, None if place is None else place.position)
        first_pass: list[Tensor] = []
        c = self.config
        for i, (block, pattern) in enumerate(zip(self.unrolled, self.patterns, strict=True)):
            # The loss reads the last copy; the others give keys and values, also in the last layer.
            last = i == c.depth - 1
            keys = first_pass[i % c.layers] if i >= c.cached_layers else None
            if i < c.cached_layers < c.depth:
                first_pass.append(x)
            x = block(x, RowContext(pattern, c.attention, rope, last, segments, part, keys))
        return self.norm(x).squeeze(1)

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens, int (B, T) -> all copies' input (B, K or 1, T, D); equal copies are one."""
        x = self.embed(tokens).unsqueeze(1)
        # The residual stream is float32, also where the weights are gathered in half precision.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.hidden_input != "token":
            x = torch.cat([x, self._hidden_input(tokens, x)], 1)
        if not self.config.copy_embedding:
            return x
        return x + self.copy_embed.weight[: self.config.K, None]

    def _hidden_input(self, tokens: Tensor, originals: Tensor) -> Tensor:
        """What hidden copies are fed (B, K-1, T, D), where it is not what originals are.

        learned    one vector for all          table    row (s-1) * V + token for copy s

        Args:
            tokens: int (B, T).
            originals: their input (B, 1, T, D).
        """
        hidden = self.config.K - 1
        if self.config.hidden_input == "learned":
            # Converted first: so the gradients of all slots are summed in `dtype` and rounded once.
            vector = self.copy_input.weight.to(originals.dtype)
            return vector.expand(len(tokens), hidden, originals.shape[2], -1)
        first = torch.arange(hidden, device=tokens.device)[:, None] * self.config.vocab_size
        table: Tensor = self.copy_input(tokens[:, None] + first)
        return table.to(originals.dtype)

    def logits(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        """tokens, int (B, T) -> (B, T, V)."""
        return self.predict(self(tokens, segments))

    def predict(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
        return project(hidden, self.head_weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        segments: Segments | None = None,
        part: RowPart | None = None,
        *,
        per_target: bool = False,
    ) -> Loss:
        """Sums over the targets that are not `phd.loss.IGNORED`; see `next_token_loss`.

        The loss of each target, if asked for, costs a second product with the head, so that the
        sums are the same with it and without it.
        """
        hidden = self(tokens, segments, part)
        loss = next_token_loss(hidden, self.head_weight, targets, z_loss)
        if not per_target:
            return loss
        each = cross_entropy_per_target(hidden, self.head_weight, targets)
        return loss._replace(per_target=each)


class ModelWithLoss(nn.Module):
    """A model and its loss in one forward pass: what engines shard, wrap and compile."""

    def __init__(self, model: Transformer, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Segments | None = None,
        part: RowPart | None = None,
        *,
        per_target: bool = False,
    ) -> Loss:
        """tokens, targets (B, T) -> sums over the targets; see `phd.loss`."""
        return self.model.loss(tokens, targets, self.z_loss, segments, part, per_target=per_target)


def is_plain(model: Transformer) -> bool:
    """Whether there are no hooks, adapters, quantised weights or other parts put in place."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    same = [type(x) for x in model.modules()] == [type(x) for x in plain.modules()]
    return same and not any(map(has_hooks, model.modules()))


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by group, of a model that is never allocated (built on the meta device)."""
    return dict(_counted(config))


@lru_cache(maxsize=64)
def _counted(config: ModelConfig) -> tuple[tuple[str, int], ...]:
    with torch.device("meta"):
        model = Transformer(config)
    groups = {"embedding": 0, "attention": 0, "feed-forward": 0, "norms": 0, "head": 0}
    for name, parameter in model.named_parameters():
        groups[_group(name)] += parameter.numel()
    return tuple(groups.items())


@lru_cache(maxsize=64)
def number_of_parameters(config: ModelConfig) -> int:
    """All parameters, embedding and head included."""
    return sum(count_parameters(config).values())


def _group(name: str) -> str:
    if "norm" in name:
        return "norms"
    if ".attention." in name:
        return "attention"
    if ".ffn." in name:
        return "feed-forward"
    return "head" if name.startswith("head") else "embedding"
