"""What README and docs/ say exists: files, commands, settings, and `make`'s targets."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import pytest

from conf.arguments import parse
from conf.errors import ConfigError
from conf.validation import keys
from launch import __main__ as launch
from train import arguments, compose
from train.explain import explain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 200

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w/.{-])((?:conf|data|docs|launch|phd|tests|train)/[\w./<>*-]*[\w>*/])")
TARGETS = re.compile(r"\bmake ([a-z][a-z-]*)")

# Paths that a reader is told to write.
THEIRS = {"conf/data/mine.yaml"}


class Command(NamedTuple):
    """A command of a page: `python train/main.py` or `python -m launch`, and its arguments."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {shlex.join(self.arguments)}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(page)) if name == language]


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of every line that a page tells to type."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)
    for block in blocks(page, "console"):
        yield from (shlex.split(line[2:]) for line in block.splitlines() if line[:2] == "$ ")
    prose = FENCE.sub("", text_of(page))
    for code in re.findall(r"`([^`]+)`", prose):
        if code.startswith(("python ", "make ")) and not re.search(r"<|\.\.\.", code):
            yield shlex.split(code)


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for words in shell_lines(page):
            name = page.relative_to(ROOT).as_posix()
            if words[:2] == ["make", "gpu"]:  # tests/gpu looks at these
                continue
            if words[:1] == ["make"]:  # its ARGS are those of train/main.py
                given = [word[5:] for word in words if word.startswith("ARGS=")]
                words = ["python", "train/main.py", *shlex.split(given[0])] if given else []
            if words[:3] == ["python", "-m", "launch"]:
                found.append(Command(name, "launch", redirected(words[3:])))
            elif words[:1] == ["python"] and words[1:2] != ["-m"]:
                found.append(Command(name, words[1], redirected(words[2:])))
    return list(dict.fromkeys(found))


def redirected(words: list[str]) -> tuple[str, ...]:
    """The words before `>file`."""
    end = next((place for place, word in enumerate(words) if word[:1] in "<>"), len(words))
    return tuple(words[:end])


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    links = {link for link in LINK.findall(text_of(page)) if "://" not in link}
    missing = [link for link in links if not leads_somewhere(page, link)]
    paths = set(PATH.findall(re.sub(r"\]\([^)]*\)|https?://\S+", "", text_of(page))))
    for path in paths - THEIRS:
        parts = re.sub(r"<\w+>", "*", path)
        if not any(ROOT.glob(parts.rstrip("/"))) and not is_no_file(path, page):
            missing.append(path)
    assert missing == []


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether the file exists and has the heading that the link names."""
    file, _, anchor = link.partition("#")
    target = (page.parent / file) if file else page
    if not target.exists():
        return False
    if not anchor:
        return True
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(target)), re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    return anchor in slugs


def is_no_file(path: str, page: Path) -> bool:
    """Whether it only looks like a path of ours: a metric, or the end of a longer path."""
    code = map(text_of, (ROOT / "train/metrics").glob("*.py"))
    if any(f'"{path}"' in text for text in code):
        return True
    longer = re.findall(rf"\S*{re.escape(path)}", text_of(page))
    return all(f"/{path}" in text for text in longer)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    typed = {words[1] for words in shell_lines(page) if words[:1] == ["make"] and len(words) > 1}
    assert typed - targets == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_imports_exist(page: Path) -> None:
    for name in re.findall(r"\bphd\.[\w.]*\w", " ".join(re.findall(r"`[^`]+`", text_of(page)))):
        resolve_name(name)
    for block in blocks(page, "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_there_are_commands_to_look_at() -> None:
    programs = {command.program for command in commands()}
    assert {"train/main.py", "train/plan.py", "train/bench.py", "launch"} <= programs


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_exists_and_takes_its_settings(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run: settings are composed and checked, as each command does it first."""
    monkeypatch.chdir(tmp_path)
    for page in PAGES:  # the site files that a page shows begin with their name
        for block in blocks(page, "yaml"):
            if name := re.match(r" *# (\w+\.yaml)\n", block):
                (tmp_path / name[1]).write_text(block, encoding="utf-8")
    texts = [text for text in command.arguments if text != "--dry"]
    assert command.program == "launch" or (ROOT / command.program).is_file()
    if not texts or "--help" in texts or "--cfg" in texts:
        return
    if texts[0] == "--explain":
        assert explain(texts[1], compose.compose_now(texts[2:]))
        return
    if command.program == "launch":
        assert launch.main([*texts, "--dry"]) == 0
        return
    if is_refused_on_purpose(command):
        with pytest.raises(ConfigError):
            check_run(texts)
        return
    front = re.search(r"(run|run_with)\((\w+Arguments), ", text_of(ROOT / command.program))
    if front is None:  # it takes a run's settings and nothing else
        check_run(texts)
        return
    cls = getattr(arguments, front[2])
    mine = [text for text in texts if "=" not in text or text.partition("=")[0] in keys(cls)]
    rest = [text for text in texts if text not in mine]
    parse(cls, mine, positional=["name"] if "name" in keys(cls) else [])
    if front[1] == "run_with":
        check_run(rest)
    else:
        assert rest == []


def check_run(texts: list[str]) -> None:
    compose.check([text for text in texts if text != "-m"], multirun="-m" in texts)


def is_refused_on_purpose(command: Command) -> bool:
    """Whether the page shows what the command answers, and the answer is a refusal."""
    shown = [block.partition("\n") for block in blocks(ROOT / command.page, "console")]
    words = ["$", "python", command.program, *command.arguments]
    return any(shlex.split(line) == words and "problem" in answer for line, _, answer in shown)
