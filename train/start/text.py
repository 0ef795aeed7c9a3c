"""The text of a run: its documents, its tokenizer and this rank's part of the token stream."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from conf.errors import DataError
from conf.validation import as_dict
from data.config import TokenizerConfig
from data.sources.documents import Documents
from data.stream import BY_DOCUMENTS, BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.checkpoint.format import TOKENIZER
from train.checkpoint.reader import Checkpoint
from train.config import Config
from train.console import warn
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.start.tokenizer_of_weights import tokenizer_of_weights


class RunText(NamedTuple):
    """What this rank reads the batches of a run from."""

    documents: Documents
    tokenizer: Tokenizer
    stream: TokenStream


def open_text(
    config: Config,
    checkpoint: Checkpoint | None,
    groups: ProcessGroups,
    console: Console,
    *,
    with_remarks: bool = True,
) -> RunText:
    """Open the text of a run, to go on where the checkpoint has left it. Every rank calls this.

    Args:
        checkpoint: that the run is resumed from; None: it is a new one.
        with_remarks: print what there is to say of the documents.

    Raises:
        ConfigError, DataError: on all ranks; the text or the tokenizer is missing or damaged, or is
            not what the checkpoint was made with.
    """
    documents = raise_on_all_ranks(groups, lambda: Documents(config.data))
    for remark in documents.remarks if with_remarks else ():
        console.print(remark, markup=False)
    tokenizer = _tokenizer(config, checkpoint, documents, groups, console)
    shape = BatchShape(
        global_batch=config.train.global_batch,
        seq_len=config.train.seq_len,
        rank=groups.rank // config.engine.ranks_per_row,
        world_size=config.engine.data_ranks(groups.world_size),
    )
    cursors = checkpoint.state["cursors"] if checkpoint else None
    stream = raise_on_all_ranks(
        groups,
        lambda: TokenStream(documents, tokenizer, shape, seed=config.seed, cursors=cursors),
    )
    if checkpoint:
        for line in stream.check_resumes(checkpoint.state["stream"]):
            warn(console, f"changed since then: {line}")
    _fill_lanes(stream, groups, console)
    return RunText(documents, tokenizer, stream)


def _tokenizer(
    config: Config,
    checkpoint: Checkpoint | None,
    documents: Documents,
    groups: ProcessGroups,
    console: Console,
) -> Tokenizer:
    """The run's tokenizer: made or read by rank 0, and sent to the other ranks."""

    def prepare() -> Tokenizer | None:
        if not groups.is_rank_zero:
            return None
        # The weights of a resumed run are its own.
        start_from = None if checkpoint else config.run.start_from
        return prepare_tokenizer(
            _tokenizer_settings(config, checkpoint, console),
            documents,
            vocab_size=config.model.vocab_size,
            of_weights=tokenizer_of_weights(start_from, console),
        )

    own = raise_on_all_ranks(groups, prepare)
    model = groups.broadcast(own.model if own else b"")
    return own or Tokenizer(model)


def _tokenizer_settings(
    config: Config, checkpoint: Checkpoint | None, console: Console
) -> TokenizerConfig:
    """The tokenizer's settings; a resumed run that has not changed them keeps its own model.

    If the cache has been emptied, the tokenizer would be trained again, and could come out
    differently. So the checkpoint has a copy, and the run's directory another one.
    """
    if checkpoint is None or checkpoint.state["config"]["tokenizer"] != as_dict(config.tokenizer):
        return config.tokenizer
    if checkpoint.tokenizer_path is not None:
        return TokenizerConfig(path=str(checkpoint.tokenizer_path))
    model = config.run_dir / TOKENIZER
    try:  # a checkpoint of an earlier version
        if Tokenizer.load(model).fingerprint == checkpoint.state["stream"]["tokenizer"]:
            return TokenizerConfig(path=str(model))
        flaw = "is not the one that the run began with"
    except FileNotFoundError:
        flaw = "is missing"
    except DataError:
        flaw = "is damaged"
    warn(console, f"{model} {flaw}; it is made again as the settings under tokenizer. say")
    return config.tokenizer


def _fill_lanes(stream: TokenStream, groups: ProcessGroups, console: Console) -> None:
    """Cut the sources by documents of which a lane of any rank would be empty otherwise."""
    empty = raise_on_all_ranks(groups, stream.empty_lanes)
    for name in sorted(set().union(*groups.gather(empty))):

        def cut(name: str = name) -> list[Any] | None:
            return stream.cut_by_documents(name) if groups.is_rank_zero else None

        starts = groups.broadcast(raise_on_all_ranks(groups, cut))
        assert starts is not None
        stream.documents.set_lane_starts(name, starts)
        console.print(f"data.sources.{name}: {BY_DOCUMENTS}", markup=False)


def share_quarantine(
    documents: Documents, directory: Path, groups: ProcessGroups, ranks_per_row: int = 1
) -> None:
    """Have all ranks append to one file; rank 0 first, which mends what a crash has left of it.

    Of `ranks_per_row` neighbours, which read the same records, the first one alone does.
    """
    is_reader = groups.rank % ranks_per_row == 0
    for rank_zero in (True, False):
        if is_reader and groups.is_rank_zero == rank_zero:
            documents.quarantine.write_to(directory / "quarantine.jsonl")
        groups.barrier()
