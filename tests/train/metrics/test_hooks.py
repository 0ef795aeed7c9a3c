"""What hooks measure equals what can be computed by hand."""

import io
from dataclasses import replace
from itertools import pairwise
from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from conf.errors import ConfigError, DataError
from data.batch import Batch, BatchStats
from data.heldout import heldout_rows
from data.mixture import LaneCursor, SourceState
from data.shuffle import Cursor
from data.source import BadRecord
from data.sources.documents import Documents
from data.sources.quarantine import Quarantine
from phd.flops import training_flops
from phd.inference.cache import kv_bytes
from tests.train.many_ranks import run_ranks
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.distributed.process_groups import ProcessGroups
from train.ending import Ending
from train.engines.fsdp import FsdpEngine
from train.loop import train
from train.metrics.documents import bits_per_byte, fingerprint_of
from train.metrics.hooks import (
    DataProgress,
    KVCost,
    SaveCheckpoint,
    Throughput,
    TrainingMetrics,
)
from train.metrics.record import StepRecord
from train.run import open_run

CPU = torch.device("cpu")

LOGGED = {
    "train/loss",
    "train/bits_per_byte",
    "optim/lr",
    "optim/grad_norm",
    "throughput/tokens_per_s",
    "throughput/tokens_per_s_per_device",
    "throughput/slots_per_s",
    "throughput/data_wait_fraction",
    "throughput/step_s",
    "kv/bytes_per_sequence",
    "kv/hidden_bytes_per_sequence",
    "kv/vanilla_bytes_per_sequence",
    "kv/naive_repeat_bytes_per_sequence",
    "kv/ratio_to_vanilla",
    "memory/peak_gib",
    "progress/tokens",
    "progress/epoch",
    "data/quarantined",
    "progress/files/tokens",
    "progress/files/epoch",
    "progress/train_flops",
}
CHECKPOINT = {"checkpoint/save_s", "checkpoint/stall_s", "checkpoint/step"}
EVALUATED = ("loss", "bits_per_byte", "bits_per_byte_stderr")
OF_TEXT = ("documents", "tokens", "bytes", "fingerprint")
AT_THE_END = {*(f"eval/heldout/{name}" for name in (*EVALUATED, *OF_TEXT)), "sample/text"}
AT_THE_END |= CHECKPOINT


LANE = LaneCursor({"files": SourceState(Cursor(epoch=3), tokens=400)}, skip=7)


def record_of(**known: object) -> StepRecord:
    """A record of step 10 after 1000 tokens, except for what is known."""
    rows = np.zeros((2, 33), dtype=np.int64)
    stats = BatchStats(64, 64, target_bytes=16, lanes={0: LANE}, progress={0: LANE})
    batch = Batch(rows, mask=None, document_starts=None, stats=stats)
    values = {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(0.5), "batch": batch}
    values |= {
        "step": 10,
        "tokens": 1000,
        "flops": 5 * 10**12,
        "lr": 0.1,
        "train_s": 4.0,
        "data_wait_s": (1.0,),
    }
    values |= {"batches": 10, "stats": stats, "bad_steps": {"count": 0}}
    return StepRecord(**(values | known))


def nats(engine: FsdpEngine, rows: torch.Tensor, mask: torch.Tensor) -> float:
    """The summed cross-entropy of the targets that count, a target at a time."""
    total = 0.0
    for row, counted in zip(rows, mask, strict=True):
        logits = engine.model.logits(row[None, :-1])[0]
        for t in counted.nonzero().flatten():
            total += cross_entropy(logits[t], row[t + 1]).item()
    return total


# Names


def test_a_logging_step_has_the_promised_names_and_no_others(config, trained, logged) -> None:
    run = trained(config("train.max_steps=3")).run
    first, _, last = logged(run.directory, measured=True)
    for line in (first, last):
        line.pop("throughput/warning", None)  # a busy machine makes the loader slow
    assert set(first) == {"step", "time"} | LOGGED
    assert set(last) == {"step", "time"} | LOGGED | AT_THE_END | {"throughput/eta_s"}


# Training


def test_the_training_metrics_are_the_records(config) -> None:
    settings = config("model.K=3")
    assert TrainingMetrics(settings)(record_of()) == {
        "train/loss": 2.0,
        "train/bits_per_byte": 2.0 * (2 * 32) / log(2) / 16,
        "optim/lr": 0.1,
        "optim/grad_norm": 0.5,
        "progress/tokens": 1000,
        "progress/train_flops": 5e12,
    }


@pytest.mark.parametrize("targets", [1, 10, 40, 63])
def test_bits_per_byte_are_of_the_targets_that_count(config, targets: int) -> None:
    record = record_of()
    record = replace(record, stats=record.stats._replace(targets=targets))
    expected = 2.0 * targets / log(2) / 16
    metrics = TrainingMetrics(config())(record)
    assert metrics["train/bits_per_byte"] == pytest.approx(expected)


# Tokens and FLOPs


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.documents=isolate"],
        ["data.packing=best_fit"],
        ["data.documents=isolate", "data.packing=best_fit", "model=phd_swa", "model.K=3"],
        ["data.documents=isolate", "model=vanilla", "train.micro_batch=1"],
    ],
    ids=" ".join,
)
def test_the_flops_of_a_run_are_those_of_the_documents_it_was_trained_on(
    overrides: list[str], config, trained, logged
) -> None:
    class Rows:
        every = 1

        def __init__(self) -> None:
            self.batches: list[Batch] = []

        def __call__(self, record: StepRecord) -> dict:
            self.batches.append(record.batch)
            return {}

    seen, expected, model = Rows(), 0, config(*overrides).model
    trained(config(*overrides, "train.max_steps=2", "schedule=constant"), hooks=(seen,))
    # The count of a resumed run goes on.
    done = trained(config(*overrides, "train.max_steps=4", "schedule=constant"), hooks=(seen,))
    lines = [line for line in logged(done.run.directory) if "train/loss" in line]
    assert len(lines) == len(seen.batches) == 4
    for line, batch in zip(lines, seen.batches, strict=True):
        isolated = "data.documents=isolate" in overrides
        for i, row in enumerate(batch.inputs):
            end = 32 if batch.mask is None else int(batch.mask[i].sum())
            separators = (row[:end] == done.run.tokenizer.eos_id).nonzero()[0].tolist()
            borders = sorted({0, *(separators if isolated else []), end})
            expected += sum(training_flops(model, b - a) for a, b in pairwise(borders))
        assert line["progress/train_flops"] == expected
    whole = 4 * done.run.config.flops_per_step
    assert (expected < whole) == bool({"data.documents", "data.packing"} & keys_of(overrides))


def keys_of(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def test_batches_that_were_skipped_are_no_tokens(config) -> None:
    settings = config("train.max_steps=4", "checkpoint.every=0")
    skip = frozenset({2, 3})
    with open_run(settings, Console(file=io.StringIO()), skip_batches=skip) as run:
        record, metrics = train(run, Progress(disable=True))
    assert (record.step, record.batches) == (4, 6)
    assert metrics["progress/tokens"] == record.tokens == 4 * settings.train.tokens_per_step
    assert metrics["progress/train_flops"] == 4 * settings.flops_per_step


def test_a_checkpoint_without_a_count_stands_for_whole_rows(
    config, trained, tmp_path: Path
) -> None:
    settings = ("data.documents=isolate", "schedule=constant")
    run = trained(config(*settings)).run
    state = run.store.newest().state
    assert state.pop("train_flops") < 6 * run.config.flops_per_step
    store = CheckpointStore(tmp_path / "earlier/checkpoints", keep=1)
    store.save(6, run.engine.state(), state)
    store.wait()
    more = trained(config(*settings, f"run.dir={tmp_path / 'earlier'}", "train.max_steps=7"))
    own = training_flops(run.config.model, *more.record.batch.document_lengths)
    assert more.record.flops == 6 * run.config.flops_per_step + own


def test_bits_per_byte_of_uniform_bytes_is_eight() -> None:
    assert bits_per_byte(100 * log(256), 100) == pytest.approx(8)


def test_the_first_loss_is_that_of_the_initial_weights_on_the_first_batch(config, trained) -> None:
    settings = config("train.max_steps=1", "model.K=3", "train.micro_batch=2")
    done = trained(settings)
    fresh = FsdpEngine(
        replace(settings, train=replace(settings.train, micro_batch=None)), ProcessGroups()
    )
    rows = torch.from_numpy(done.record.batch.rows)
    every = torch.ones(rows[:, 1:].shape, dtype=torch.bool)
    expected = nats(fresh, rows, every) / every.numel()
    assert done.metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


# Throughput


def test_throughput_is_of_the_time_since_the_last_call(config) -> None:
    throughput = Throughput(config("model.K=3"), CPU, 128, 0, ProcessGroups())
    throughput(record_of(tokens=256, train_s=1.0, data_wait_s=(0.5,)))
    metrics = throughput(record_of(tokens=128 * 6, train_s=3.0, data_wait_s=(1.0,)))
    warning = metrics.pop("throughput/warning")
    assert "waited for data 25% of the time; raise data.workers=1" in str(warning)
    assert metrics.pop("memory/peak_gib") > 0
    assert metrics.pop("throughput/eta_s") >= 0
    assert metrics == {
        "throughput/tokens_per_s": 256.0,
        "throughput/tokens_per_s_per_device": 256.0,
        "throughput/slots_per_s": 768.0,
        "throughput/step_s": 0.5,
        "throughput/data_wait_fraction": 0.25,
    }


def test_a_resumed_run_does_not_count_the_tokens_of_its_former_processes(config) -> None:
    throughput = Throughput(config(), CPU, 1000, 0, ProcessGroups())
    metrics = throughput(record_of(tokens=1128, train_s=2.0))
    assert metrics["throughput/tokens_per_s"] == 64.0


def test_mfu_is_what_the_flops_have_grown_by_over_the_peak_and_absent_where_that_is_unknown(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, cuda = config(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)

    def mfu(name: str) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        throughput = Throughput(settings, cuda, 0, 10**12, ProcessGroups())
        return throughput(record_of()).get("throughput/mfu")

    needed = (5e12 - 1e12) / 4.0
    assert mfu("NVIDIA A100-SXM4-80GB") == pytest.approx(needed / 312e12)
    assert mfu("NVIDIA H100 80GB HBM3") == pytest.approx(needed / 989e12)
    assert mfu("NVIDIA H100 PCIe") == pytest.approx(needed / 756e12)
    assert mfu("Something New 9000") is None
    assert "throughput/mfu" not in Throughput(settings, CPU, 0, 0, ProcessGroups())(record_of())


def mfu_of_a_rank(groups: ProcessGroups, overrides: list[str]) -> list[float]:
    """What a rank on an H100 logs for two intervals, in each of which it has computed more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
        throughput = Throughput(load(overrides), torch.device("cuda"), 0, 10**15, groups)
        found = []
        for n in (1, 2):
            # Rank 0 goes on with the FLOPs of all ranks before this start.
            flops = 10**15 * (groups.rank == 0) + n * (2 + groups.rank) * 10**14
            record = record_of(tokens=1000 * n, flops=flops, train_s=4.0 * n, data_wait_s=(0.0,))
            found.append(throughput(record.of_all(groups))["throughput/mfu"])
    return found


@pytest.mark.process
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mfu_of_many_ranks_is_their_mean(world_size: int, small) -> None:
    each = sum((2 + rank) * 1e14 for rank in range(world_size)) / world_size
    for found in run_ranks(world_size, mfu_of_a_rank, small()):
        assert found == pytest.approx([each / 4.0 / 989e12] * 2)


def counts_of_a_rank(groups: ProcessGroups) -> tuple[int, int, str]:
    """Targets and FLOPs of all; and why a rank that has read other rows is no mate."""
    record = record_of(flops=1)
    of_all = record.of_all(groups, ranks_per_row=2)
    rows = record.batch.rows + (groups.rank == 3)
    with pytest.raises(DataError) as refused:
        replace(record, batch=record.batch._replace(rows=rows)).of_all(groups, ranks_per_row=2)
    return of_all.stats.targets, of_all.flops, str(refused.value)


@pytest.mark.process
def test_rows_count_once_that_two_ranks_work_on() -> None:
    for targets, flops, why in run_ranks(4, counts_of_a_rank):
        assert (targets, flops) == (2 * 64, 2)
        assert why.startswith(
            "ranks 2 and 3 work on the same rows, and have read others at step 10"
        )


# The KV cache


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa", "naive_repeat"])
def test_the_kv_metrics_are_what_a_cache_in_the_runs_precision_holds(variant: str, config) -> None:
    settings = config(f"model={variant}", "hooks.kv.context=40")
    metrics = KVCost(settings, torch.bfloat16)(record_of())
    cost = kv_bytes(settings.model, 40, torch.bfloat16)
    vanilla = 2 * settings.model.layers * settings.model.head_dim * 40 * 2
    assert metrics == {
        "kv/bytes_per_sequence": cost.total,
        "kv/hidden_bytes_per_sequence": cost.hidden,
        "kv/vanilla_bytes_per_sequence": vanilla,
        "kv/naive_repeat_bytes_per_sequence": settings.model.K * vanilla,
        "kv/ratio_to_vanilla": cost.total / vanilla,
    }
    in_single = KVCost(settings, torch.float32)(record_of())
    assert in_single["kv/bytes_per_sequence"] == 2 * cost.total


# Evaluation


def test_the_evaluation_is_the_mean_over_the_held_out_targets(config, opened) -> None:
    run = opened(config("eval.rows=1000", "train.micro_batch=2"))
    text = heldout_rows(run.stream.documents, run.tokenizer, "files", seq_len=32, limit=1000)
    assert not text.mask.all()
    rows, mask = torch.from_numpy(text.rows), torch.from_numpy(text.mask)
    total = nats(run.engine, rows, mask)
    metrics = run.measure()
    assert metrics["eval/heldout/loss"] == pytest.approx(total / mask.sum().item(), rel=1e-5)
    # Every held-out document's bytes, each once.
    size = sum(len(document.text.encode()) for document in run.stream.documents.held_out("files"))
    bits = metrics["eval/heldout/bits_per_byte"]
    assert bits == pytest.approx(total / log(2) / size, rel=1e-5)
    # The same a document at a time: its tokens are a separator's, its own and a separator's.
    documents = list(run.stream.documents.held_out("files"))
    numbers = text.documents
    each = [
        nats(run.engine, rows, mask & torch.from_numpy(numbers == n)) for n in range(len(documents))
    ]
    sizes = [len(document.text.encode()) for document in documents]
    squares = [(n / log(2) - bits * s) ** 2 for n, s in zip(each, sizes, strict=True)]
    count = len(documents)
    assert metrics["eval/heldout/bits_per_byte_stderr"] == pytest.approx(
        sqrt(count / (count - 1) * sum(squares)) / size, rel=1e-4
    )
    told = {name: metrics[f"eval/heldout/{name}"] for name in ("documents", "tokens", "bytes")}
    assert told == {"documents": count, "tokens": int(mask.sum()), "bytes": size}


def test_a_fingerprint_is_of_the_rows_that_are_read(config, opened) -> None:
    run = opened(config())

    def fingerprint(T: int, limit: int) -> str:
        documents, tokenizer = run.stream.documents, run.tokenizer
        return fingerprint_of(heldout_rows(documents, tokenizer, "files", seq_len=T, limit=limit))

    assert fingerprint(32, 2) == fingerprint(32, 2)
    assert (
        len({fingerprint(32, 2), fingerprint(32, 1), fingerprint(65, 1), fingerprint(16, 2)}) == 4
    )
    text = heldout_rows(run.stream.documents, run.tokenizer, "files", seq_len=32, limit=2)
    isolated = text._replace(document_starts=np.zeros_like(text.inputs))
    assert fingerprint_of(isolated) == fingerprint(32, 2)


def test_measuring_changes_nothing(config, opened) -> None:
    run = opened(config())
    before = [p.clone() for p in run.engine.model.parameters()]
    random = torch.get_rng_state()
    run.measure()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in run.engine.model.parameters())
    for ours, theirs in zip(run.engine.model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("signal", [Ending.SIGINT, Ending.SIGTERM])
def test_whoever_waits_for_the_end_is_not_kept_waiting(signal: Ending, config, opened) -> None:
    run = opened(config())
    measuring = [*run.evaluations, run.sample]
    assert len(measuring) == 2
    for hook in measuring:
        assert hook(record_of(ending=signal)) == {}
        assert hook(record_of(ending=Ending.FINISHED)) != {}


# The sample


def test_a_sample_begins_with_its_prompt_and_is_the_same_every_time(config, opened) -> None:
    run = opened(config("hooks.sample.prompt='é def  </s>'", "hooks.sample.tokens=30"))
    sample = run.sample
    text = sample.measure()["sample/text"]
    assert text.startswith("é def  </s>")
    assert len(text) > len("é def  </s>")
    assert sample.measure()["sample/text"] == text


def test_a_sample_of_a_model_with_more_embeddings_than_pieces_is_text(config, opened) -> None:
    run = opened(config("model.vocab_size=5000", "hooks.sample.tokens=30"))
    assert run.tokenizer.vocab_size < 2500  # so most of what an untrained model draws has no piece
    sample = run.sample
    assert sample.measure()["sample/text"].startswith(sample.prompt)


@pytest.mark.parametrize("documents", ["concatenate", "isolate"])
def test_by_default_a_sample_begins_as_a_held_out_document_does(
    documents: str, config, opened
) -> None:
    settings = config(f"data.documents={documents}")
    run = opened(settings)
    held_out = [d.text for d in Documents(settings.data).held_out("files")]
    assert len(run.sample.prompt.split()) == 4
    assert [text for text in held_out if text.startswith(run.sample.prompt)]
    assert run.sample.measure()["sample/text"].startswith(run.sample.prompt)


def test_without_held_out_documents_a_sample_begins_with_nothing(config, opened) -> None:
    run = opened(config("data.holdout=0"))
    assert run.sample.prompt == ""
    assert run.sample.measure()["sample/text"]


def test_a_prompt_without_room_is_refused_before_the_first_step(config, opened) -> None:
    assert len(opened(config("hooks.sample.tokens=62")).sample.prompt) <= 1
    with pytest.raises(ConfigError, match=r"hooks.sample.prompt='x x x x .*there is room for 2"):
        opened(config("hooks.sample.tokens=61", "hooks.sample.prompt='x x x x x'"))


# Saving


def test_a_checkpoint_holds_what_the_run_goes_on_from(config, opened) -> None:
    run = opened(config())
    state = {"config": {"seed": 5}, "stream": {}}
    saving = SaveCheckpoint(run.config, run.engine, run.store, state, run.tokenizer)
    assert list(saving(record_of())) == ["checkpoint/stall_s"]
    later = saving(record_of(step=20))
    assert set(later) == CHECKPOINT
    assert later["checkpoint/step"] == 10
    saved = run.store.newest()
    expected = {"step": 20, "tokens": 1000, "batches": 10, "cursors": {"0": LANE.to_json()}}
    expected |= {"train_flops": 5 * 10**12, "bad_steps": {"count": 0}}
    assert saved.state == state | expected


def test_the_end_waits_for_the_disk(config, opened) -> None:
    run = opened(config())
    saving = SaveCheckpoint(run.config, run.engine, run.store, {}, run.tokenizer)
    told = saving(record_of(ending=Ending.FINISHED))
    assert 0 < told["checkpoint/stall_s"] <= told["checkpoint/save_s"]
    assert (run.store.root / "step_00000010" / "COMPLETE").exists()


def test_a_disk_that_refuses_costs_the_checkpoint_and_is_told(config, opened) -> None:
    run = opened(config())
    blocked = run.directory / "blocked"
    blocked.touch()
    store = CheckpointStore(blocked, keep=1)
    saving = SaveCheckpoint(run.config, run.engine, store, {}, run.tokenizer)
    assert "checkpoint/error" not in saving(record_of())  # not known yet
    for later in (record_of(step=20), record_of(step=30, ending=Ending.FINISHED)):
        message = saving(later)["checkpoint/error"]
        assert f"could not be written to {blocked}" in message
        assert message.endswith("training goes on") == (later.ending is None)


# Waiting for data


def test_waiting_is_told_once_and_not_for_the_first_interval(config) -> None:
    throughput = Throughput(config("data.workers=3"), CPU, 0, 0, ProcessGroups())
    told = []
    for n, waited in enumerate((0.9, 1.8, 1.85, 2.7), start=1):
        record = record_of(tokens=128 * n, train_s=1.0 * n, data_wait_s=(waited,))
        told.append(throughput(record).get("throughput/warning"))
    assert told[0] is told[2] is told[3] is None
    assert "waited for data 90% of the time; raise data.workers=3" in str(told[1])


def test_a_little_waiting_is_not_worth_a_word(config) -> None:
    throughput = Throughput(config(), CPU, 0, 0, ProcessGroups())
    for n in range(1, 5):
        record = record_of(tokens=128 * n, train_s=1.0 * n, data_wait_s=(0.09 * n,))
        assert "throughput/warning" not in throughput(record)


# Data


def test_a_mixture_tells_what_was_read_of_each_source(config) -> None:
    both = config("data=[files,python]", "data.packing=best_fit")
    lanes = {
        n: LaneCursor(
            {
                "files": SourceState(Cursor(epoch=2 + n), tokens=400 * n),
                "python": SourceState(Cursor(epoch=1), tokens=7),
            }
        )
        for n in (1, 2)
    }
    mask = np.ones((2, 4), dtype=bool)
    mask[1, 2:] = False
    record = record_of()
    stats = BatchStats(6, 8, target_bytes=16, lanes=lanes, progress=lanes)
    record = replace(record, batch=record.batch._replace(mask=mask), stats=stats)
    quarantine = Quarantine(1.0)
    quarantine.add(BadRecord("empty", "a@0"))
    assert DataProgress(both, quarantine, ProcessGroups())(record) == {
        "progress/epoch": 1,
        "progress/files/tokens": 1200,
        "progress/files/epoch": 3,
        "progress/python/tokens": 14,
        "progress/python/epoch": 1,
        "data/padding_fraction": 0.25,
        "data/quarantined": 1,
    }
