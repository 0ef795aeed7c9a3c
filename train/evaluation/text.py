"""The loss of a model on a text, with its standard error over documents."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from conf.errors import DataError
from data.batch import Batch
from data.config import DataConfig, FilesSource
from data.heldout import heldout_rows, text_rows
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from phd.segments import Segments
from phd.transfer import to_device
from train.experiments.result import Estimate, Heldout
from train.metrics.documents import (
    bits_per_byte_of_documents,
    bytes_of_documents,
    fingerprint_of,
)

PerTarget = Callable[[Tensor, Tensor, Segments | None], Tensor]
"""Tokens and targets (B, T) -> the cross-entropy of each target (B, T) in nats, 0 where it does not
count."""

TOKENS = 8192
"""Tokens that are computed at a time."""


def rows_of_run(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, limit: int
) -> dict[str, Batch]:
    """The held-out rows of each source of a run, those that it is evaluated on itself.

    Raises:
        ConfigError, DataError, TransientError: a source is not there any more, or damaged.
    """
    documents = Documents(data)
    found = {}
    for source, name in data.heldout_names.items():
        rows = heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
        if rows is not None:
            found[name] = rows
    if not found:
        raise DataError("the run holds out no documents. Give a text= to evaluate.")
    return found


def rows_of_text(
    source: FilesSource,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    limit: int | None,
    isolate: bool,
) -> Batch:
    """The rows of files of the user's, read and packed as for training.

    Args:
        limit: how many rows are taken, the first ones; None: all.
        isolate: whether a document sees nothing of those before it in its row.

    Raises:
        ConfigError, DataError, TransientError: the files are not there, or hold no text.
    """
    documents = Documents(
        DataConfig(sources={"text": source}, documents="isolate" if isolate else "concatenate")
    )
    rows = text_rows(documents, tokenizer, "text", seq_len=seq_len, limit=limit)
    if rows is None:
        raise DataError(f"text={', '.join(source.patterns)}: there is no document in it.")
    return rows


@torch.no_grad()
def measure_text(
    per_target: PerTarget, text: Batch, tokenizer: Tokenizer, device: torch.device
) -> Heldout:
    """The loss of a model on rows of text.

    Args:
        per_target: the model, which runs under the autocast of the caller.
        text: rows whose documents are numbered.
    """
    sizes = bytes_of_documents(text, tokenizer)
    nats, targets = np.zeros(len(sizes)), 0
    for rows in text.split(max(1, TOKENS // text.inputs.shape[1])):
        segments = None
        if rows.document_starts is not None:
            segments = Segments.of(torch.from_numpy(rows.document_starts)).to(device)
        inputs, wanted = (
            to_device(torch.from_numpy(np.ascontiguousarray(x)), device)
            for x in (rows.inputs, rows.targets)
        )
        each = per_target(inputs, wanted, segments).double().cpu().numpy()
        assert rows.documents is not None
        nats += np.bincount(rows.documents.ravel(), each.ravel(), minlength=len(nats))
        targets += int((wanted >= 0).sum())
    bits, error = bits_per_byte_of_documents(nats, sizes)
    return Heldout(
        bits_per_byte=Estimate(value=bits, standard_error=error),
        loss=float(nats.sum()) / targets,
        tokens=targets,
        bytes=int(sizes.sum()),
        documents=len(sizes),
        fingerprint=fingerprint_of(text),
    )
