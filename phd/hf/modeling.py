"""PHD in transformers: `import phd.hf.modeling`, then `AutoModelForCausalLM.from_pretrained(...)`.

    input_ids         attention_mask      left-aligned      output
    . . a b c         0 0 1 1 1           a b c . .         A A A B C
    d e f g h         1 1 1 1 1           d e f g h         D E F G H

Rows may be padded on either side, or in between. Our model and its cache want left-aligned rows, so
the tokens are moved to the left first. The output for a token (A for a) goes back to the token's
column. A column of padding gets the output of the last token before it, or of the first token.

Where `generate` adds one token to every row, the work of a token is one CUDA graph: see `PhdCache`.

transformers is used through its public interface, and through what subclasses of `PreTrainedModel`
are expected to override (`_is_stateful`, `_supports_default_dynamic_cache`, `initialize_weights`,
`_prepare_cache_for_generation`, `_update_model_kwargs_for_generation`) or to read
(`_is_hf_initialized`). tests/phd/hf/test_modeling.py checks what follows from each.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from phd.config import ModelConfig
from phd.device import as_current
from phd.inference.cache import KVCache
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import extend, new_cache
from phd.initialization import initial_weights
from phd.model import Transformer, is_plain

# The arguments of `forward` that have a meaning besides tokens and cache; `cache_position` follows
# from the cache, and is ignored.
SUPPORTED = {"labels", "attention_mask", "num_items_in_batch", "cache_position"}


class PhdConfig(PreTrainedConfig):
    """The fields of `phd.config.ModelConfig`, also under transformers' names for them.

    With the norm `hybrid` or `hybrid_star`, `qkv_norm` is `head`: queries, keys and values are
    normalised per head. Files that do not say so are of the time when whole projections were.

    Raises:
        ValueError: the values cannot make a model.
    """

    model_type = "phd"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # theirs is no ClassVar
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied",
    }

    def __init__(self, **settings: Any) -> None:
        settings = {self.attribute_map.get(name, name): x for name, x in settings.items()}
        own = {f.name: settings.pop(f.name) for f in fields(ModelConfig) if f.name in settings}
        super().__init__(**settings)
        for name, value in asdict(ModelConfig(**own)).items():
            setattr(self, name, value)
        if self.norm.startswith("hybrid"):
            self.qkv_norm = "head"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a file describes.

        Raises:
            ValueError: the file is of a model whose norms computed something else.
        """
        norm, heads = config_dict.get("norm", ""), config_dict.get("heads", 0)
        if norm.startswith("hybrid") and heads > 1 and config_dict.get("qkv_norm") != "head":
            raise ValueError(
                f"this is a model of the old form of norm={norm!r}, which normalised whole "
                "projections of queries, keys and values; HybridNorm normalises each head. Load it "
                "with the code in its directory (trust_remote_code=True, where phd is not "
                "imported), or train it again"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The same values as our own config."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


class PhdCache(Cache):
    """A `phd.inference.cache.KVCache` with the interface that `generate` uses.

    Attributes:
        kv: the keys and values of each row's tokens, without padding.
        columns: columns of `input_ids` seen so far, with padding.
        captured: a call with one token of each row goes through `phd.inference.cuda_graph.Decoder`,
            which captures the work once and then replays it. None: on CUDA. Elsewhere there is no
            graph, and the step reads all that the cache has room for.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self, kv: KVCache, *, captured: bool | None = None) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self.columns = 0
        self.captured = kv.lengths.is_cuda if captured is None else captured
        # Since the last call. A graph reads the memory that rows had when it was captured, and in
        # a beam search they get another at each token.
        self.rows_moved = False
        self._decoder: _DecoderOf | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the graph, which cannot be copied."""
        return {**vars(self), "_decoder": None}

    def __len__(self) -> int:
        return self.kv.config.layers

    @property
    def batch_size(self) -> int:
        return len(self.kv.host_lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns seen so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """The most tokens that a row may have."""
        return self.kv.config.max_seq_len

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.kv.select(indices)
        self.rows_moved, self._decoder = True, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these beams, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, each copy after the last."""
        rows = torch.arange(self.batch_size, device=self.kv.lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:  # noqa: ARG002
        """Refuse: hidden copies that the ring has overwritten cannot be restored."""
        raise ValueError(
            "a PHD cache cannot forget its last tokens; use neither assisted generation nor crop, "
            "or copy.deepcopy the cache before"
        )

    def reset(self) -> None:
        """Make all rows empty."""
        self.columns = 0
        self.kv.host_lengths = [0] * self.batch_size
        self.kv.lengths.zero_()

    def decoder(self, model: "PhdForCausalLM") -> Decoder | None:
        """What decodes one token of each row of this cache; None: the ordinary path is to be taken.

        It is: where nothing is captured, where rows have just moved, and where a part of the model
        is not ours, or has hooks that are to run.
        """
        if not self.captured or self.rows_moved:
            return None
        known = self._decoder
        if known is None or known.model is not model or known.moves != model.moves:
            if not is_plain(model.model):
                return None
            # While it trains, an optimizer may hold views of the weights where they are.
            if not model.training:
                model.model.fuse_projections()
            known = _DecoderOf(model, model.moves, Decoder(model.model, self.kv))
            self._decoder = known
        return known.decoder


class _DecoderOf(NamedTuple):
    """A decoder, and of which model it is, after how many `moves` of its weights."""

    model: "PhdForCausalLM"
    moves: int
    decoder: Decoder


class PhdForCausalLM(PreTrainedModel, GenerationMixin):
    """A `phd.model.Transformer` with the interface of transformers' causal language models.

    Attributes:
        moves: how often weights or tables may have moved in memory.
    """

    config_class = PhdConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # the cache cannot be cut back
    moves = 0

    def __init__(self, config: PhdConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.model_config)
        self.post_init()

    @classmethod
    def of(cls, model: Transformer) -> "PhdForCausalLM":
        """The same model, which is not copied."""
        with torch.device("meta"):
            whole = cls(PhdConfig(**asdict(model.config)))
        whole.model = model
        return whole

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that the checkpoint lacks, and build RoPE's tables, which none has.

        Weights are drawn as in `phd.initialization`, with a seed from torch's global generator.
        """
        new = {
            name: weight
            for name, weight in self.model.named_parameters()
            if not getattr(weight, "_is_hf_initialized", False)
        }
        if new:
            seed = int(torch.randint(2**62, (), device="cpu"))
            for name, value in initial_weights(self.model, seed):
                if name in new:
                    new[name].copy_(value)
        self.model.rope.build(self.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "PhdForCausalLM":
        """Move or convert the weights, and rebuild RoPE's tables, which stay float32."""
        super()._apply(fn, recurse)
        self.model.rope.build(self.device)
        self.moves += 1
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        vocab_size = len(value.weight)
        if self.model.config.hidden_input == "table" and vocab_size != self.config.vocab_size:
            raise ValueError(
                f"an embedding of {vocab_size} rows: the tables of hidden copies have "
                f"{self.config.vocab_size} each; a model with copy_input=table cannot be given "
                "another vocabulary"
            )
        self.model.embed = value
        self.moves += 1
        self.model.config = replace(self.model.config, vocab_size=len(value.weight))

    def get_output_embeddings(self) -> nn.Module | None:
        """The LM head; None where it is the embedding, because then there is no weight to tie."""
        return None if self.config.tied else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings
        self.moves += 1

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes a `PhdCache`, which `generate` passes to the next call."""
        return False

    def new_cache(self, batch: int, tokens: int, *, captured: bool | None = None) -> PhdCache:
        """An empty cache with room for rows of `tokens` tokens; see `PhdCache` for `captured`.

        One that `generate` has filled serves again after `cache.reset()`, without a new capture.
        """
        room = min(tokens, self.config.max_seq_len)
        return PhdCache(new_cache(self.model, batch, room), captured=captured)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make a cache that need not grow before the text is done."""
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            # transformers has repeated the rows already, but not in `batch_size`.
            rows = max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = self.new_cache(batch_size * rows, max_cache_length)
            model_kwargs["past_key_values"] = cache

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuse: pages of tokens have no place for hidden copies."""
        raise ValueError(
            "continuous batching of transformers: its pages have no place for hidden copies; use "
            "generate, or phd.inference.generator.Generator"
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *others: Any, **more: Any
    ) -> dict[str, Any]:
        """Tell `forward` that the next columns are tokens: `generate` has made them itself."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *others, **more
        )
        # Without a cache, the prompt and its padding are passed again.
        return model_kwargs | {"no_padding": bool(model_kwargs.get("use_cache"))}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: PhdCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        no_padding: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """The logits of each column, and the loss.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, columns so far + T), 0 where there is padding; None: there is none.
            past_key_values: what an earlier call with `use_cache` returned.
            labels: int64 (B, T), the tokens themselves, -100 where they do not count; column t is
                predicted from the columns before it.
            use_cache: return a cache for later calls. There are no gradients then.
            logits_to_keep: for how many columns from the end there are logits, 0 for all, or for
                which columns.
            no_padding: all columns of `input_ids` are tokens, and the mask is not read, for which
                the host would wait.

        Raises:
            ValueError: the model does not support an argument, the cache is not a `PhdCache`, or a
                row is longer than `max_seq_len`.
        """
        cached = bool(use_cache) or past_key_values is not None
        given = {"labels": labels, "attention_mask": attention_mask, **others}
        if problems := list(_problems(input_ids, past_key_values, cached, given)):
            raise ValueError("; ".join(problems))
        assert input_ids is not None
        text = _Text.of(input_ids, None if no_padding else attention_mask)
        with as_current(self.device), self._precision():
            if cached:
                if past_key_values is None:
                    past_key_values = self.new_cache(*input_ids.shape)
                logits = self._cached_logits(text, logits_to_keep, past_key_values)
            else:
                hidden = self.model(text.tokens)
                logits = self.model.predict(_gather_tokens(hidden, text.tokens_of(logits_to_keep)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _cached_logits(
        self, text: "_Text", logits_to_keep: int | Tensor, cache: PhdCache
    ) -> Tensor:
        """Add all tokens to the cache; the logits (B, columns, V) of the columns to keep."""
        is_step = text.tokens.shape[1] == 1 and all(text.lengths)
        decoder = None
        if is_step and isinstance(logits_to_keep, int):
            decoder = cache.decoder(self)
        if decoder is None:
            logits = self._extend(text, text.tokens_of(logits_to_keep), cache)
        else:
            logits = decoder(text.tokens[:, 0]).clone()[:, None]  # the next token overwrites it
        cache.columns += text.tokens.shape[1]
        cache.rows_moved = False
        return logits

    def _extend(self, text: "_Text", index: Tensor, cache: PhdCache) -> Tensor:
        """Add all tokens to the cache; the logits (B, columns, V) of those at `index`."""
        counts = torch.tensor(text.lengths, device="cpu")[:, None]
        keep = int((counts - index).max())
        logits = extend(self.model, text.tokens, cache.kv, text.lengths, keep=keep)
        if keep == 0:  # nothing but padding
            return logits.new_zeros(*index.shape, logits.shape[2])
        return _gather_tokens(logits, (index - counts + keep).clamp(0, keep - 1))

    def _precision(self) -> AbstractContextManager:
        """Autocast for weights in half precision, as the residual stream is in float32."""
        if self.dtype.itemsize >= torch.float32.itemsize:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


class _Text(NamedTuple):
    """Left-aligned rows.

    tokens (B, T), with padding after them; lengths, the tokens of each row; token_index (B, T) on
    the host, which of its row's tokens belongs to each column.
    """

    tokens: Tensor
    lengths: list[int]
    token_index: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor | None) -> "_Text":
        B, T = input_ids.shape
        if mask is None or bool(mask[:, -T:].all()):
            return cls(input_ids, [T] * B, torch.arange(T, device="cpu").expand(B, T))
        is_token = mask[:, -T:].cpu() != 0
        order = is_token.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        index = (is_token.cumsum(1) - 1).clamp(min=0)
        tokens = input_ids.gather(1, order.to(input_ids.device))
        return cls(tokens, is_token.sum(1).tolist(), index)

    def tokens_of(self, logits_to_keep: int | Tensor) -> Tensor:
        """Which of its row's tokens belongs to each column to keep, (B, columns) on the host."""
        if isinstance(logits_to_keep, int):
            return self.token_index[:, -logits_to_keep:]
        return self.token_index[:, logits_to_keep.cpu()]


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x (B, T, ...) at `index` (B, n), which is on the host."""
    if torch.equal(index, torch.arange(x.shape[1], device="cpu").expand(len(x), -1)):
        return x
    return x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[2]))


def _problems(
    input_ids: Tensor | None, cache: Any, cached: bool, given: dict[str, Any]
) -> Iterator[str]:
    """Why a call of `forward` is refused, one sentence for each reason."""
    if input_ids is None:
        yield "input_ids=None: a PHD model reads tokens; pass input_ids (B, T)"
    elif not input_ids.numel():
        yield f"input_ids of shape {tuple(input_ids.shape)}: holds no tokens; pass one at least"
    if cache is not None and not isinstance(cache, PhdCache):
        yield (
            f"past_key_values is a {type(cache).__name__}: expected a PhdCache; pass what an "
            "earlier call with use_cache=True returned"
        )
    if given["labels"] is not None and cached:
        yield (
            "labels with use_cache or past_key_values: a cache has no gradients; "
            "leave out one of them"
        )
    mask = given["attention_mask"]
    if mask is not None and mask.dim() != 2:
        yield (
            f"attention_mask of shape {tuple(mask.shape)}: PHD's pattern decides which slot sees "
            "which; pass (B, columns), 0 where there is padding"
        )
    yield from (
        f"{name}: a PHD model does not support it; leave it out"
        for name, value in given.items()
        if name not in SUPPORTED and value is not None and value is not False
    )


# A checkpoint with a copy of this file names its classes in `auto_map`, and needs no registration.
if __name__ == "phd.hf.modeling":
    AutoConfig.register(PhdConfig.model_type, PhdConfig)
    AutoModelForCausalLM.register(PhdConfig, PhdForCausalLM)
