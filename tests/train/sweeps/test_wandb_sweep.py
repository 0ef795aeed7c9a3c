"""Claims about Weights & Biases and sweeps: groups, and runs that its server gives to agents."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from train.compose import check, load
from train.conf_files import load_yaml
from train.metrics.sinks import keep_run_id

FILE = Path(__file__).parents[3] / "launch/wandb_sweep.yaml"


def arguments(**point: Any) -> list[str]:
    """What W&B's agent makes of the parameters of a run."""
    values = {"args": {key: {"value": value} for key, value in point.items()}}
    return list(create_sweep_command_args(values)["args_no_hyphens"])


def test_the_shipped_wandb_sweep_is_that_of_the_variants_over_seeds() -> None:
    sweep = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert (FILE.parents[1] / sweep["program"]).is_file()
    *settings, last = sweep["command"][3:]
    assert last == "${args_no_hyphens}"
    own = {key: parameter["values"] for key, parameter in sweep["parameters"].items()}
    parse = OverridesParser.create().parse_overrides
    ours = [
        {override.key_or_group: list(override.sweep_iterator()) for override in parse(texts)}
        for name in ("variants", "seeds")
        for params in [load_yaml(f"sweep/{name}.yaml")["hydra"]["sweeper"]["params"]]
        for texts in [[f"{key}={value}" for key, value in params.items()]]
    ]
    theirs = [o.value() for text in own["together"] for o in parse(arguments(together=text))]
    assert [{"together": theirs}, {"seed": own["seed"]}] == ours
    # The command of the agent, for the last run.
    run = load([*settings, *arguments(seed=2, together=own["together"][-1])])
    assert run.name == "vanilla-tiny-seed_2-layers_5"
    assert run.hooks.wandb.group == sweep["name"]


@pytest.mark.parametrize(
    ("typed", "group"), [("+sweep=seeds", "seeds+lr"), ("hooks.wandb.group=mine", "mine")]
)
def test_the_runs_of_a_sweep_are_one_group(typed: str, group: str) -> None:
    jobs = check([typed, "optim.lr=1e-3,3e-3"], multirun=True).jobs
    assert {job.hooks.wandb.group for job in jobs} == {group}
    assert load().hooks.wandb.group is None


def test_a_run_of_an_agent_has_the_id_that_the_server_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = [tmp_path / name for name in ("alone", "of_the_agent", "resumed")]
    for directory in directories:
        directory.mkdir()
    monkeypatch.setenv("WANDB_RUN_ID", "given-id")
    assert keep_run_id(directories[0], None, Console()) != "given-id"
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    assert keep_run_id(directories[1], None, Console()) == "given-id"
    assert keep_run_id(directories[2], "saved-id", Console()) == "saved-id"
