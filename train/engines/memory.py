"""A prediction of the memory that a training step needs, without allocating it.

The peak is the highest point of a step's timeline, and not the sum of all that is ever allocated:

    bytes
      |                         loss
      |                        _    _
      |                   ____| |__| |_            activations of the blocks, saved one by one
      |              ____|             |____       and freed one by one
      |         ____|                       |____________
      |    ____|                                         |___   their gradients take the place
      |___|_________________________________________________|____
      |   weights, moments, gradients of earlier micro-batches, which are always there
      +----------------------------------------------------------->
          block 0 .. L-1         loss      block L-1 .. 0   AdamW

Where activations are few, as with full checkpointing, gradients are the most, and the peak is at
the end of the backward pass or in the optimizer's step. AdamW's works in place; Muon's has copies
of what it orthogonalises.

`fit` chooses the micro-batch and the activation checkpointing by this prediction, which is a
function of the configuration, and by the memory that the device has in total: what is free at the
moment changes nothing. So all ranks choose the same, and so does a run that is resumed on such
devices.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from conf.errors import ConfigError, Problem
from conf.wording import byte_size
from phd.model import count_parameters
from phd.pattern import patterns_of
from train.config import Config
from train.engines.context_parallel import heads_sent, row_bytes
from train.engines.footprint import Footprint, Pass, Recompute, block_footprints, head_footprint
from train.engines.newton_schulz import muon_step_bytes
from train.engines.state_rules import matrix_shapes, moment_bytes
from train.settings.engine import DeepSpeedConfig, FsdpConfig

# cuBLAS and cuBLASLt share a workspace of 32 MiB on Hopper, which PyTorch's allocator gives them.
CUBLAS = 32 << 20


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step.

    Attributes:
        weights: float32 shards, and copies of them in the dtype of the products.
        gradients: those that there are at the peak.
        moments: of the optimizer.
        activations: what the forward pass has saved and the backward pass still needs.
        working: what is being computed: the inside of a block, the loss, the scratch of kernels.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return sum(self)


class _Placed(NamedTuple):
    """What a rank holds of the model, and how: bytes.

    Attributes:
        weights: what stays of them.
        moments: of the optimizer.
        step: what its step takes besides.
        before: gradients that are there before a backward pass begins.
        gathered: the most that is gathered of sharded weights at one time.
        reduced: the most that a block's gradients take while they are summed over ranks.
        shards: into how many the new gradients are cut.
    """

    weights: int
    moments: int
    step: int
    before: int
    gathered: int
    reduced: int
    shards: int


def predict_memory(
    config: Config, dtype: torch.dtype, world_size: int = 1, device: str = "cpu"
) -> Memory:
    """Predict the peak memory of training on each of `world_size` devices.

    Weights, gradients and the optimizer's moments are float32. On CUDA it is what
    `torch.cuda.max_memory_allocated` shows: the CUDA context and what the allocator cannot use come
    on top.

    Args:
        config: of the run, whose micro-batch and activation checkpointing are no longer `auto`.
        dtype: of the matrix products.
        world_size: ranks, one device each.
        device: `cpu` or `cuda`.
    """
    given = pass_of(config, dtype, world_size, device)
    placed = _placed(config, given, world_size)
    blocks, vocabulary = rank_footprints(given, config), given
    if (tensor := _tensor_ranks(config)) > 1:
        vocabulary = _vocabulary_part(given, tensor)
    head = head_footprint(vocabulary, config.optim.z_loss)
    if config.model.tied:
        # It waits for the embedding's, also where earlier micro-batches have left a gradient.
        head = head._replace(gradients=_head_bytes(vocabulary))
    peak = _peak(placed, [_embedding(vocabulary), *blocks, head])
    return peak._replace(working=peak.working + (CUBLAS if device == "cuda" else 0))


def pass_of(config: Config, dtype: torch.dtype, world_size: int, device: str) -> Pass:
    """The forward and backward pass of the step's last micro-batch."""
    engine = config.engine
    recompute = engine.activation_checkpointing
    assert recompute != "auto", "`fit` chooses it first"
    sharded = isinstance(engine, FsdpConfig) and engine.shard and world_size > 1
    replicated = isinstance(engine, FsdpConfig) and not engine.shard and world_size > 1
    return Pass(
        model=config.most_copies,
        rows=config.micro_batch_on(world_size),
        # Of a row's activations each of its ranks has an equal part, which tensor ranks gather.
        tokens=config.train.seq_len // engine.ranks_per_row,
        dtype=dtype,
        weights=dtype if sharded else torch.float32,
        # As in `train.engines.fsdp`: FSDP2 gathers rounded shards, and DeepSpeed has none.
        rounded=isinstance(engine, FsdpConfig) and not sharded and dtype != torch.float32,
        device=device,
        compiled=engine.compiles_on(device),
        recompute=recompute,
        # DDP's buckets hold all gradients from the beginning.
        accumulates=replicated or config.accumulation(world_size) > 1,
    )


def rank_footprints(given: Pass, config: Config) -> list[Footprint]:
    """The footprints of the blocks on a rank of the mesh, which has a part of each."""
    blocks = block_footprints(given, config.engine.checkpoint_every_block)
    blocks, tensor = _with_rows_of_keys(blocks, given, config), _tensor_ranks(config)
    if tensor == 1:
        return blocks
    every, layers = config.engine.checkpoint_every_block, config.model.layers
    plain = replace(given, recompute="none")
    return [
        _tensor_part(block, plain if layer % layers % every else given, tensor)
        for layer, block in enumerate(blocks)
    ]


def _tensor_ranks(config: Config) -> int:
    return config.engine.tensor if isinstance(config.engine, FsdpConfig) else 1


def _placed(config: Config, given: Pass, world_size: int) -> _Placed:
    """Where weights, gradients and moments are on each of `world_size` ranks."""
    counts = count_parameters(config.model)
    parameters = sum(counts.values())
    weights, gradients, moments = shard_counts(config, world_size)
    before = 4 * parameters // gradients
    gathered = reduced = 0
    if weights > 1:
        outside = counts["embedding"] + counts["head"]
        block = (parameters - outside) // config.model.layers
        together = 2 if _frees_gathered(config) else config.model.layers
        gathered = given.weights.itemsize * (outside + together * block)
        if isinstance(config.engine, FsdpConfig):
            # Until the last micro-batch every rank has whole gradients.
            reduce = 4 if config.engine.reduce == "fp32" else 2
            tensor = config.engine.tensor  # only parts of matrices are gathered
            before, reduced = reduce * parameters // tensor, reduce * block // tensor
            gathered //= tensor
    matrices = counts["attention"] + counts["feed-forward"] if given.rounded else 0
    return _Placed(
        weights=4 * parameters // weights + given.dtype.itemsize * matrices,
        moments=moment_bytes(config.model, config.optim) // moments,
        step=_step_bytes(config, given, world_size, moments),
        before=before if given.accumulates else 0,
        gathered=gathered,
        reduced=reduced,
        shards=gradients,
    )


def _step_bytes(config: Config, given: Pass, ranks: int, shards: int) -> int:
    """What the optimizer's step takes of memory; AdamW's is one kernel, and takes nothing."""
    shapes = matrix_shapes(config.model, config.optim)
    if not shapes:
        return 0
    flat = isinstance(config.engine, DeepSpeedConfig) and config.engine.stage > 0
    sizes = list(shapes.values())
    return muon_step_bytes(sizes, given.dtype, ranks=ranks, shards=shards, flat=flat)


def _frees_gathered(config: Config) -> bool:
    """Whether a block's gathered weights are freed before its backward pass."""
    return not (
        isinstance(config.engine, FsdpConfig) and config.engine.reshard_after_forward == "never"
    )


def shard_counts(config: Config, world_size: int) -> tuple[int, int, int]:
    """The numbers of shards that weights, gradients and moments are divided into."""
    match config.engine:
        case FsdpConfig(shard=shard, replicate=replicate):
            shards = max(1, world_size // replicate) if shard else 1
            return shards, shards, shards
        case DeepSpeedConfig(stage=stage):
            # ZeRO-1 shards moments, ZeRO-2 gradients as well, ZeRO-3 weights as well.
            weights, gradients, moments = (
                world_size if stage >= first else 1 for first in (3, 2, 1)
            )
            return weights, gradients, moments


def _with_rows_of_keys(blocks: list[Footprint], given: Pass, config: Config) -> list[Footprint]:
    """The blocks with the keys and values of whole rows, which each gathers for itself."""
    context = config.engine.context_ranks
    if context == 1:
        return blocks
    model, size = given.model, given.dtype.itemsize
    tokens = given.rows * given.tokens * context
    found = []
    for block, pattern in zip(blocks, patterns_of(model), strict=True):
        copies = pattern.cached_slots_per_token
        numbers = 2 * tokens * copies * model.kv_heads * model.head_dim
        forward, backward = row_bytes(numbers, size, heads_sent(pattern, model.kv_heads))
        found.append(
            block._replace(forward=block.forward + forward, backward=block.backward + backward)
        )
    return found


def _tensor_part(block: Footprint, given: Pass, tensor: int) -> Footprint:
    """The footprint of a tensor rank's part of a block, whose activations are its tokens'.

    Besides, there are the gathered inputs of the columnwise products, which are saved unless they
    are computed again; and in place of whole gradients of matrices there is its part of them.
    """
    model, others = given.model, tensor - 1
    inputs = 2 * model.K * given.rows * given.tokens * model.dim * given.dtype.itemsize * others
    sides = 2 * (model.heads + model.kv_heads) * model.head_dim + 3 * model.ffn_dim
    absent = given.weights.itemsize * model.dim * sides * others // tensor
    return Footprint(
        block.forward + inputs,
        block.saved + (inputs if given.recompute == "none" else 0),
        block.casts,
        block.backward + inputs - absent,
        max(0, block.gradients - absent),
    )


def _vocabulary_part(given: Pass, tensor: int) -> Pass:
    """The pass through embedding and head on a tensor rank, which has a part of the vocabulary."""
    model = replace(given.model, vocab_size=given.model.vocab_size // tensor)
    return replace(given, model=model, tokens=given.tokens * tensor)


def _embedding(given: Pass) -> Footprint:
    """The footprint of the embedding. A tied one adds its gradient to that of the head."""
    model = given.model
    tokens = given.rows * given.tokens
    # The originals; tables' rows for hidden copies; all copies joined; with their vectors.
    tables = model.K - 1 if model.hidden_input == "table" else 0
    kept = 1 + tables + model.K * ((model.hidden_input != "token") + model.copy_embedding)
    out = 4 * tokens * model.dim * kept
    embedding, of_tables = _head_bytes(given), tables * _head_bytes(given)
    new = 0 if given.accumulates else of_tables + (0 if model.tied else embedding)
    return Footprint(out, 8 * tokens * (1 + tables), 0, out + embedding + of_tables, new)


def _head_bytes(given: Pass) -> int:
    return given.weights.itemsize * given.model.vocab_size * given.model.dim


def _peak(placed: _Placed, parts: Sequence[Footprint]) -> Memory:
    """The moment with the most bytes in the pass through the parts and back."""
    moments, saved, new = [], 0, 0

    def note(activations: int, working: int) -> None:
        gradients = placed.before + new // placed.shards
        moments.append(Memory(placed.weights, gradients, placed.moments, activations, working))

    casts = 0
    for part in parts:
        note(saved + casts, placed.gathered + part.forward)
        saved, casts = saved + part.saved, casts + part.casts
    for part in reversed(parts):
        note(saved, placed.gathered + placed.reduced + part.backward - part.saved)
        saved, new = saved - part.saved, new + part.gradients
    note(0, placed.step)  # the optimizer's
    return max(moments, key=lambda memory: memory.total)


# What fits

LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")
"""What may be computed again, from the least to the most."""

FITS = {"cuda": 0.9, "cpu": 0.5}
"""The part of a device's memory that the predicted peak may take.

On CUDA the rest is for the error of the prediction, for the context of about 0.5 GiB, and for what
the allocator cannot use; on the CPU for all other processes, such as those that read the data.
"""


class Fit(NamedTuple):
    """A configuration without `auto`.

    Attributes:
        config: with a micro-batch and an activation checkpointing.
        chosen: the settings that were `auto`, with what they are now.
    """

    config: Config
    chosen: dict[str, int | str]


class _Fitter(NamedTuple):
    """What the memory is predicted for."""

    config: Config
    dtype: torch.dtype
    world_size: int
    device: str

    def with_choice(self, recompute: Recompute, rows: int) -> Config:
        """The configuration with these two settings."""
        train, engine = self.config.train, self.config.engine
        return replace(
            self.config,
            train=replace(train, micro_batch=rows),
            engine=replace(engine, activation_checkpointing=recompute),
        )

    def saved(self, recompute: Recompute, rows: int) -> int:
        """What the blocks save."""
        config = self.with_choice(recompute, rows)
        given = pass_of(config, self.dtype, self.world_size, self.device)
        blocks = block_footprints(given, config.engine.checkpoint_every_block)
        return sum(block.saved for block in blocks)

    def memory(self, recompute: Recompute, rows: int) -> Memory:
        """The memory that these two settings take."""
        config = self.with_choice(recompute, rows)
        return predict_memory(config, self.dtype, self.world_size, self.device)


def fit(
    config: Config,
    dtype: torch.dtype,
    *,
    world_size: int = 1,
    device: str = "cpu",
    available: int | None = None,
) -> Fit:
    """Choose the settings that are `auto`: first the least recomputation, then the most rows.

    Recomputation costs time always. A smaller micro-batch costs almost none, as long as a row has
    some thousand slots.

    Args:
        config: of the run, whose batch can be divided among the ranks.
        dtype: of the matrix products.
        world_size: ranks, one device each.
        device: `cpu` or `cuda`.
        available: bytes of the smallest of the devices; None: not known, and all of it fits.

    Raises:
        ConfigError: not even one row fits.
    """
    fitter = _Fitter(config, dtype, world_size, device)
    given = config.engine.activation_checkpointing
    levels: Sequence[Recompute] = LEVELS
    if given != "auto":
        levels = (given,)
    elif device == "cpu" or available is None:
        levels = ("none",)
    recompute, rows = _choice(fitter, levels, available)
    settled = fitter.with_choice(recompute, rows)
    chosen: dict[str, int | str] = {}
    if config.train.micro_batch == "auto":
        chosen["train.micro_batch"] = settled.micro_batch_on(world_size)
    if given == "auto":
        chosen["engine.activation_checkpointing"] = recompute
    return Fit(settled, chosen)


def _choice(
    fitter: _Fitter, levels: Sequence[Recompute], available: int | None
) -> tuple[Recompute, int]:
    """The recomputation and the rows of a micro-batch."""
    train = fitter.config.train
    most = fitter.config.micro_batch_on(fitter.world_size)
    rows = divisors(most) if train.micro_batch == "auto" else [most]
    if available is None or (train.micro_batch != "auto" and len(levels) == 1):
        return levels[0], rows[-1]
    limit = int(available * FITS[fitter.device])
    for recompute in levels:
        if (found := _most_rows(fitter, recompute, rows, limit)) is not None:
            return recompute, found
    if train.micro_batch != "auto":
        # The user has chosen the rows, and the prediction may err; the plan warns.
        return min(levels, key=lambda level: fitter.memory(level, most).total), most
    raise ConfigError([_too_large(fitter, levels[-1], available)])


def _most_rows(
    fitter: _Fitter, recompute: Recompute, rows: Sequence[int], limit: int
) -> int | None:
    """The last of `rows`, in their order, whose memory is within the limit."""
    # Each prediction takes seconds. What the blocks save grows with the rows in proportion, and
    # with the weights and moments it is always less than the peak.
    first, second = rows[0], rows[min(1, len(rows) - 1)]
    saved = fitter.saved(recompute, first)
    slope = (fitter.saved(recompute, second) - saved) / max(1, second - first)
    least = fitter.memory(recompute, first)
    room = limit - least.weights - least.moments
    possible = [n for n in rows if saved + slope * (n - first) <= room]
    return next((n for n in reversed(possible) if fitter.memory(recompute, n).total <= limit), None)


def _too_large(fitter: _Fitter, recompute: Recompute, available: int) -> Problem:
    """Why no micro-batch fits."""
    train = fitter.config.train
    needed = fitter.memory(recompute, 1).total
    share = FITS[fitter.device]
    reason = (
        f"one row of train.seq_len={train.seq_len} tokens needs about {byte_size(needed)} with "
        f"engine.activation_checkpointing={recompute}, and the device has {byte_size(available)}, "
        f"of which a step may take {share:.0%}"
    )
    hint = "choose a smaller size, a shorter train.seq_len, or more ranks that share the weights"
    return Problem("train.micro_batch", "auto", reason, hint, others=("train.seq_len", "model"))


def divisors(number: int) -> list[int]:
    """In their order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]
