"""`--help` and `--explain` tell what there is to set, what it means, and what it is now."""

import pytest

from conf.arguments import help_page
from conf.descriptions import entries
from conf.errors import ConfigError
from launch.__main__ import main as launch
from launch.config import Local
from train.arguments import GenerateArguments, PretokenizeArguments
from train.compose import compose_now
from train.conf_files import choices, groups
from train.config import Config
from train.explain import explain, overview


def told(key: str, *overrides: str) -> str:
    """The explanation on one line."""
    return " ".join(explain(key, compose_now(overrides)).split())


@pytest.mark.parametrize(
    ("overrides", "now"),
    [
        ([], "now: 16, the default"),
        (["model.window=9"], "now: 9, from the command line"),
        (["model={window: 9}"], "now: 9, from the command line"),
        (["sweep=window"], "but the sweep varies it"),
        (["model.window=1,2"], "now: 16, but the sweep varies it"),
    ],
)
def test_a_setting_is_explained_with_where_its_value_comes_from(
    overrides: list[str], now: str
) -> None:
    text = told("model.window", *overrides)
    assert text.startswith("model.window W, how many hidden copies a hidden copy sees among")
    assert "type: an integer default: 16 now: " in text
    assert text.endswith(now)


@pytest.mark.parametrize(
    ("key", "overrides", "origin"),
    [
        ("model.variant", [], "phd_cswa, from conf/model/phd_cswa.yaml (model=phd_cswa)"),
        ("train.seq_len", ["size=550m"], "4096, from conf/recipe/olmo2.yaml (recipe=olmo2)"),
        ("model.dim", ["size=550m"], "1536, from conf/size/550m.yaml (size=550m)"),
        ("model.dim", ["experiment=smoke"], "conf/experiment/smoke.yaml (experiment=smoke)"),
        ("data.sources.c4.kind", ["data=[python,c4]"], "conf/data/c4.yaml (data=c4)"),
        ("hooks.console", ["hooks=quiet"], "false, from conf/hooks/quiet.yaml (hooks=quiet)"),
        ("data.sources.python.weight", [], "now: 1.0, the default"),
        (
            "data.sources.files.paths",
            ["data=files"],
            "still to be given, from conf/data/files",
        ),
        ("engine.stage", [], "now: not in use, since engine.kind=fsdp"),
        ("engine.stage", ["engine=deepspeed"], "now: 2, the default"),
    ],
)
def test_the_file_that_has_set_a_value_is_named(
    key: str, overrides: list[str], origin: str
) -> None:
    assert origin in told(key, *overrides)


def test_a_group_a_section_and_a_name_of_ones_own_are_explained() -> None:
    group = told("size", "size=550m")
    assert "size=550m * Section 3.3" in group
    assert all(f"size={choice}" in group for choice in choices("size"))
    assert "eval.rows=128 how many rows" in told("eval")
    assert "data.phases.NAME.weights" in told("data.phases")
    weight = told("data.sources.NAME.weight", "data=[python,c4]")
    assert weight.count("the source's share") == 1
    assert "(data.sources.python.weight)" in weight
    assert "(data.sources.c4.weight)" in weight


def test_a_secret_is_not_shown() -> None:
    path = "data.sources.files.paths"
    secret = [f'{path}="https://user:abc@host/a.jsonl?sig=def"', "data=files"]
    assert "now: https://***@host/a.jsonl?sig=***, from the command line" in told(path, *secret)
    assert "abc" not in (page := overview("", compose_now(secret)))
    assert "https://***@host" in page


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.windw", "Did you mean model.window?"),
        ("K", "Did you mean model.K?"),
        ("sise", "Did you mean size?"),
        ("model.windw=3", "Did you mean model.window?"),
        ("zzzzz", "--help lists all settings"),
    ],
)
def test_what_there_is_not_is_answered_with_what_was_meant(key: str, meant: str) -> None:
    name = key.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name}: no setting.*{meant.rstrip('?')}"):
        told(key)
    with pytest.raises(ConfigError, match="--explain: expected a setting, a section or a group"):
        told("")


def test_the_overview_has_every_setting_and_choice_and_nothing_of_hydras_own() -> None:
    page = overview("Trains.", compose_now(["size=550m", "data=files"]))
    flat = " ".join(page.split())
    for group in groups():
        assert all(f"{group}={choice}" in page for choice in choices(group))
    for entry in entries(Config):
        if "*" not in entry.key and entry.kind in ("", "fsdp"):
            assert f" {entry.key}=" in page, entry.key
        if entry.kind == "" or "*" in entry.key:
            assert entry.meaning in flat, entry.key
    assert "size=550m *" in page
    assert "  train.seq_len=4096" in page
    assert not any(name in page for name in ("schema", "engine/", "hydra/", "hydra_logging"))


def test_arguments_of_other_commands_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_page(GenerateArguments, ["run=x", "--explain", "top_k"])
    assert text.split()[:3] == ["top_k", "choose", "among"]
    assert help_page(PretokenizeArguments, ["--explain=parts"]).endswith("default: 16")
    assert help_page(PretokenizeArguments, ["out=x"]) == ""
    with pytest.raises(ConfigError, match=r"part: no setting\. Did you mean parts"):
        help_page(PretokenizeArguments, ["--explain", "part"])
    for entry in entries(Local):
        assert launch(["local", "--explain", entry.key]) == 0
        assert entry.meaning in " ".join(capsys.readouterr().out.split())
    assert launch(["local", "--explain", "model.K"]) == 0
    assert capsys.readouterr().out.startswith("model.K\n")
