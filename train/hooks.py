"""What happens beside the training: measuring, evaluating, sampling, saving.

A hook is called with the record of a step, every `every` steps and at the run's end, and returns
what is to be logged. It holds what it needs, but no reference to whoever calls it.
"""

from dataclasses import dataclass
from math import log
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from data.heldout import HeldOut
from data.quarantine import Quarantine
from data.stream import Batch
from data.tokenizer import Tokenizer
from phd.flops import training_flops_per_token
from phd.kv import kv_bytes
from phd.sampling import Sampling, generate
from train.checkpoint import CheckpointError, CheckpointStore
from train.config import Config
from train.device import peak_flops, peak_memory_gib
from train.engine import Engine, Rows

Metrics = dict[str, float | str]

COUNTED_DOCUMENTS = 64

MUCH_WAITING = 0.1
"""The fraction of the time that waits for data from which on something should be done."""


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step that has been taken.

    Attributes:
        step: how many have been, this one included.
        tokens: tokens of all rows so far, this step's and their padding included.
        loss, grad_norm: scalars on the device; see `train.engine.StepResult`.
        lr: the step's learning rate.
        batch: the step's batch; its cursors are where the stream goes on.
        train_s: seconds of training in this process, without hooks.
        data_wait_s: how many of them the step waited for data.
        ending: why this is the last step: `finished`, `max_time`, `out_of_text`, `no_data` or a
            signal's name; or None.
        failure: why there is no next batch; None if there is.
    """

    step: int
    tokens: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    batch: Batch
    train_s: float
    data_wait_s: float
    ending: str | None = None
    failure: Exception | None = None

    @property
    def interrupted(self) -> bool:
        """Somebody waits for the process to end: only what must be done should be."""
        return self.ending is not None and self.ending.startswith("SIG")


class Hook(Protocol):
    """Called after every `every`-th step (0: never) and after the last."""

    every: int

    def __call__(self, record: StepRecord) -> Metrics: ...


class TrainingMetrics:
    """Loss, optimizer and progress, of the step at hand.

    `train/loss` is the cross-entropy per target in nats over the global batch;
    `train/bits_per_byte` the same text's price in bits per byte, which no tokenizer can change.
    """

    def __init__(self, config: Config) -> None:
        self.every = config.hooks.log_every
        self.flops_per_token = training_flops_per_token(config.model, config.train.seq_len)

    def __call__(self, record: StepRecord) -> Metrics:
        loss = record.loss.item()
        targets = record.batch.targets
        return {
            "train/loss": loss,
            "train/bits_per_byte": bits_per_byte(loss * targets, record.batch.target_bytes),
            "optim/lr": record.lr,
            "optim/grad_norm": record.grad_norm.item(),
            "progress/tokens": record.tokens,
            "progress/train_flops": record.tokens * self.flops_per_token,
        }


class DataProgress:
    """What was read of each source so far, in tokens and complete passes, and what was wrong.

    `progress/epoch` is of the source that is least far, of those that have a weight at first.
    """

    def __init__(self, config: Config, quarantine: Quarantine) -> None:
        self.every = config.hooks.log_every
        self.sources = tuple(config.data.sources)
        _, weights = config.data.mixture[0]
        self.weighted = [name for name, weight in weights.items() if weight]
        self.quarantine = quarantine

    def __call__(self, record: StepRecord) -> Metrics:
        batch = record.batch
        metrics: Metrics = {"progress/epoch": min(map(batch.epoch, self.weighted))}
        for source in self.sources:
            metrics[f"progress/{source}/tokens"] = batch.tokens(source)
            metrics[f"progress/{source}/epoch"] = batch.epoch(source)
        if batch.mask is not None:
            metrics["data/padding_fraction"] = 1 - batch.targets / batch.mask.size
        metrics["data/quarantined"] = len(self.quarantine.faults)
        if self.quarantine.trouble:
            metrics["data/warning"] = self.quarantine.trouble
        return metrics


class Throughput:
    """Speed since the last call, hooks and evaluation left out, and the memory's peak.

    `throughput/mfu` is the FLOPs that the pattern needs over the device's bf16 peak; it is absent
    where the peak is not known. Where documents are isolated, their lengths are those of the last
    step's first `COUNTED_DOCUMENTS`.
    """

    def __init__(self, config: Config, device: torch.device, tokens: int) -> None:
        self.every = config.hooks.log_every
        self.device = device
        self.copies = config.model.K
        self.tokens_per_step = config.train.tokens_per_step
        self.model = config.model
        self.data = config.data
        self.last = (tokens, 0.0, 0.0)
        self.calls, self.warned = 0, False

    def __call__(self, record: StepRecord) -> Metrics:
        now = (record.tokens, record.train_s, record.data_wait_s)
        tokens, seconds, waited = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        tokens_per_s = tokens / seconds
        metrics: Metrics = {
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/tokens_per_s_per_device": tokens_per_s,
            "throughput/slots_per_s": tokens_per_s * self.copies,
            "throughput/step_s": seconds * self.tokens_per_step / tokens,
            "throughput/data_wait_fraction": waited / seconds,
            "memory/peak_gib": peak_memory_gib(self.device),
        }
        if peak := peak_flops(self.device):
            documents = record.batch.document_lengths[:COUNTED_DOCUMENTS]
            flops_per_token = training_flops_per_token(self.model, *documents)
            metrics["throughput/mfu"] = tokens_per_s * flops_per_token / peak
        # The first interval waits for files to open; later waits will go on.
        if waited > MUCH_WAITING * seconds and self.calls and not self.warned:
            self.warned = True
            metrics["throughput/warning"] = self._advice(waited / seconds)
        self.calls += 1
        return metrics

    def _advice(self, fraction: float) -> str:
        data = self.data
        return (
            f"the training waited for data {fraction:.0%} of the time; raise "
            f"data.workers={data.workers} while there are idle cores, and "
            f"data.prefetch={data.prefetch} if it comes in bursts; or tokenise beforehand with "
            "python train/pretokenize.py"
        )


class KVCost:
    """What one sequence of `hooks.kv.context` tokens would keep in the KV cache at inference."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.every = config.hooks.log_every
        context, size = config.hooks.kv.context, dtype.itemsize
        cost = kv_bytes(config.model, context, size)
        vanilla = kv_bytes(config.model.vanilla_twin, context, size)
        self.metrics: Metrics = {
            "kv/bytes_per_sequence": cost.total,
            "kv/hidden_bytes_per_sequence": cost.hidden,
            "kv/ratio_to_vanilla": cost.total / vanilla.total,
        }

    def __call__(self, record: StepRecord) -> Metrics:  # noqa: ARG002
        return self.metrics


class Evaluation:
    """The loss on held-out documents."""

    def __init__(self, config: Config, engine: Engine, name: str, text: HeldOut) -> None:
        self.every = config.eval.every
        self.engine = engine
        self.name = name
        self.text = text

    def __call__(self, record: StepRecord) -> Metrics:
        return {} if record.interrupted else self.measure()

    def measure(self) -> Metrics:
        """Cross-entropy per token in nats, and bits per byte."""
        total, targets = self.engine.loss(Rows.of(self.text))
        nats = total.item()
        return {
            f"eval/{self.name}/loss": nats / targets,
            f"eval/{self.name}/bits_per_byte": bits_per_byte(nats, self.text.target_bytes),
        }


class Sample:
    """A text that the model writes: the same prompt and the same dice every time."""

    def __init__(self, config: Config, engine: Engine, tokenizer: Tokenizer) -> None:
        self.every = config.hooks.sample.every
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer

    def __call__(self, record: StepRecord) -> Metrics:
        return {} if record.interrupted else self.measure()

    def measure(self) -> Metrics:
        """The sample as a metric."""
        return {"sample/text": self.write()}

    def write(self) -> str:
        """The prompt and what follows it, until the document ends."""
        settings = self.config.hooks.sample
        prompt = [self.tokenizer.eos_id, *self.tokenizer.encode(settings.prompt).tolist()]
        tokens = torch.tensor([prompt], device=self.engine.device)
        dice = torch.Generator().manual_seed(self.config.seed)
        new = []
        for token in generate(self.engine.model, tokens, Sampling(), dice, settings.tokens):
            if token.item() == self.tokenizer.eos_id:
                break
            new.append(int(token.item()))
        return self.tokenizer.decode(prompt + new)


class Saving:
    """Writes checkpoints; a disk that refuses costs the checkpoint, not the run."""

    def __init__(
        self, config: Config, engine: Engine, store: CheckpointStore, state: dict[str, Any]
    ) -> None:
        self.every = config.checkpoint.every
        self.engine = engine
        self.store = store
        self.state = state

    def __call__(self, record: StepRecord) -> Metrics:
        start = perf_counter()
        state = {**self.state, "tokens": record.tokens, "cursors": record.batch.cursors}
        try:
            self.store.save(record.step, self.engine.state(), state)
        except CheckpointError as error:
            return {"checkpoint/error": f"{error}{'' if record.ending else '; training goes on'}"}
        return {"checkpoint/save_s": perf_counter() - start}


def bits_per_byte(nats: float, size: int) -> float:
    """A text's information in bits per byte of its UTF-8.

    >>> bits_per_byte(log(2) * 24, 8)
    3.0
    """
    return nats / log(2) / size
