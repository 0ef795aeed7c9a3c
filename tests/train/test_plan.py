"""The plan's numbers are right, and its warnings come when they should and not otherwise."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from conf.errors import ConfigError
from conf.validation import build
from conf.wording import byte_size, plural
from data.sources.token_files import write_tokens
from phd.flops import training_flops_per_token
from phd.model import count_parameters
from train import compose
from train.arguments import PlanArguments
from train.compose import load
from train.costs.duration import measure
from train.costs.optimizer import optimizer_cost
from train.costs.plan import Plan
from train.costs.plan_table import print_plan
from train.costs.text import SourceText, Text, look_at_text
from train.loop import train
from train.metrics.record import Metrics, StepRecord
from train.plan import make_plan
from train.run import open_run

CPU = "engine.device=cpu"


def plan_of(*overrides: str, text: Text | None = None, **given: Any) -> Plan:
    """The plan of a run, with the arguments of the command."""
    arguments = build(PlanArguments, given)
    config = load([*([] if arguments.device else [CPU]), *overrides])
    return make_plan(config, arguments.processes, text=text, arguments=arguments)


def printed(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=600))
    return text.getvalue()


# What a setting should draw a warning of, and one that should not.
WARNINGS = {
    "train.global_batch=128000 model.vocab_size=16 train.max_tokens=1e13": (
        "needs about",
        "this machine has",
        "lower train.micro_batch",
    ),
    "train.max_tokens=1e13 checkpoint.keep=100000000": ("of disk", "lower checkpoint.keep"),
    "train.max_tokens=1e13 checkpoint.keep_every=100": ("of disk", "raise checkpoint.keep_every"),
    "train.max_steps=1": ("tokens per parameter", "the model will hardly have begun to learn"),
    "model.window=33": ("model.window=33 reaches past model.chunk=32", "the chunk limits it"),
    "model.chunk=256 model.window=1": ("model.chunk=256 covers the whole row", "phd_swa"),
    "model.K=1 model.window=1": ("model.K=1: phd_cswa with one copy is vanilla",),
    "optim.lr=0.03": ("optim.lr=0.03", "diverges"),
    "data.phases.x.after_tokens=1e12 data.phases.x.weights.python=2": (
        "data.phases.x.after_tokens=1000000000000: begins after the run's",
    ),
    "checkpoint.every=0": ("checkpoint.every=0", "a crash loses everything"),
}


@pytest.mark.parametrize("overrides", WARNINGS)
def test_nonsense_is_warned_of_once_by_its_key(overrides: str) -> None:
    plan = plan_of(*overrides.split())
    [warning] = plan.warnings
    assert all(part in warning for part in WARNINGS[overrides])
    assert printed(plan).count(f"warning: {warning}\n") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=vanilla"],
        ["model=phd"],
        ["model=phd_swa", "model.window=33"],
        ["model=naive_repeat"],
        ["model.window=32", "model.chunk=255", "optim.lr=0.02"],
    ],
    ids=" ".join,
)
def test_what_makes_sense_draws_no_warning(overrides: list[str]) -> None:
    plan = plan_of(*overrides)
    assert plan.warnings == ()
    assert "warning" not in printed(plan)


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_cswa"])
def test_flops_are_counted_for_this_variant_and_for_vanilla(variant: str) -> None:
    config = load([CPU, f"model={variant}"])
    plan = make_plan(config)
    assert plan.compute.flops == training_flops_per_token(config.model, 256)
    vanilla = load([CPU, "model=vanilla"]).model
    assert plan.compute.vanilla == training_flops_per_token(vanilla, 256)
    assert plan.parameters == count_parameters(config.model)


def test_a_run_of_tokens_has_whole_steps_of_them() -> None:
    step = ["train.global_batch=16", "train.seq_len=256"]
    plan = plan_of(*step, f"train.max_tokens={100 * 4096 + 4095}")
    assert plan.tokens == 100 * 4096


@pytest.mark.parametrize("size", ["1m3", "2m6", "5m8", "16m", "34m"])
def test_a_rung_of_the_ladder_has_20_tokens_per_parameter(size: str) -> None:
    plan = plan_of(f"size={size}", "model=vanilla")
    step = plan.config.train.tokens_per_step
    assert plan.tokens is not None
    assert 0 <= 20 * sum(plan.parameters.values()) - plan.tokens < step
    assert plan.warnings == ()


LIMITS = {
    "train.max_steps=9 train.max_tokens=20480": "max_steps ends it; train.max_tokens allows 10",
    "train.max_steps=9 train.max_tokens=10240": "max_tokens ends it; train.max_steps allows 9",
    "train.max_steps=900 train.max_flops=1e12": "max_flops ends it; train.max_steps allows 900",
    "train.max_steps=9 train.max_time=60": "max_steps ends it; each start ends after train.max_time"
    "=60 s",
    "train.max_steps=9": "",
    "train.max_flops=1e12": "",
    "train.max_steps=5 train.max_tokens=10240": "",
}


@pytest.mark.parametrize("limits", LIMITS)
def test_of_several_limits_the_plan_says_which_ends_the_run(limits: str) -> None:
    text = printed(plan_of(*limits.split()))
    assert ("ends it" in text) == bool(LIMITS[limits])
    assert LIMITS[limits] in text


def test_a_run_that_only_time_ends_has_no_tokens_to_tell() -> None:
    plan = plan_of("train.max_time=90s", "schedule=constant")
    assert plan.tokens is None
    assert "90 s" in printed(plan)


def test_the_plan_says_what_the_run_will_cost() -> None:
    overrides = ["model.K=3", "train.max_steps=1000", "run.dir=/some/where"]
    overrides += ["train.global_batch=16", "train.micro_batch=4", "train.seq_len=256"]
    plan = plan_of(*overrides)
    text = printed(plan)
    parameters = sum(plan.parameters.values())
    ratio = plan.compute.flops / plan.compute.vanilla
    for expected in (
        "the plan: phd_cswa-3-16-32-tiny",
        f"{parameters / 1e6:.3g}M: embedding 1.05M, attention",
        "4,096 tokens = 16 rows x 256, 3 slots each, in 4 forward passes",
        f"1,000 steps = 4.1M tokens, {4096000 / parameters:.2f} per parameter",
        f"{4096000 * plan.compute.flops:.2e} FLOPs",
        f"{ratio:.2f} x vanilla's",
        f"about {plan.memory.total / 2**20:.3g} MiB",
        f"activations {plan.memory.activations / 2**20:.3g} MiB",
        "/some/where",
    ):
        assert expected in text


@pytest.mark.parametrize("directory", [f"runs/{'n' * 90}", f"/{'deep/' * 40}run"])
def test_the_runs_directory_is_printed_whole(directory: str) -> None:
    text = io.StringIO()
    print_plan(plan_of(f"run.dir={directory}"), Console(file=text, width=80))
    _, _, row = text.getvalue().partition("run directory")
    assert "".join(row.split()).replace("│", "").startswith(directory)


def test_the_plan_says_what_a_size_sets_besides_the_model() -> None:
    text = printed(plan_of("size=550m", "optim.lr=1e-3"))
    for expected in (
        "size=550m chose recipe=olmo2; they set data.lanes=256, train.max_tokens=3e11,",
        "train.global_batch=1024,",
        "this run replaces: optim.lr=0.001 (recipe: 0.0003)",
    ):
        assert expected in text
    assert "train.max_tokens=5e11" in printed(plan_of("size=1b2"))  # which the size itself sets
    assert "replaces" not in printed(plan_of("size=151m"))
    assert "recipe" not in printed(plan_of("size=tiny"))


def test_groups_without_parameters_are_not_shown() -> None:
    assert "head" not in printed(plan_of())
    assert "head 1.05M" in printed(plan_of("model.tied=false"))


# Another device


MEMORY_GIB = {"H100": 79.1, "h200": 139.7, "a100-40gb": 39.4, "rtx4090": 23.5}
# The kernels of attention and the memory are told alike where blocks are compiled; to trace these
# takes seconds.
EAGER = "engine.compile=false"
SHAPE = (EAGER, "model.layers=1", "train.global_batch=512")
SHAPE += ("train.micro_batch=64", "train.seq_len=4096")


@pytest.mark.parametrize("device", MEMORY_GIB)
def test_memory_is_judged_by_the_named_device_and_its_precision(device: str) -> None:
    plan = plan_of(*SHAPE, device=device)
    assert plan.target.memory == int(MEMORY_GIB[device] * 2**30)
    assert plan.dtype is torch.bfloat16
    exact = plan_of(*SHAPE, "engine.precision=fp32", device=device)
    assert exact.dtype is torch.float32
    assert exact.memory.activations > plan.memory.activations
    for each in (plan, exact):
        told = any("needs about" in warning for warning in each.warnings)
        assert told == (each.memory.total > each.target.memory)
        assert f" of {MEMORY_GIB[device]:.3g} GiB ({each.target.name}, " in printed(each)


@pytest.mark.parametrize(
    ("device", "overrides", "told"),
    [
        (None, (), "rule 1 by PyTorch's CPU flash kernel, rules 2 and 3 by "),
        ("H100", (), "rule 1 by cuDNN 9.15, rules 2 and 3 by "),
        ("H100", ("data.documents=isolate",), "rule 1 by FlashAttention-2, rules 2 and 3 by "),
        ("H100", ("engine.flash_attention=3",), "rule 1 by FlashAttention-3, rules 2 and 3 by "),
        ("B200", ("model=vanilla",), "cuDNN 9.15"),
        ("RTX 4090", ("model=naive_repeat",), "FlashAttention-2"),
        ("H200", ("engine.precision=fp32", "model=vanilla"), "PyTorch's memory-efficient kernel"),
        ("MI300X", (), None),
    ],
)
def test_the_kernels_of_attention_are_told_for_the_device(
    device: str | None, overrides: tuple[str, ...], told: str | None
) -> None:
    plan = plan_of(EAGER, *overrides, **({"device": device} if device else {}))
    assert plan.to_json()["attention"] == plan.attention
    if told is None:
        assert plan.attention is None
    else:
        assert plan.attention is not None
        assert plan.attention.startswith(told)
        assert f"attention       │ {told}" in printed(plan)


def test_the_plan_says_what_the_memory_of_a_device_has_chosen() -> None:
    plan = plan_of("size=1b2", "model.K=3", EAGER, device="H100")
    told = "chosen for it engine.activation_checkpointing=selective: at most 90% of the device"
    assert told in " ".join(printed(plan).replace("│", " ").split())
    assert plan.to_json()["activation_checkpointing"] == "selective"
    rows = plan_of("size=1b2", "model.K=3", EAGER, "train.micro_batch=auto", device="H100")
    assert rows.chosen == {"train.micro_batch": 2, "engine.activation_checkpointing": "none"}
    assert rows.to_json()["micro_batch"] == 2
    assert "in 512 forward passes" in printed(rows)
    assert "chosen for it" not in printed(plan_of())


def test_ranks_share_the_batch_the_memory_and_the_time() -> None:
    one, eight = (plan_of(*SHAPE, device="H100", processes=n) for n in (1, 8))
    assert eight.memory.moments == one.memory.moments // 8
    assert eight.time_s == pytest.approx(one.time_s / 8)
    hours = [plan.to_json()["device_hours"] for plan in (one, eight)]
    assert hours[0] == pytest.approx(hours[1])
    assert "1 forward pass on each of 8 ranks" in printed(eight)


def test_what_muon_takes_is_told_and_slows_the_assumed_speed() -> None:
    given = ("run.dir=/nowhere", EAGER)
    adamw, plan = (plan_of(*given, f"optim={kind}", device="H100") for kind in ("adamw", "muon"))
    matrices = adamw.parameters["attention"] + adamw.parameters["feed-forward"]
    one, eight = plan.optimizer, optimizer_cost(plan.config, torch.bfloat16, 8, shards=8)
    assert one is not None
    assert eight is not None
    assert one.parameters == matrices
    assert one.busiest == one.flops == eight.flops
    assert one.flops / 8 <= eight.busiest < one.flops / 4
    # Of a shard of 1/8 in bf16, 7/8 come from others, on the way there and on the way back.
    assert (one.received, eight.received) == (0, 2 * 2 * matrices // 8 * 7 // 8)
    assert plan.memory.moments == adamw.memory.moments - 4 * matrices
    assert plan.disk.checkpoint == adamw.disk.checkpoint - 4 * matrices
    step = plan.config.train.tokens_per_step * plan.compute.flops
    assert plan.flops == adamw.flops
    assert plan.time_s == pytest.approx(adamw.time_s * (1 + one.flops / step))
    assert plan.to_json()["optimizer"]["flops"] == one.flops
    assert "FLOPs a step of Newton-Schulz, 22 % of the training FLOPs" in printed(plan)
    told = printed(replace(plan, world_size=8, optimizer=eight, config=load(["optim=muon"])))
    received = byte_size(eight.received)
    assert f"the busiest of 8 ranks has 17 % of them, and each receives {received}" in told
    assert adamw.optimizer is None
    assert "Newton" not in printed(adamw)


@pytest.mark.parametrize(
    ("overrides", "given", "told"),
    [
        (["engine.device=cpu"], {"device": "H100"}, "device='H100': engine.device=cpu trains on"),
        ([], {"device": "K80"}, "device='K80': expected one of A100-40GB, A100, H100 PCIe, H100,"),
        ([], {"device": "H100", "mfu": 0.0}, "mfu=0.0: expected a number above 0, at most 1"),
        ([], {"device": "H100", "mfu": 40.0}, "mfu=40.0: expected a number above 0, at most 1"),
        ([], {"mfu": 0.4}, "mfu=0.4: this device's peak is not known"),
        ([], {"processes": 0}, "processes=0: expected an integer of at least 1"),
        ([], {"processes": 3}, "data.lanes=8: not divisible by the 3 ranks"),
        ([], {"mfu": 0.4, "measured": "x"}, "measured='x': mfu is given, too"),
        ([], {"measured": "/nowhere"}, "measured='/nowhere': has no metrics.jsonl"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    overrides: list[str], given: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(*overrides, **given)
    assert any(str(problem).startswith(told) for problem in error.value.problems)


# Time


def lines_of(mfu: float | None, per_s: float, flops_per_token: float) -> str:
    """The metrics of a run whose first interval was slow."""
    lines = []
    for n in range(1, 6):
        speed = per_s / (9 if n == 1 else 1)
        line = {
            "step": n,
            "progress/tokens": 100 * n,
            "progress/train_flops": 100 * n * flops_per_token,
            "throughput/tokens_per_s_per_device": speed,
        }
        lines.append(
            line if mfu is None else {**line, "throughput/mfu": mfu / (9 if n == 1 else 1)}
        )
    cut = '{"step": 6, "progress/tok'
    return "".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]) + cut


@pytest.mark.parametrize(
    ("given", "mfu", "basis"),
    [
        ({}, 0.40, "at an assumed MFU of 40%"),
        ({"compile": "false"}, 0.30, "at an assumed MFU of 30%"),
        ({"mfu": 0.55}, 0.55, "at an MFU of 55%, as given"),
        ({"measured": "RUN"}, 0.25, "at an MFU of 25.0%, measured in RUN (4 lines)"),
    ],
    ids=["assumed", "assumed uncompiled", "given", "measured"],
)
def test_time_follows_from_an_mfu_and_its_origin_is_told(
    given: dict[str, Any], mfu: float, basis: str, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines_of(0.25, 1000.0, 5.0))
    given = {k: str(tmp_path) if v == "RUN" else v for k, v in given.items()}
    compiled = given.pop("compile", "auto")
    plan = plan_of("run.dir=/nowhere", f"engine.compile={compiled}", device="H200", **given)
    assert plan.time_s == pytest.approx(plan.flops / (mfu * 989e12))
    assert basis.replace("RUN", str(tmp_path)) in printed(plan)
    assert plan.to_json()["speed"]["mfu"] == mfu


def test_a_device_without_a_known_peak_takes_the_speed_of_an_earlier_run(tmp_path: Path) -> None:
    assert plan_of(f"run.dir={tmp_path}").time_s is None
    assert "time" in printed(plan_of(f"run.dir={tmp_path}"))
    (tmp_path / "metrics.jsonl").write_text(lines_of(None, 1000.0, 5e6))
    plan = plan_of(f"run.dir={tmp_path}")
    assert plan.time_s == pytest.approx(plan.flops / 5e9)
    assert f"5.00e+09 FLOP/s, measured in {tmp_path} (4 lines)" in printed(plan)
    # A speed without an MFU says nothing of another device.
    with pytest.raises(ConfigError, match="has logged no throughput/mfu"):
        plan_of("run.dir=/nowhere", device="H100", measured=str(tmp_path))
    assert "an assumed MFU" in printed(plan_of(f"run.dir={tmp_path}", device="H100"))


DAMAGED = {
    "empty": b"",
    "cut": b'{"step": 1, "throu',
    "no UTF-8": b"\xff\xfe\x00",
    "no objects": b"[1, 2]\nnull\n3\n",
    "no numbers": b'{"throughput/tokens_per_s_per_device": "x", "progress/tokens": null}',
    "zeros": b'{"throughput/tokens_per_s_per_device": 0, "progress/tokens": 9, '
    b'"progress/train_flops": 9}',
    "not a number": b'{"throughput/tokens_per_s_per_device": NaN, "progress/tokens": 9, '
    b'"progress/train_flops": 9}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_metrics_that_say_nothing_of_the_speed_are_no_speed(damage: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(DAMAGED[damage])
    assert measure(tmp_path / "metrics.jsonl") is None


@pytest.mark.parametrize("content", [b"", b"no tokenizer"])
def test_a_damaged_tokenizer_of_the_run_is_no_reason_not_to_plan(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    [found] = look_at_text(load([CPU, f"run.dir={tmp_path}"])).sources.values()
    assert "at an assumed 3.2 bytes a token" in found.basis


def test_a_runs_own_metrics_give_its_speed(config, trained) -> None:
    settings = config("train.max_steps=4")
    run = trained(settings).run
    found = measure(run.directory / "metrics.jsonl")
    assert found is not None
    assert (found.lines, found.mfu) == (3, None)
    plan = make_plan(settings)
    assert plan.time_s == pytest.approx(plan.flops / found.flops_per_s)


# Disk


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "steps"),
    [(2, 2, 0, 6), (2, 1, 4, 9), (0, 3, 0, 4), (3, 1, 2, 13)],
)
def test_the_checkpoints_of_a_run_take_what_the_plan_says(
    every: int, keep: int, keep_every: int, steps: int, config
) -> None:
    settings = config(
        f"checkpoint.every={every}",
        f"checkpoint.keep={keep}",
        f"checkpoint.keep_every={keep_every}",
        f"train.max_steps={steps}",
        "model.vocab_size=20000",  # so that weights are most of it
    )

    class Count:
        every = 1
        most = 0

        def __call__(self, record: StepRecord) -> Metrics:
            if record.ending or (every and record.step % every == 0):  # a save comes next
                run.store.wait()
                self.most = max(self.most, 1 + len([*run.store.root.glob("step_*")]))
            return {}

    with open_run(settings, Console(file=io.StringIO())) as run:
        count = Count()
        train(replace(run, hooks=(count, *run.hooks)), Progress(disable=True))
    disk = make_plan(settings).disk
    assert disk.most == count.most
    newest = run.store.newest().path
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert 0 <= size - disk.checkpoint < 400_000  # besides tensors, whatever their number


# Text


MIXED = (
    "data=[python,python_packages]",
    "data.sources.python.weight=3",
    "train.max_tokens=8192000",
)


def test_epochs_are_told_for_each_source_and_too_many_are_warned_of() -> None:
    text = Text(
        {
            "python": SourceText(1e6, "counted"),
            "python_packages": SourceText(None, "not known: [x]"),
        }
    )
    plan = plan_of(*MIXED, text=text)
    assert plan.drawn == pytest.approx({"python": 6144000, "python_packages": 2048000})
    assert plan.epochs == pytest.approx({"python": 6.144})
    told = "python 6.1 of about 1M tokens (counted); python_packages not known: [x]"
    assert told in printed(plan)
    [warning] = plan.warnings
    assert warning.startswith("data.sources.python: the run reads 6.14M tokens of it")
    assert "all of it 6.1 times" in warning
    phased = plan_of(
        *MIXED,
        "data.phases.late.after_tokens=4096000",
        "data.phases.late.weights.python=0",
        text=text,
    )
    assert phased.drawn == pytest.approx({"python": 3072000, "python_packages": 5120000})
    assert phased.warnings == ()


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (3, True), (7, False), (9, False)])
def test_a_source_that_ends_before_the_run_is_warned_of(epochs: int, warned: bool) -> None:
    text = Text({"python": SourceText(1e5, "counted"), "python_packages": SourceText(1e9, "")})
    settings = (*MIXED, f"data.sources.python.epochs={epochs}", "train.max_tokens=819200")
    plan = plan_of(*settings, text=text)
    ends = [w for w in plan.warnings if w.startswith(f"data.sources.python.epochs={epochs}: ")]
    assert bool(ends) == warned
    if warned:
        assert f"ends after about {epochs}00k tokens of the 614k" in ends[0]


def test_the_size_of_a_text_comes_from_its_files_and_its_tokenizer(config, trained) -> None:
    settings = config("train.max_steps=1")
    path = Path(settings.data.sources["files"].patterns[0])
    assumed = look_at_text(replace(settings, run=replace(settings.run, dir="/nowhere")))
    expected = path.stat().st_size / 3.2 * 0.8
    assert assumed.sources["files"].tokens == pytest.approx(expected)
    assert "at an assumed 3.2 bytes a token" in assumed.sources["files"].basis
    run = trained(settings).run
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(run.tokenizer.encode_document(text)) for text in texts)
    found = look_at_text(settings).sources["files"]
    assert "bytes a token of its tokenizer" in found.basis
    assert found.tokens == pytest.approx(tokens * 0.8, rel=0.3)  # JSON's own characters count, too
    write_tokens(run.directory / "tokens", [texts], run.tokenizer)
    counted = load(["data=tokens", f"data.sources.tokens.path={run.directory / 'tokens'}", CPU])
    source = look_at_text(counted).sources["tokens"]
    assert source == SourceText(tokens * 0.98, "counted when they were written")


ON_THE_HUB = {
    "data=fineweb_edu": 10e9,
    "data=fineweb_edu data.sources.fineweb_edu.paths=hf://datasets/HuggingFaceFW/fineweb-edu@v1.2.0/"
    "sample/100BT": 100e9,
    "data=c4": 156e9,
    "data=olmo_mix": 3.70e12,
    "data=c4 data.sources.c4.paths=hf://datasets/allenai/c4/en/c4-train.0000*.json.gz": None,
    "data=c4 data.sources.c4.paths=https://127.0.0.1:9/x.jsonl": None,
}


@pytest.mark.parametrize("overrides", ON_THE_HUB)
def test_no_server_is_asked_for_the_size_of_a_text(overrides: str) -> None:
    first, *_ = look_at_text(load([CPU, *overrides.split()])).sources.values()
    assert first.tokens == ON_THE_HUB[overrides]
    assert ("not known" in first.basis) == (first.tokens is None)


def test_a_text_that_is_not_there_is_no_reason_not_to_plan() -> None:
    settings = ["data=files", "data.sources.files.paths=/nowhere/x.jsonl", "data.documents=isolate"]
    text = look_at_text(load([CPU, *settings]))
    assert text.rows == 0
    plan = plan_of(*settings, text=text)
    assert plan.epochs == {}
    assert "files not known: it cannot be looked at here" in printed(plan)
    assert f"at most {plan.flops:.2e} FLOPs" in printed(plan)


def test_files_without_a_byte_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    settings = ["data=files", f"data.sources.files.paths={tmp_path}/a.jsonl"]
    plan = plan_of(*settings, text=look_at_text(load([CPU, *settings])))
    assert plan.epochs == {}
    assert "files has no text" in printed(plan)


def test_what_is_true_of_all_sources_is_told_once() -> None:
    text = look_at_text(load([CPU, "data=olmo_mix"]))
    row = printed(plan_of("data=olmo_mix", text=text))
    assert row.count("as the dataset's page counts them") == 1
    assert row.count(" of about ") == len(text.sources) == 7


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize("documents", ["isolate", "concatenate"])
def test_the_planned_flops_are_those_that_a_run_counts(
    documents: str, packing: str, config, trained
) -> None:
    settings = config(
        f"data.documents={documents}", f"data.packing={packing}", "model.K=3", "train.max_steps=12"
    )
    before = make_plan(settings, text=look_at_text(settings))
    record = trained(settings).record
    plan = make_plan(settings, text=look_at_text(settings))
    if (documents, packing) == ("concatenate", "sequential"):
        assert plan.compute.basis == "exact"
        assert plan.flops == before.flops == record.flops
        return
    assert before.compute.basis == plan.compute.basis == "sampled"
    assert plan.flops == pytest.approx(record.flops, rel=0.03)
    bound = make_plan(settings)
    assert bound.compute.basis == "at most"
    assert bound.flops > record.flops
    assert "at most" in printed(bound)
    assert "about" in printed(plan)


def test_where_it_compiles_and_keeps_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept/here")
    told = "the first step takes up to a minute longer"
    for compile, (on_cpu, on_cuda) in {
        "auto": (False, True),
        "true": (True, True),
        "false": (False, False),
    }.items():
        settings = ("model=vanilla", "model.layers=1", f"engine.compile={compile}")
        here, there = plan_of(*settings), plan_of(*settings, device="H100")
        assert (here.compiled, there.compiled) == (on_cpu, on_cuda)
        for plan in (here, there):
            assert (told in printed(plan)) == ("/kept/here" in printed(plan)) == plan.compiled
    zero = ("model=vanilla", "model.layers=1", "engine=deepspeed")
    assert not plan_of(*zero, "engine.stage=3", device="H100").compiled
    assert plan_of(*zero, device="H100").compiled


# The command


def test_the_command_writes_json_for_every_job_of_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py", "-m", "model.K=2,3", "device=H100", "--json"])
    with pytest.raises(SystemExit) as end:
        compose.run_with(PlanArguments, "train.plan", sweeps=True)
    assert end.value.code == 0
    text, plans = capsys.readouterr().out, []
    while text.strip():
        plan, length = json.JSONDecoder().raw_decode(text.lstrip())
        plans.append(plan)
        text = text.lstrip()[length:]
    two, three = plans
    assert (two["name"], three["name"]) == ("phd_cswa-2-16-32-tiny", "phd_cswa-3-16-32-tiny")
    assert three["flops"] > two["flops"] > 1e13
    for plan in plans:
        assert plan["device"]["name"] == "H100"
        assert plan["device"]["dtype"] == "bfloat16"
        assert plan["memory"]["total"] == sum(plan["memory"].values()) - plan["memory"]["total"]
        assert plan["sources"]["python"]["epochs"] == pytest.approx(0.25, abs=0.15)
        assert plan["speed"]["basis"] == "an assumed MFU of 40%"
        assert plan["time_s"] == pytest.approx(plan["flops"] / (0.4 * 989e12))
        assert plan["compiled"]
        assert plan["warnings"] == []


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("proceses=2", ["proceses: unknown group or key. Did you mean processes?"]),
        ("devise=H100", ["devise: unknown group or key. Did you mean device?"]),
        ("mfu=40 modl=phd", ["mfu=40.0: expected a number above 0", "Did you mean model?"]),
        ("device=K80 train.max_flops=0", ["device='K80': expected", "train.max_flops=0.0: "]),
    ],
)
def test_wrong_arguments_and_wrong_settings_are_told_together(
    typed: str,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *typed.split()])
    with pytest.raises(SystemExit) as end:
        compose.run_with(PlanArguments, "train.plan", sweeps=True)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"{plural(len(told), 'problem')} in the configuration:")
    assert all(part in text for part in told)
