"""Claims about `train.compose`: what Hydra's overrides become, and what is refused how."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from tests.forked_python import forked_python
from train import compose, conf_files
from train.compose import CONF, check, load
from train.config import Config
from train.overrides import chosen, parse_overrides
from train.sweeps.sweep import Launcher

# What an entry point looks like; a job with seed 3 fails, and those up to 9 in other ways.
SCRIPT = """
import logging, os
from conf.errors import ConfigError, Problem, TransientError
from train.compose import other_runs, run

def main(config):
    print(config.name, config.run_dir, logging.getLogger().handlers, os.getcwd())
    if config.seed == 2:
        print([" ".join(arguments) for arguments in other_runs(config)])
    match config.seed:
        case 4:
            raise KeyError("a fault of the program")
        case 5:
            raise ConfigError([Problem("seed", 5, "refused"), Problem("seed", 5, "twice")])
        case 6:
            raise TransientError("a server is gone")
        case 7:
            return 75
        case 8:
            raise KeyboardInterrupt
        case 9:
            return 130
    return 3 if config.seed == 3 else 0

if __name__ == "__main__":
    run(main)
"""


# An entry point with an argument of its own.
OWN = """
from dataclasses import dataclass
from conf.errors import Problem
from train.compose import run_with

@dataclass(frozen=True, kw_only=True)
class Arguments:
    \"\"\"Arguments of the demo.\"\"\"
    out: str
    parts: int = 3

    def problems(self):
        return [] if self.parts > 0 else [Problem("parts", self.parts, "expected more")]

def main(given, config):
    print(given.out, given.parts, config.name)
    return given.parts

if __name__ == "__main__":
    run_with(Arguments, main)
"""


def problems(*overrides: str, multirun: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        check(overrides, multirun=multirun)
    return list(map(str, refusal.value.problems))


def script(folder: Path, *arguments: str, code: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Runs a small entry point that lies in, and is started from, a folder far from `conf/`."""
    (folder / "demo.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(CONF.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "demo.py", *arguments]
    with forked_python():
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_everything_wrong_with_a_command_line_is_told_at_once() -> None:
    found = problems(
        "model=phd_csw",
        "modle=phd",
        "K=3",
        "model.windw=3",
        "+model.K=0",
        "++train.seq_len=8192",
        "hooks.sample.prompt=def f(x):",
        "optim.betas=0.9,0.95",
        "train.global_batch=10",
    )
    assert found[0].startswith("model=phd_csw: expected one of free_pause, hidden_decoding, loop,")
    assert found[0].endswith(". Did you mean phd_cswa?")
    assert found[1:3] == [
        "modle: unknown group or key. Did you mean model?",
        "K: unknown group or key. Did you mean model.K?",
    ]
    assert found[3].startswith("'hooks.sample.prompt=def f(x):': not key=value as Hydra reads it")
    assert found[4:7] == [
        (
            "optim.betas=0.9,0.95: several values make a sweep, which needs -m; "
            "a list is 'optim.betas=[0.9,0.95]'"
        ),
        "model.windw: unknown key. Did you mean model.window?",
        "model.K=0: expected an integer of at least 1",
    ]
    assert [line.partition(":")[0] for line in found[7:]] == [
        "train.global_batch=10",
        "train.seq_len=8192",
    ]


@pytest.mark.parametrize(
    ("override", "wording"),
    [
        (
            "size=13b",
            "size=13b: expected one of 151m, 16m, 1b2, 1m3, 2m6, 34m,",
        ),
        (
            "experiment=null",
            "experiment=null: expected one of anneal, hybridnorm_1b2, paper_151m, paper_1b2,",
        ),
        ("zzzzz=1", "zzzzz: unknown group or key; the groups are data, engine, experiment,"),
        ("run=runs/x", "run='runs/x': expected settings such as run.name"),
        ("model", "'model': not key=value as Hydra reads it"),
        ("run.name=${x}", "Interpolation key 'x' not found"),
        ("~model.foo", "Could not delete from config. 'model.foo' does not exist."),
        ("model={K: 0}", "model.K=0: expected an integer of at least 1"),
    ],
)
def test_an_override_that_cannot_be_followed_is_one_line(override: str, wording: str) -> None:
    [problem] = problems(override)
    assert problem.startswith(wording)
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data=files", "data.sources.files.path=x"], "files.path: unknown key. * files.paths?"),
        (
            ["data=tokens", "data.sources.tokens.paths=x"],
            "tokens.paths: unknown key. * tokens.path?",
        ),
        (["data=files", "data.sources.file.paths=x"], "file: has no kind. * files?"),
        (["data=[python,c4]", "data.sources.pyton.weight=2"], "pyton: has no kind. * python?"),
        (
            ["data=c4", "data.sources.c4.separators=x"],
            "c4.separators: unknown key. * c4.separator?",
        ),
    ],
)
def test_a_misspelt_key_under_names_of_ones_own_is_recognised(
    overrides: list[str], told: str
) -> None:
    """One problem alone: what the misspelt setting would have given is not missing as well."""
    [problem] = problems(*overrides)
    short = problem.replace("data.sources.", "").replace("Did you mean", "*")
    assert short == told


@pytest.mark.parametrize(
    ("texts", "meant"),
    [
        (["model.K", "3"], "model.K=3"),
        (["model.k", "3"], "model.K=3"),
        (["--model", "phd"], "model=phd"),
        (["--model=phd"], "model=phd"),
        (["--model.K=3"], "model.K=3"),
        (["--optim.lr", "1e-3"], "optim.lr=1e-3"),
        (["-seed=3"], "seed=3"),
        (["\N{EM DASH}model=phd"], "model=phd"),
        (["model.K=", "3"], "model.K=3"),
        (["model.K", "=3"], "model.K=3"),
        (["model.K:3"], "model.K=3"),
        (["phd_swa"], "model=phd_swa"),
        (["tiny"], "size=tiny"),
        (["data.sources.python.weight", "2"], "data.sources.python.weight=2"),
        (["--engine.compile"], "engine.compile=VALUE"),
        (["hooks.sample.prompt", "a b"], "hooks.sample.prompt='a b'"),
    ],
)
@pytest.mark.parametrize("others", [[], ["train.max_steps=7"]], ids=["alone", "beside"])
def test_another_commands_form_of_a_setting_is_answered_with_ours(
    texts: list[str], meant: str, others: list[str]
) -> None:
    [problem] = problems(*others, *texts, *others)
    assert problem.startswith(f"{' '.join(texts)}: a setting is key=value")
    assert problem.endswith(f". Did you mean {meant}?")


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--mutlirun", "Did you mean --multirun?"),
        ("--explian", "Did you mean --explain?"),
        ("--foo", "--help lists options and settings"),
        ("-x", "--help lists options and settings"),
    ],
)
def test_an_option_that_there_is_not_is_told(option: str, hint: str) -> None:
    [problem] = problems(option, "model.K=3")
    assert problem.startswith(f"{option}: unknown option")
    assert problem.endswith(hint)


def test_a_setting_cannot_be_one_of_hydras() -> None:
    """They are one thing where a command is checked, and another in its jobs."""
    with pytest.raises(ConfigError, match=r"hydra\.job\.name"):
        load(["run.name=${hydra.job.name}"])
    assert load(["run.name=${model.variant}-x"]).name == f"{load([]).model.variant}-x"


@pytest.mark.process
def test_what_is_typed_reaches_the_check_in_its_order(tmp_path: Path) -> None:
    done = script(tmp_path, "--model", "phd", "model.K", "3", "-m", "seed=1,2", "--cfg", "job")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        "  --model phd: a setting is key=value, without dashes. Did you mean model=phd?",
        "  model.K 3: a setting is key=value. Did you mean model.K=3?",
    ]


def test_a_misspelt_key_or_source_of_a_phase_is_recognised() -> None:
    start = ["data=[python,c4]", "data.phases.anneal.after_tokens=400"]
    [key] = problems(*start, "data.phases.anneal.weight.c4=1")
    assert key.endswith("weight.c4: unknown key. Did you mean data.phases.anneal.weights.c4?")
    [source] = problems(*start, "data.phases.anneal.weights={pyhton: 1}")
    assert source.endswith("expected one of python, c4. Did you mean python?")


def test_a_plus_makes_no_difference() -> None:
    plain = load(["model=phd", "model.K=3", "hooks=quiet"])
    assert load(["+model=phd", "++model.K=3", "+hooks=quiet"]) == plain
    assert (plain.model.variant, plain.model.K, plain.hooks.console) == ("phd", 3, False)


def test_a_list_of_data_is_a_mixture() -> None:
    config = load(["data=[fineweb_edu,python]", "data.sources.python.weight=0.1"])
    assert list(config.data.sources) == ["fineweb_edu", "python"]
    assert config.data.mixture == [(0, {"fineweb_edu": 1.0, "python": 0.1})]
    [alone, both] = check(["data=c4,[c4,olmo_mix]"], multirun=True).jobs
    assert list(alone.data.sources) == ["c4"]
    assert list(both.data.sources)[:2] == ["c4", "dclm"]


def test_a_deleted_key_has_its_default() -> None:
    assert load(["experiment=smoke", "~eval.rows"]).eval.rows == load().eval.rows


def test_a_sweep_is_the_product_of_what_varies() -> None:
    command = check(["model.K=2,3", "optim.lr=1e-3,4e-3", "seed=4"], multirun=True)
    assert command.swept == {"model.K", "optim.lr"}
    assert [job.name for job in command.jobs] == [
        f"phd_cswa-{K}-16-32-tiny-seed_4-lr_{lr}" for K in (2, 3) for lr in ("0.001", "0.004")
    ]
    assert {job.seed for job in command.jobs} == {4}


def test_a_named_sweep_says_everything_that_varies() -> None:
    jobs = check(["run.name=mine", "model.K=2,3", "data=python,c4"], multirun=True).jobs
    assert [job.name for job in jobs] == [
        f"mine-K_{K}-data_{data}" for K in (2, 3) for data in ("python", "c4")
    ]


def test_the_command_line_replaces_what_a_shipped_sweep_varies() -> None:
    jobs = check(["sweep=window", "model.window=3,5"], multirun=True).jobs
    assert [job.model.window for job in jobs] == [3, 5]


def test_several_sweeps_are_their_product() -> None:
    jobs = check(["+sweep=chunk", "++sweep=seeds", "optim.lr=1e-3,1e-2"], multirun=True).jobs
    found = [(job.model.name, job.seed, job.optim.lr) for job in jobs]
    models = ("phd_cswa-2-16-16", "phd_cswa-2-16-32", "phd_swa-2-16-inf")
    assert found == list(product(models, (0, 1, 2), (1e-3, 1e-2)))


def test_a_sweep_that_is_named_twice_counts_once() -> None:
    for typed in (["+sweep=lr", "sweep=lr"], ["sweep=[lr]"], ["sweep=[lr,lr]", "++sweep=lr"]):
        overrides, found = parse_overrides(typed, [])
        assert ([names for o in overrides.values() for names in chosen(o)], found) == (["lr"], [])


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("sweep=k,lr", "sweep='k,lr': expected one sweep; +sweep=k +sweep=lr is the product"),
        ("+sweep=k +sweep=chunk", "both sweep=k and sweep=chunk vary model; run one after"),
        ("+sweep=variants +sweep=ablations", "both sweep=variants and sweep=ablations vary"),
        ("+sweep=k +sweep=window", "model.window=1: model.variant=vanilla has no window"),
        ("sweep=[k,lrr]", "sweep=lrr: expected one of ablations, chunk, k,"),
    ],
)
def test_sweeps_that_do_not_fit_together_are_refused(typed: str, told: str) -> None:
    assert any(told in problem for problem in problems(*typed.split(), multirun=True))


@pytest.mark.parametrize(("processes", "launcher"), [(1, Launcher.NONE), (2, Launcher.POOL)])
def test_a_pool_of_one_process_is_none(processes: int, launcher: Launcher) -> None:
    typed = ["seed=0,1", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={processes}"]
    assert check(typed, multirun=True).launcher == launcher


@pytest.mark.parametrize(
    ("typed", "both"), [("size variants", "model.variant and model.K"), ("ablations k", "model.K")]
)
def test_two_sweeps_of_the_same_settings_are_one_problem(typed: str, both: str) -> None:
    one, other = typed.split()
    [problem] = problems(f"+sweep={one}", f"+sweep={other}", "seed=0,1", multirun=True)
    told = f"both sweep={one} and sweep={other} vary {both}; run one after the other"
    assert problem == f"sweep='{one},{other}': {told}"


def test_settings_vary_together() -> None:
    points = "together={model.K: 3, optim.lr: 1e-3},{model.K: 5, model: {norm: pre}}"
    jobs = check([points, "seed=0,1", "model.window=4"], multirun=True).jobs
    assert [(j.model.K, j.optim.lr, j.model.norm, j.seed, j.model.window) for j in jobs] == [
        *((3, 1e-3, "reordered", seed, 4) for seed in (0, 1)),
        *((5, 3e-3, "pre", seed, 4) for seed in (0, 1)),
    ]
    named = check(["run.name=mine", points], multirun=True).jobs
    assert [job.name for job in named] == ["mine-K_3-lr_0.001", "mine-K_5-model_norm_pre"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("together={model.K:2},{model.K:4} model.K=3", ["model.K=3: the sweep sets it with"]),
        ("together={model.flops_of:phd-3} model.layers=3", ["model.layers=3: the sweep sets it"]),
        ("together={model.K:2},4", ["together=4: expected the settings of each run"]),
        (
            "together={model.k:2},{train.seq_len:0}",
            ["model.k: unknown key. Did you mean model.K?", "train.seq_len=0: expected an integer"],
        ),
        ("model=vanilla model.flops_of=phd-x", ["model.flops_of='phd-x': expected vanilla, or"]),
        ("together={model.variant:phd,model.window:4}", ["model.window=4: model.variant=phd has"]),
    ],
)
def test_what_cannot_vary_together_is_told(typed: str, told: list[str]) -> None:
    found = problems(*typed.split(), multirun=True)
    assert [line[: len(text)] for line, text in zip(found, told, strict=True)] == told


def test_one_wrong_job_stops_a_sweep_before_the_first() -> None:
    assert sorted(problems("model.K=2,0", "seed=1,-2", multirun=True)) == [
        "model.K=0: expected an integer of at least 1",
        "seed=-2: expected an integer of at least 0",
    ]


def test_a_swept_section_is_a_readable_part_of_the_name() -> None:
    points = "model={K: 2, norm: pre},{K: 3, norm: hybrid}"
    jobs = check(["run.name=mine", points], multirun=True).jobs
    assert [job.model.norm for job in jobs] == ["pre", "hybrid"]
    assert [job.name for job in jobs] == ["mine-model_K_2_norm_pre", "mine-model_K_3_norm_hybrid"]


@pytest.mark.parametrize("override", ["run.dir=here", "run.dir=runs/one"])
def test_jobs_of_a_sweep_never_share_a_directory(override: str) -> None:
    [problem] = problems(override, "model.chunk=16,32", multirun=True)
    assert problem.startswith("run.dir=")
    assert "2 jobs of this sweep would share it" in problem


@pytest.mark.process
def test_a_wrong_command_ends_with_one_screen_and_code_2(tmp_path: Path) -> None:
    done = script(tmp_path, "modle=phd", "model.K=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "2 problems in the configuration:\n"
        "  modle: unknown group or key. Did you mean model?\n"
        "  model.K=0: expected an integer of at least 1\n"
    )
    assert files(tmp_path) == ["demo.py"]


@pytest.mark.process
def test_a_job_gets_its_config_and_hydra_leaves_nothing_behind(tmp_path: Path) -> None:
    done = script(tmp_path, "model.K=3", "run.dir=here")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"phd_cswa-3-16-32-tiny here [] {tmp_path}\n"
    assert files(tmp_path) == ["demo.py"]


@pytest.mark.process
def test_a_crash_is_told_by_its_traceback_alone(tmp_path: Path) -> None:
    done = script(tmp_path, "seed=4", "run.dir=here")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("KeyError: 'a fault of the program'\n")
    assert "run.dir" not in done.stderr


@pytest.mark.process
def test_a_run_of_a_sweep_that_fails_is_told_at_once_and_listed_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    done = script(tmp_path, "optim.lr=1e-3", "-m", "seed=3,4,5,6,1,2")
    names = [f"phd_cswa-2-16-32-tiny-seed_{seed}-lr_0.001" for seed in (3, 4, 5, 6, 1, 2)]
    *lines, proposed = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == names
    # Of the last one alone: what is varied has the value that it had there.
    own = "optim.lr=0.001 seed=2"
    assert proposed == str([f"model=vanilla {own}", f"-m +sweep=k {own}"])
    told, listed = done.stderr.split("4 of 6 runs of this sweep failed:\n")
    assert f"{names[0]} ended with exit code 3\n" in told
    assert f"{names[1]} crashed:\nTraceback (most recent call last):\n" in told
    assert f"{names[2]} failed: 2 problems in the configuration:\n  seed=5: refused\n" in told
    assert f"{names[3]} failed: failed for now, the same command may go on later:\n" in told
    assert [told.index(name) for name in names[:4]] == sorted(map(told.index, names[:4]))
    assert listed.splitlines() == [
        f"  {names[0]}: it ended (exit code 3)",
        f"  {names[1]}: KeyError: 'a fault of the program' (exit code 1)",
        f"  {names[2]}: seed=5: refused seed=5: twice (exit code 2)",
        f"  {names[3]}: a server is gone (exit code 75)",
    ]
    assert done.returncode == 1


@pytest.mark.process
@pytest.mark.parametrize(("seed", "code"), [(7, 75), (8, 130), (9, 130)])
def test_a_run_that_is_told_to_end_ends_its_sweep(seed: int, code: int, tmp_path: Path) -> None:
    done = script(tmp_path, "-m", f"seed=5,{seed},1")
    ran = [line.split()[0].rpartition("_")[2] for line in done.stdout.splitlines()]
    assert ran == ["5", str(seed)]
    assert "1 of 3 runs of this sweep failed:" in done.stderr
    assert done.returncode in (code, -2 if code == 130 else code)  # Python dies of its own SIGINT


@pytest.mark.process
def test_cfg_job_shows_every_setting(tmp_path: Path) -> None:
    done = script(tmp_path, "--cfg", "job", "model.K=3")
    assert (done.returncode, done.stderr) == (0, "")
    shown: Any = OmegaConf.to_container(OmegaConf.create(done.stdout))
    assert Config.from_dict(shown) == load(["model.K=3"])
    assert shown | {"data": {}} == load(["model.K=3"]).to_dict() | {"data": {}}


@pytest.mark.process
def test_a_command_has_arguments_beside_the_configuration(tmp_path: Path) -> None:
    done = script(tmp_path, "model=phd", "out=a=b", "parts=0x2", "model.K=3", code=OWN)
    assert (done.returncode, done.stdout) == (2, "")
    done = script(tmp_path, "model=phd", "out=a=b", "parts=5", "model.K=3", code=OWN)
    assert (done.returncode, done.stdout, done.stderr) == (5, "a=b 5 phd-3-tiny\n", "")


@pytest.mark.process
def test_what_is_wrong_with_both_is_told_at_once(tmp_path: Path) -> None:
    done = script(tmp_path, "parts=0", "out=x", "model.K=0", "ouut=y", code=OWN)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[:2] == ["3 problems in the configuration:", "  parts=0: expected more"]
    assert lines[2:] == [
        "  ouut: unknown group or key. Did you mean out?",
        "  model.K=0: expected an integer of at least 1",
    ]
    assert "out: has to be given" in script(tmp_path, code=OWN).stderr


@pytest.mark.process
def test_help_shows_a_commands_own_arguments(tmp_path: Path) -> None:
    done = script(tmp_path, "--help", code=OWN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Arguments of the demo.\n\n  out=...\n  parts=3\n"


# Settings that change nothing


WINDOW = "has no window; leave it out, or choose model=phd_swa or phd_cswa"
CHUNK = "has no chunks; leave it out, or choose model=phd_cswa"
HEAD = "model.tied=true makes the head the embedding; leave it out, or set model.tied=false"
PEAK = "schedule.kind=constant stays at the peak; leave it out, or choose another schedule"
NO_DECAY = "schedule.kind=cosine has no decay_fraction; leave it out, or choose schedule=wsd"
WARM_UP = (
    "schedule.warmup_tokens=8400000000 says how long the warm-up is; leave it out, or set "
    "schedule.warmup_tokens=null"
)
TRAINED = "the tokenizer of tokenizer.path is trained already; leave it out, or leave out the path"
ONCE = "feeds each token once; leave it out, or choose another variant"
SEE, SWA = "see hidden copies", "leave it out, or choose model=phd_swa"
DECODING = "leave it out, or choose model=hidden_decoding"
NO_MUP = "model.mup_base_dim=null is the standard parametrisation; leave it out, or set "
NO_MUP += "model.mup_base_dim"
UNUSED: dict[str, list[str]] = {
    "model=phd_swa model.chunk=32": [f"model.chunk=32: model.variant=phd_swa {CHUNK}"],
    "model=phd ++model.chunk=8": [f"model.chunk=8: model.variant=phd {CHUNK}"],
    "experiment=paper_550m model.chunk=32": [f"model.chunk=32: model.variant=phd_swa {CHUNK}"],
    "model=naive_repeat model.window=4": [f"model.window=4: model.variant=naive_repeat {WINDOW}"],
    "model={variant: phd, window: 4}": [f"model.window=4: model.variant=phd {WINDOW}"],
    "model=vanilla model.span_unit=token model.copy_positions=flattened": [
        f"model.span_unit='token': model.variant=vanilla {WINDOW}",
        f"model.copy_positions='flattened': model.variant=vanilla {ONCE}",
    ],
    "model=sps model.span_unit=token model.originals_see_hidden=true": [
        f"model.span_unit='token': model.variant=sps counts its window in tokens; {SWA}",
        f"model.originals_see_hidden=true: with model.variant=sps originals always {SEE}; {SWA}",
    ],
    "model=pause model.full_every=2": [
        f"model.full_every=2: all layers of model.variant=pause have one rule; {DECODING}"
    ],
    "model.head_init=fan_in": [f"model.head_init='fan_in': {HEAD}"],
    "model.mup_base_head_dim=32": [f"model.mup_base_head_dim=32: {NO_MUP}"],
    "schedule=constant schedule.final_ratio=0.2": [f"schedule.final_ratio=0.2: {PEAK}"],
    "optim.ns_steps=4 optim.muon_lr=0.02": [
        f"optim.{setting}: optim.kind=adamw orthogonalises nothing; leave it out, or choose "
        "optim=muon for it"
        for setting in ("muon_lr=0.02", "ns_steps=4")
    ],
    "schedule.decay_fraction=0.3": [f"schedule.decay_fraction=0.3: {NO_DECAY}"],
    "size=151m schedule.warmup_fraction=0.1": [f"schedule.warmup_fraction=0.1: {WARM_UP}"],
    "tokenizer=file tokenizer.path=a.model tokenizer.kind=bpe tokenizer.sample_bytes=9": [
        f"tokenizer.{setting}: {TRAINED}" for setting in ("kind='bpe'", "sample_bytes=9")
    ],
}


@pytest.mark.parametrize("line", UNUSED)
def test_a_setting_that_is_typed_and_would_change_nothing_is_refused(line: str) -> None:
    overrides = [line] if "{" in line else line.split()
    assert problems(*overrides) == UNUSED[line]


def test_a_file_or_an_earlier_run_may_hold_what_its_variant_does_not_use() -> None:
    for line in ("model=phd", "experiment=hybridnorm_1b2", "schedule=constant", "size=550m"):
        config = load([line])
        assert config.unused()
        assert Config.from_dict(config.to_dict()) == config


def test_a_sweep_may_share_a_setting_that_some_of_its_members_use() -> None:
    jobs = check(["model=vanilla,phd,phd_cswa", "model.chunk=16"], multirun=True).jobs
    assert [job.name for job in jobs] == ["vanilla-tiny", "phd-2-tiny", "phd_cswa-2-16-16-tiny"]
    assert problems("model=vanilla,phd", "model.chunk=16", multirun=True) == [
        f"model.chunk=16: model.variant={variant} {CHUNK}" for variant in ("vanilla", "phd")
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model=phd,phd_cswa model.window=4,8", "model.window=8: model.variant=phd has no window"),
        ("sweep=window model=phd", "model.window=16: model.variant=phd has no window"),
        (
            "model={variant:phd_swa,chunk:8},{chunk:8}",
            "model.chunk=8: model.variant=phd_swa has no",
        ),
    ],
)
def test_a_sweep_does_not_vary_what_a_member_does_not_use(line: str, told: str) -> None:
    assert any(problem.startswith(told) for problem in problems(*line.split(), multirun=True))


NO_CHUNK = "model.chunk=null: no chunk, which is model=phd_swa\n"


@pytest.mark.parametrize("line", ["model.chunk=null", "model=phd_swa model.chunk=null"])
def test_no_chunk_is_phd_swa_and_that_is_said(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(line.split()) == load(["model=phd_swa"])
    assert capsys.readouterr().err == NO_CHUNK


def test_a_sweep_of_chunks_may_include_none(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = check(["model.chunk=16,32,null"], multirun=True).jobs
    names = ["phd_cswa-2-16-16-tiny", "phd_cswa-2-16-32-tiny", "phd_swa-2-16-inf-tiny"]
    assert [job.name for job in jobs] == names
    assert capsys.readouterr().err == NO_CHUNK


@pytest.mark.parametrize("variant", ["vanilla", "naive_repeat", "phd"])
def test_a_variant_without_chunks_may_be_asked_for_none(
    variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load([f"model={variant}", "model.chunk=null"]) == load([f"model={variant}"])
    assert capsys.readouterr().err == ""


# Advice that is followed

ODD_TEXTS = [
    "a (1).txt",
    "year=2024/a.txt",
    "it's.txt",
    'say "x".txt',
    "https://host/a?x=1&y=2",
    "{a,b}.txt",
    "a;b",
    "<|end|>",
    "a#b",
    "back\\slash=\\",
    'x="\\"y',
    "50%=",
    "a!b",
    "x y=z",
]


def advice(*overrides: str) -> list[str]:
    """The arguments that a shell makes of what the refusal of an override advises."""
    with pytest.raises(ConfigError) as refusal:
        check(["data=files", *overrides])
    [problem] = refusal.value.problems
    typed = str(problem).rpartition("quotes within quotes: ")[2].rpartition("a list is ")[2]
    return shlex.split(typed)


def paths_of(arguments: list[str]) -> Any:
    [config] = check(["data=files", *arguments]).jobs
    return config.data.sources["files"].paths  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_the_advice_for_a_text_with_special_characters_works_when_it_is_followed(text: str) -> None:
    assert paths_of(advice(f"data.sources.files.paths={text}")) == text


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if "," not in text])
def test_the_advice_for_a_list_works_when_it_is_followed(text: str) -> None:
    arguments = advice(f"data.sources.files.paths=[{text}, b c.txt]")
    assert paths_of(arguments) == (text, "b c.txt")


def test_a_list_without_brackets_is_told_how_it_is_written() -> None:
    assert paths_of(advice("data.sources.files.paths=a.txt,b/*.txt")) == ("a.txt", "b/*.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_settings_may_have_a_byte_order_mark_and_another_encoding_is_named(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    text = "sources: {mine: {kind: files, paths: a.txt}}\n"
    (tmp_path / "conf/data/mine.yaml").write_text(text, encoding=encoding)
    for module in (compose, conf_files):
        monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    if encoding == "utf-8-sig":
        assert list(load(["data=mine"]).data.sources) == ["mine"]
    else:
        with pytest.raises(
            ConfigError, match=rf"mine\.yaml: {encoding.upper()}, not UTF-8: convert"
        ):
            load(["data=mine"])


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["model=vanilla", "size=16m", "train.max_steps=9"],
        ["model.K=3", "model=phd", "model.window=4", "seed=5", "model.K=2"],
        ["data=files", "data.sources.files.paths=[a,b]", "++data.sources.files.extra={x: 1}"],
        ["data=files", "~data.sources.files.paths"],
        ["sweep=[k]", "++together={model.K: 3}"],
        ["engine=deepspeed", "engine.deepspeed.zero_optimization.stage=1"],
        ["size=16m", "schedule=constant", "model=vanilla", "data=files", "train.max_steps=9"],
        ["schedule=none", "model=none", "data=none"],
        ["model=vanilla", "schedule=wsd", "model=phd"],
        ["model=vanilla", "model=phd", "model=vanilla"],
        ["+schedule@mine=wsd", "+model@yours=phd", "model.K=3"],
        ["model.K=3", "++model={variant: vanilla, K: 1}", "model.layers=3", "seed=7"],
        ["model.K=3", "train={max_steps: 3}", "train.seq_len=4"],
        ["train.seq_len=4", "train={seq_len: 3}"],
        ["hydra.sweep.dir=${hydra.job.override_dirname}", "model.K=3"],
        ["model.unknown=3"],
        ["model.K.deeper=3"],
        ["model@other=phd"],
        ["model=no_such_file", "model.K=3"],
        ["~optim", "optim.lr=1"],
        ["~model.nothing"],
    ],
    ids=" ".join,
)
def test_settings_on_top_of_files_that_were_read_are_set_as_hydra_sets_them(
    texts: list[str],
) -> None:
    """Also where settings were set in a copy of the same files before."""
    with compose._composing():
        for _ in range(2):
            assert composed(compose.compose_tree, texts) == composed(as_hydra, texts)


def as_hydra(texts: list[str]) -> DictConfig:
    return hydra.compose("config", texts, return_hydra_config=True)


def composed(function: Callable[[list[str]], DictConfig], texts: list[str]) -> Any:
    """All settings, Hydra's own too, in their order; or what is wrong with them."""
    try:
        tree = function(texts)
    except (HydraException, OmegaConfBaseException) as error:
        return type(error), str(error)
    # Choices are told in the order of the files, of which that of groups makes a difference.
    tree.hydra.runtime.choices = dict(sorted(tree.hydra.runtime.choices.items()))
    return OmegaConf.to_yaml(tree)


def test_a_file_that_has_changed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    for module in (compose, conf_files):
        monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    (tmp_path / "conf/experiment/.#mine.yaml").symlink_to("nowhere")  # while it is being edited
    for steps in (7, 77):
        (tmp_path / "conf/experiment/mine.yaml").write_text(
            f"# @package _global_\ntrain: {{max_steps: {steps}}}\n"
        )
        assert load(["experiment=mine"]).train.max_steps == steps
