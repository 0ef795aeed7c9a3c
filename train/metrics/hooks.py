"""The hooks of a run: metrics, samples and checkpoints; those that evaluate: train/evaluation/.

A hook is called with the record of a step, every `every` steps and after the last step, and returns
metrics to log. It has no reference to the training loop. How to add one: train/metrics/record.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from conf.errors import ConfigError, Problem
from data.batch import Batch
from data.heldout import first_words
from data.sources.quarantine import Quarantine
from data.tokenizer import Tokenizer
from phd.config import ModelConfig
from phd.inference.cache import kv_bytes
from phd.inference.generator import Generator, Request
from train.checkpoint.format import TOKENIZER
from train.checkpoint.store import CheckpointError, CheckpointStore, Saved
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.device import peak_flops, peak_memory_gib
from train.engines.engine import Engine
from train.metrics.documents import bits_per_byte
from train.metrics.record import Metrics, StepRecord

MUCH_WAITING = 0.1
"""The fraction of the time spent waiting for data that causes a warning."""


class TrainingMetrics:
    """Loss, learning rate, gradient norm and progress.

    `train/loss` is this step's cross-entropy per target in nats, over the global batch.
    `train/bits_per_byte` is the same loss per byte of text, so that runs with different tokenizers
    can be compared.
    """

    early = True

    def __init__(self, config: Config) -> None:
        self.every = config.hooks.log_every
        self.config = config

    def __call__(self, record: StepRecord) -> Metrics:
        # This waits for the device. Steps that are not logged never do.
        loss = record.loss.item()
        targets, size = record.stats.targets, record.stats.target_bytes
        metrics: Metrics = {
            "train/loss": loss,
            "train/bits_per_byte": bits_per_byte(loss * targets, size),
            "optim/lr": record.lr,
            "optim/grad_norm": record.grad_norm.item(),
            "progress/tokens": record.tokens,
            "progress/train_flops": float(record.flops),
        }
        if self.config.schedule.copies is not None:
            metrics["progress/copies"] = self.config.copy_stage(record.step - 1).K
        if count := record.bad_steps["count"]:
            metrics["train/bad_steps"] = count
        return metrics


class DataProgress:
    """Tokens and epochs of each source so far, padding, and quarantined records.

    `progress/epoch` is the smallest epoch of the sources that have a weight from the start.
    """

    early = True

    def __init__(self, config: Config, quarantine: Quarantine, groups: ProcessGroups) -> None:
        self.every = config.hooks.log_every
        self.sources = tuple(config.data.sources)
        _, weights = config.data.mixture[0]
        self.weighted = [name for name, weight in weights.items() if weight]
        self.quarantine = quarantine
        self.groups = groups
        self.ranks_per_row = config.engine.ranks_per_row

    def __call__(self, record: StepRecord) -> Metrics:
        # Ranks that read other lanes find other bad records.
        own = self.quarantine.new_count, self.quarantine.write_error
        found = self.groups.gather_on_rank_zero(own)
        told = None if found is None else self._of_all(record, found[:: self.ranks_per_row])
        metrics = self.groups.broadcast(told)
        assert metrics is not None  # those of rank 0, which has all lanes' cursors
        return metrics

    def _of_all(self, record: StepRecord, found: Sequence[tuple[int, str | None]]) -> Metrics:
        stats = record.stats
        metrics: Metrics = {"progress/epoch": min(map(stats.epoch, self.weighted))}
        for source in self.sources:
            metrics[f"progress/{source}/tokens"] = stats.tokens(source)
            metrics[f"progress/{source}/epoch"] = stats.epoch(source)
        if stats.targets < stats.positions or record.batch.mask is not None:
            metrics["data/padding_fraction"] = 1 - stats.targets / stats.positions
        metrics["data/quarantined"] = self.quarantine.earlier_count + sum(new for new, _ in found)
        for write_error in filter(None, (error for _, error in found)):
            metrics["data/warning"] = write_error
        return metrics


class Throughput:
    """Speed since the last call, without hooks and evaluation, and peak memory.

    `throughput/mfu` (model FLOPs utilization, arXiv 2204.02311) is what `progress/train_flops` has
    grown by, over what the devices' bf16 peak would allow, also with `engine.precision=fp8`: so the
    MFUs of two precisions compare their speeds. It is absent if the peak is not known. The wait for
    data is that of the rank that waited most, because the other ranks wait for it.

    Args:
        tokens, flops: of the run before this start, as a `StepRecord` counts them.
    """

    early = True

    def __init__(
        self, config: Config, device: torch.device, tokens: int, flops: int, groups: ProcessGroups
    ) -> None:
        self.every = config.hooks.log_every
        self.device = device
        self.groups = groups
        self.config = config
        self.tokens_per_step = config.train.tokens_per_step
        self.total_steps, self.max_time = config.total_steps, config.train.max_time
        self.data = config.data
        waits = groups.world_size if groups.is_rank_zero else 1  # as in a `StepRecord`
        self.last = (tokens, flops, 0.0, (0.0,) * waits)
        self.calls, self.warned = 0, False

    def __call__(self, record: StepRecord) -> Metrics:
        tokens_before, flops_before, train_s, waits = self.last
        self.last = (record.tokens, record.flops, record.train_s, record.data_wait_s)
        tokens, seconds = record.tokens - tokens_before, record.train_s - train_s
        longest = max(
            (now - then, rank)
            for rank, (then, now) in enumerate(zip(waits, record.data_wait_s, strict=True))
        )
        waited, rank = self.groups.broadcast(longest)  # rank 0 knows that of all ranks
        tokens_per_s = tokens / seconds
        first = max(0, record.step - max(1, tokens // self.tokens_per_step))
        metrics: Metrics = {
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/tokens_per_s_per_device": tokens_per_s / self.groups.world_size,
            "throughput/slots_per_s": tokens_per_s * self.config.mean_copies(first, record.step),
            "throughput/step_s": seconds * self.tokens_per_step / tokens,
            "throughput/data_wait_fraction": waited / seconds,
            "memory/peak_gib": self.groups.greatest(peak_memory_gib(self.device)),
        }
        # The first step's time is mostly that of opening files and compiling.
        if self.calls and (left := self._time_left(record, metrics, first)) is not None:
            metrics["throughput/eta_s"] = left
        if peak := peak_flops(self.device):
            flops_per_s = (record.flops - flops_before) / seconds / self.groups.world_size
            metrics["throughput/mfu"] = flops_per_s / peak
        # The first interval includes opening the files. The warning is given once, because the
        # fraction is logged anyway.
        # Of the early reports, an interval of a step or two says little.
        enough = self.calls > 0 and record.step % self.every == 0
        if waited > MUCH_WAITING * seconds and enough and not self.warned:
            self.warned = True
            metrics["throughput/warning"] = self._advice(waited / seconds, rank)
        self.calls += 1
        return metrics

    def _time_left(self, record: StepRecord, metrics: Metrics, first: int) -> float | None:
        """Seconds of training that are left at this speed; None if the length is not known."""
        left = []
        if (total := self.total_steps) is not None:
            # Of steps with another K, each takes as much longer as it has more FLOPs.
            ahead = self.config.flops_between(record.step, total)
            behind = self.config.flops_between(first, record.step)
            step_s = float(metrics["throughput/step_s"])
            left.append(ahead / behind * step_s * (record.step - first))
        if self.max_time is not None:
            left.append(self.max_time - record.train_s)
        return max(0.0, min(left)) if left else None

    def _advice(self, fraction: float, rank: int) -> str:
        data = self.data
        who = "the training" if self.groups.world_size == 1 else f"rank {rank}, the slowest,"
        return (
            f"{who} waited for data {fraction:.0%} of the time; raise "
            f"data.workers={data.workers} while there are idle cores, and "
            f"data.prefetch={data.prefetch} if it comes in bursts; or tokenise beforehand with "
            "python train/pretokenize.py"
        )


class KVCost:
    """Bytes of the KV cache of one sequence of `hooks.kv.context` tokens at inference."""

    early = True

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.every = config.hooks.log_every
        self.config = config
        # The sizes change only with K. They are logged so that runs can be plotted by them.
        self.metrics = {
            K: self._cost(replace(config.model, K=K), config.hooks.kv.context, dtype)
            for K in {stage.K for stage in config.copy_stages}
        }

    @staticmethod
    def _cost(model: ModelConfig, context: int, dtype: torch.dtype) -> Metrics:
        cost = kv_bytes(model, context, dtype)
        vanilla = kv_bytes(model.vanilla_twin, context, dtype)
        # Naive repetition computes as much per token, and is what PHD has to be compared with.
        naive = replace(model, variant="naive_repeat", passes=1)
        return {
            "kv/bytes_per_sequence": cost.total,
            "kv/hidden_bytes_per_sequence": cost.hidden,
            "kv/vanilla_bytes_per_sequence": vanilla.total,
            "kv/naive_repeat_bytes_per_sequence": kv_bytes(naive, context, dtype).total,
            "kv/ratio_to_vanilla": cost.total / vanilla.total,
        }

    def __call__(self, record: StepRecord) -> Metrics:
        return self.metrics[self.config.copy_stage(record.step - 1).K]


class Sample:
    """A text that the model writes, with the same prompt and the same seed every time."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: str,
        stop: Callable[[], bool],
    ) -> None:
        self.every = config.hooks.sample.every
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.stop = stop

    def __call__(self, record: StepRecord) -> Metrics:
        return {} if record.ending and record.ending.by_signal else self.measure()

    def measure(self) -> Metrics:
        """The sample as a metric; `{}` if `stop` ends it early."""
        text = self.write()
        return {} if text is None else {"sample/text": text}

    def write(self) -> str | None:
        """The prompt and its continuation until the end of the document, equal on every rank."""
        settings = self.config.hooks.sample
        prompt = [self.tokenizer.eos_id, *self.tokenizer.encode(self.prompt).tolist()]
        request = Request(prompt, max_tokens=settings.tokens, seed=self.config.seed)
        new: list[int] = []
        with self.engine.summon_full_params() as model:
            # This goes on after the end of the document. `stop` is collective and weights may be
            # sharded, so all ranks must take the same number of steps.
            generator = Generator(model, batch=1)
            generator.submit(request)
            for _, token, _ in generator:
                if self.stop():
                    return None
                new.append(token)
        end = new.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in new else None
        return self.tokenizer.decode(prompt + new[:end])


def sample_prompt(config: Config, tokenizer: Tokenizer, heldout: Mapping[str, Batch]) -> str:
    """What samples begin with: the setting, or a held-out document's first words.

    Without held-out documents a sample begins as a document does, with nothing.

    Args:
        heldout: the held-out text of each source, by the name of its evaluation.

    Raises:
        ConfigError: the setting is too long for the model.
    """
    settings = config.hooks.sample
    room = config.model.max_seq_len - settings.tokens - 1  # one for the separator before it
    if settings.prompt is None:
        _, weights = config.data.mixture[0]
        used = [text for name, text in heldout.items() if weights.get(name, 1)]
        found = used or list(heldout.values())
        return first_words(found[0], tokenizer, most_tokens=room) if found else ""
    if (count := len(tokenizer.encode(settings.prompt))) > room:
        reason = f"has {count} tokens, and there is room for {room} before the sample"
        hint = f"choose a shorter one, or a lower hooks.sample.tokens={settings.tokens}"
        raise ConfigError([Problem("hooks.sample.prompt", settings.prompt, reason, hint)])
    return settings.prompt


class SaveCheckpoint:
    """Saves checkpoints while training goes on; after the last step it waits for the save.

    A trunk also saves where each of its decays begins. A disk error costs a checkpoint, not the
    run.

        checkpoint/stall_s    how long training stood still for this save
        checkpoint/step       the last step whose save has completed
        checkpoint/save_s     how long that save took
        checkpoint/error      why the save before this one failed

    Attributes:
        saved_step: the last step whose save has completed; None if none has. A pending save is not
            counted until the next save, or the end of the run, waits for it.
        error: why the last save failed; None if it did not.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        store: CheckpointStore,
        state: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        self.every = config.checkpoint.every
        self.steps = frozenset(config.branches.values())
        self.engine = engine
        self.store = store
        self.state = state
        self.files = {TOKENIZER: tokenizer.model}
        self.saved_step: int | None = None
        self.error: str | None = None

    def __call__(self, record: StepRecord) -> Metrics:
        state = {
            **self.state,
            "tokens": record.tokens,
            "train_flops": record.flops,
            "batches": record.batches,
            "bad_steps": record.bad_steps,
            "cursors": record.stats.cursors,
        }
        # `save` reports the save before this one, which has had `every` steps of time. So the
        # metrics of a save are logged one save later.
        metrics: Metrics = {}
        self.error = None
        start = perf_counter()
        try:
            self._note(
                metrics, self.store.save(record.step, self.engine.state(), state, self.files)
            )
        except CheckpointError as error:
            self._fail(metrics, f"{error}; training goes on", error.saved)
        metrics["checkpoint/stall_s"] = perf_counter() - start
        if record.ending:
            # The process is about to exit, and a daemon thread would not keep it from that.
            try:
                self._note(metrics, self.store.wait())
            except CheckpointError as error:
                self._fail(metrics, str(error), error.saved)
        return metrics

    def _note(self, metrics: Metrics, saved: Saved | None) -> None:
        if saved is not None:
            self.saved_step = saved.step
            metrics["checkpoint/step"] = saved.step
            metrics["checkpoint/save_s"] = saved.save_s

    def _fail(self, metrics: Metrics, text: str, saved: int | None) -> None:
        self.error = metrics["checkpoint/error"] = text
        if saved is not None:
            self.saved_step = metrics["checkpoint/step"] = saved
