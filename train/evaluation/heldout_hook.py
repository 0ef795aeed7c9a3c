"""The loss on held-out documents in the training loop."""

from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console

from conf.errors import ConfigError, Problem
from data.batch import Batch
from data.heldout import heldout_rows
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from train.config import Config
from train.console import warn
from train.distributed.process_groups import raise_on_all_ranks
from train.engines.engine import Engine
from train.metrics.documents import (
    bits_per_byte,
    bits_per_byte_of_documents,
    bytes_of_documents,
    fingerprint_of,
)
from train.metrics.record import Metrics, StepRecord


class HeldoutEvaluation:
    """The loss on the held-out documents of a source; `{}` if `stop` ends it early.

    After the last step it also tells the standard error over documents, of how much text all of
    this is the mean, and a fingerprint of that text.

    Args:
        document_bytes: of each of `text.documents`; None where nobody needs a standard error.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        name: str,
        text: Batch,
        stop: Callable[[], bool],
        document_bytes: np.ndarray | None = None,
    ) -> None:
        self.every = config.eval.every
        self.engine = engine
        self.name = name
        self.text = text
        assert text.stats is not None
        self.target_bytes = text.stats.target_bytes
        self.stop = stop
        self.document_bytes = document_bytes
        self.fingerprint = fingerprint_of(text)

    def __call__(self, record: StepRecord) -> Metrics:
        if record.ending is None:
            return self.measure(by_document=False)
        return {} if record.ending.by_signal else self.measure()

    def measure(self, *, by_document: bool = True) -> Metrics:
        """Cross-entropy per token in nats, and bits per byte.

        Args:
            by_document: also the standard error; costs a second product with the head.
        """
        sizes, document_nats = self.document_bytes, None
        if by_document and sizes is not None:
            device = self.engine.device
            document_nats = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        found = self.engine.evaluate(self.text, self.stop, document_nats)
        if found is None:
            return {}
        nats, targets = (x.item() for x in found)
        metrics: Metrics = {
            f"eval/{self.name}/loss": nats / targets,
            f"eval/{self.name}/bits_per_byte": bits_per_byte(nats, self.target_bytes),
        }
        if document_nats is None:
            return metrics
        assert sizes is not None
        _, error = bits_per_byte_of_documents(document_nats.cpu().numpy(), sizes)
        if error is not None:
            metrics[f"eval/{self.name}/bits_per_byte_stderr"] = error
        return metrics | {
            f"eval/{self.name}/documents": len(sizes),
            f"eval/{self.name}/tokens": int(targets),
            f"eval/{self.name}/bytes": self.target_bytes,
            f"eval/{self.name}/fingerprint": self.fingerprint,
        }


def heldout_evaluations(
    config: Config,
    documents: Documents,
    tokenizer: Tokenizer,
    engine: Engine,
    stop: Callable[[], bool],
    console: Console,
) -> list[HeldoutEvaluation]:
    """An evaluation for each source that has held-out documents; none if `data.holdout` is 0.

    Rank 0 reads the documents and sends them to the other ranks.

    Raises:
        ConfigError: no source has a document that is held out.
    """
    names = config.data.heldout_names
    if not names:
        return []
    groups, seq_len, limit = engine.groups, config.train.seq_len, config.eval.rows

    def read() -> dict[str, Batch | None]:
        return {
            source: heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
            for source in (names if groups.is_rank_zero else ())
        }

    found = []
    for source, text in groups.broadcast(raise_on_all_ranks(groups, read)).items():
        if text is None:
            warn(console, f"data.sources.{source}: none of its documents are held out to evaluate")
        else:
            sizes = bytes_of_documents(text, tokenizer)
            found.append(HeldoutEvaluation(config, engine, names[source], text, stop, sizes))
    if not found:
        hint = "raise it, add documents, or set it to 0 to go without an evaluation"
        none = "holds out none of the documents"
        raise ConfigError([Problem("data.holdout", config.data.holdout, none, hint)])
    return found
