"""Claims about `conf.arguments`: `key=value` becomes a dataclass, or one screen that says why."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.arguments import parse, resolve, usage
from conf.errors import ConfigError, Problem
from conf.exit_codes import ExitCode
from conf.settings import Settings, at_least

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
from dataclasses import dataclass
from conf.settings import Settings
from conf.arguments import run
from conf.errors import ConfigError

@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    "Says where."
    out: str = "here"

def main(demo):
    if demo.out == "nowhere":
        raise ConfigError(["out=nowhere: expected a place"], "the arguments")
    print(demo.out)
    return 3

run(Demo, main)
"""


@dataclass(frozen=True, kw_only=True)
class Request(Settings):
    """Says something."""

    run: Path
    prompt: str = ""
    title: str | None = "x"
    tokens: int = 10
    temperature: float = 1.0
    shapes: tuple[int, ...] = ()
    fast: bool = False

    def problems(self) -> list[Problem]:
        return at_least(self, "", 1, "tokens")


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        parse(Request, arguments)
    return list(map(str, refusal.value.problems))


def test_each_value_is_read_as_its_field_needs() -> None:
    numbers = ["tokens=3", "temperature=1e-1", "shapes=[1,2]"]
    assert parse(Request, ["run=runs/x", *numbers, "fast=true", "title=null"]) == Request(
        run=Path("runs/x"), tokens=3, temperature=0.1, shapes=(1, 2), fast=True, title=None
    )


@pytest.mark.parametrize("text", ["3", "null", "[1]", "a = b", "", "'quoted'", "def f(x):\n\t"])
def test_text_is_taken_as_it_is(text: str) -> None:
    assert parse(Request, ["run=r", f"prompt={text}"]).prompt == text


def test_arguments_without_a_key_fill_the_positional_fields() -> None:
    assert parse(Request, ["r", "tokens=2"], positional=["run"]) == Request(run=Path("r"), tokens=2)


def test_everything_wrong_is_told_at_once() -> None:
    assert problems("tokns=3", "temperature=hot", "fast=1", "rnu") == [
        "tokns: unknown key. Did you mean tokens?",
        "rnu: unknown key. Did you mean run?",
        "temperature='hot': expected a number",
        "fast=1: expected true or false",
    ]
    assert problems("run=r", "tokens=0") == ["tokens=0: expected an integer of at least 1"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--run", "r"], "run=r"),
        (["run", "r"], "run=r"),
        (["--run=r"], "run=r"),
        (["run=r", "tokens", "3"], "tokens=3"),
        (["run=r", "--temperature", "-1"], "temperature=-1"),
        (["run=r", "prompt", "a b"], "prompt='a b'"),
    ],
)
def test_another_commands_form_of_an_argument_is_answered_with_ours(
    typed: list[str], meant: str
) -> None:
    """One problem alone: what was typed is not missing as well."""
    [problem] = problems(*typed)
    assert "a setting is key=value" in problem
    assert problem.endswith(f". Did you mean {meant}?")


def test_the_usage_shows_every_key_with_its_default() -> None:
    assert usage(Request).splitlines() == [
        "Says something.",
        "",
        "  run=...",
        '  prompt=""',
        "  title=x",
        "  tokens=10",
        "  temperature=1.0",
        "  shapes=[]",
        "  fast=false",
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "code", "out", "error"),
    [
        (["out=there"], 3, "there\n", ""),
        (["--help"], 0, "Says where.\n\n  out=here\n", ""),
        (["ot=x"], 2, "", "1 problem in the arguments:\n  ot: unknown key. Did you mean out?\n"),
        (["out=nowhere"], 2, "", "1 problem in the arguments:\n  out=nowhere: expected a place\n"),
    ],
)
def test_a_command_ends_with_its_code_and_one_screen(
    arguments: list[str], code: int, out: str, error: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, error)


def test_an_interruption_of_the_import_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted_command.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        resolve("interrupted_command")
    assert ended.value.code == ExitCode.INTERRUPTED
