"""Claims about `train.run_dir.name`: a default name says what makes a run another run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from train.compose import check, load
from train.config import Config
from train.run_dir.name import LONGEST, holds, identity

TINY = "phd_cswa-2-16-32-tiny"
FILES = ["data=files", "data.sources.files.paths=uni.jsonl"]

NAMES = {
    TINY: [],
    "phd_cswa-2-16-32-smoke": ["experiment=smoke"],
    "phd_cswa-2-16-32-550m": ["size=550m"],
    "phd_swa-2-16-inf-550m-olmo_mix": ["experiment=paper_550m"],
    f"{TINY}-dim_64-lr_0.001": ["optim.lr=1e-3", "model.dim=64"],
    f"{TINY}-files-paths_uni.jsonl": FILES,
    f"{TINY}-files-paths_uni.jsonl-16fd851a": [
        "data=files",
        "data.sources.files.paths=c/uni.jsonl",
    ],
    f"{TINY}-fineweb_edu": ["data=fineweb_edu"],
    f"{TINY}-c4+python-python.weight_0.1": ["data=[c4,python]", "data.sources.python.weight=0.1"],
    "vanilla-tiny-seed_3-schedule.kind_wsd": ["model=vanilla", "seed=3", "schedule=wsd"],
    f"{TINY}-tokenizer.kind_unigram": ["tokenizer=unigram"],
}

# Commands that mean another run each, among them those that a readable name cannot tell apart.
DIFFERENT = [
    *NAMES.values(),
    ["data=files", "data.sources.files.paths=d/uni.jsonl"],
    ["data=files", "data.sources.files.paths=[uni.jsonl]"],
    ["data=files", "data.sources.files.paths='uni jsonl'"],
    ["data=files", "data.sources.files.paths=uni_jsonl"],
    ["data=files", f"data.sources.files.paths={'x' * 300}"],
    ["data=files", f"data.sources.files.paths={'x' * 301}"],
    ["data=files", 'data.sources.files.paths="é.txt"'],
    [*FILES, "data.sources.files.text_field=body"],
    [*FILES, "data.sources.files.separator='|'"],
    [*FILES, "data.sources.files.weight=2"],
    ["data=python_packages"],
    ["data.sources.python.packages=true"],
    ["data.sources.more={kind: python, packages: true}"],
    ["data=c4", "data.phases={late: {after_tokens: 4096, weights: {c4: 2}}}"],
    ["optim.betas=[0.9,0.99]"],
    ["optim.betas=[0.8,0.95]"],
    ["optim.grad_clip=null"],
    ["optim.weight_decay=0.001"],
    ["model.norm_eps=0.001"],
    ["model.copy_embedding=true"],
    ["model.span_unit=token"],
    ["size=151m"],
    ["size=151m", "recipe=default"],
    ["size=151m", "recipe=default", "optim.eps=1e-9"],
    ["model.size=mine"],
    ["model.size='my size/x'"],
    ["tokenizer=file", "tokenizer.path=a.model"],
    ["run.start_from=exported"],
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def directory_of(config: Config, *, step: int | None = None) -> Path:
    """What a run leaves in its directory that says which run it is."""
    run = config.run_dir
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    if step is not None:
        state = run / f"checkpoints/step_{step:08d}/state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"config": config.to_dict()}))
    return run


def of_earlier_version(name: str, *overrides: str) -> Config:
    """The config of a run whose directory earlier versions gave this name."""
    return load([*overrides, f"run.dir=runs/{name}"])


@pytest.mark.parametrize("name", NAMES)
def test_a_default_name_says_what_differs_from_the_defaults_of_the_size(name: str) -> None:
    assert load(NAMES[name]).name == name
    assert load([*NAMES[name], "run.name=mine"]).name == "mine"


def test_different_runs_have_different_names_that_a_directory_can_have() -> None:
    configs = [load(overrides) for overrides in DIFFERENT]
    names = [config.name for config in configs]
    assert [name for name in names if names.count(name) > 1] == []
    assert max(map(len, names)) <= LONGEST
    assert [name for name in names if not re.fullmatch(r"[\w.+-]+", name)] == []
    # They are found again by what is saved of them, and no two are taken for each other.
    assert [Config.from_dict(config.to_dict()).name for config in configs] == names
    kept = [json.dumps(identity(config), sort_keys=True) for config in configs]
    assert len(set(kept)) == len(kept)


@pytest.mark.parametrize(
    "change",
    [
        *("train.max_steps=9", "train.max_tokens=8192", "train.micro_batch=2", "eval.every=7"),
        *("engine=deepspeed", "engine.device=cpu", "hooks=quiet", "checkpoint.keep=3"),
        *("data.workers=0", "data.cache.max_gb=1", "faults.policy=abort", "run.resume=must"),
        *("model.attention=reference", "data.sources.python.epochs=2"),
    ],
)
def test_what_a_run_may_change_when_it_goes_on_is_no_part_of_its_name(change: str) -> None:
    assert load(["optim.lr=1e-3", change]).name == f"{TINY}-lr_0.001"


@pytest.mark.parametrize("step", [None, 40])
def test_a_run_with_a_name_of_an_earlier_version_is_found(step: int | None) -> None:
    old = directory_of(of_earlier_version(TINY, "optim.lr=1e-3", "train.max_steps=9"), step=step)
    assert load(["optim.lr=1e-3"]).run_dir == old
    assert load(["optim.lr=2e-3"]).run_dir == Path(f"runs/{TINY}-lr_0.002")
    new = directory_of(load(["optim.lr=2e-3"]))
    assert load(["optim.lr=2e-3"]).run_dir == new


def test_a_sweep_with_names_of_an_earlier_version_is_found() -> None:
    old = directory_of(of_earlier_version(f"{TINY}-data_c4", "data=c4"), step=4)
    default = directory_of(of_earlier_version(f"{TINY}-lr_0.003"), step=4)
    jobs = check(["data=c4,fineweb_edu"], multirun=True).jobs
    assert [job.run_dir for job in jobs] == [old, Path(f"runs/{TINY}-fineweb_edu")]
    jobs = check(["optim.lr=1e-3,3e-3"], multirun=True).jobs
    assert [job.run_dir for job in jobs] == [Path(f"runs/{TINY}-lr_0.001"), default]


@pytest.mark.parametrize("named", [[], ["run.name=mine"]])
def test_a_sweep_goes_on_with_its_own_runs_and_makes_room_beside_others(named: list[str]) -> None:
    sweep = [*named, "model.K=2,3", "model.dim=128"]
    first = check(sweep, multirun=True).jobs
    for job in first:
        directory_of(job, step=3)
    assert check(sweep, multirun=True).jobs == first
    assert check([*sweep, "train.max_steps=9"], multirun=True).jobs != first
    longer = check([*sweep, "train.max_steps=9"], multirun=True).jobs
    assert [job.run_dir for job in longer] == [job.run_dir for job in first]
    other = check([*named, "model.K=2,3", "model.dim=64"], multirun=True).jobs
    assert not {job.run_dir for job in other} & {job.run_dir for job in first}
    for job in other:
        directory_of(job)
    assert check([*named, "model.K=2,3", "model.dim=64"], multirun=True).jobs == other


def test_a_sweep_at_equal_flops_goes_on_with_the_run_whose_flops_they_are() -> None:
    directory_of(load([]), step=3)
    assert f"runs/{TINY}" in [str(job.run_dir) for job in check(["+sweep=k_equal_flops"]).jobs]


def test_a_sweep_makes_room_beside_a_directory_that_is_of_unknown_contents() -> None:
    unknown = Path(f"runs/{TINY}-lr_0.001")
    (unknown / "checkpoints/step_00000003").mkdir(parents=True)
    [job, _] = check(["optim.lr=1e-3,2e-3"], multirun=True).jobs
    assert re.fullmatch(rf"{TINY}-lr_0\.001-[0-9a-f]{{8}}", job.name)
    (unknown / "checkpoints/step_00000003").rmdir()
    (unknown / "config.yaml").write_text("")  # a start that wrote nothing more
    [job, _] = check(["optim.lr=1e-3,2e-3"], multirun=True).jobs
    assert job.run_dir == unknown


def test_the_newest_checkpoint_says_which_run_a_directory_holds() -> None:
    config = load(["optim.lr=1e-3"])
    run = directory_of(config, step=3)
    assert holds(run, config) is True
    assert holds(run, load(["optim.lr=2e-3"])) is False
    assert holds(Path("nothing"), config) is None
    state = run / "checkpoints/step_00000009/state.json"
    state.parent.mkdir()
    state.write_text("")  # damaged: the one before it counts
    assert holds(run, config) is True
    state.write_text(json.dumps({"config": load(["optim.lr=2e-3"]).to_dict()}))
    assert holds(run, config) is False
