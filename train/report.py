"""Compare runs on one page: what each variant gains over vanilla, and what it costs.

python train/report.py runs='runs/*'
python train/report.py runs='["runs/k/*", "runs/window/*"]' out=ablations title="K and the window"

report/
    report.html     the page; it needs no network and no other file
    report.md       the same as Markdown, with the figures below
    figures/*.png   each figure
    tables/*.csv    each table, with all digits
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from conf import arguments
    from train.arguments import ReportArguments

    arguments.run(ReportArguments, "train.report")

import glob
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

from conf.errors import ConfigError, DataError, Problem, reason_of
from conf.extras import pip_command
from conf.wording import plural
from train.arguments import REPORT_PAGE, ReportArguments
from train.experiments.ledger import is_run, kept_result, read_run
from train.experiments.result import FILE, Result, Unread


def main(args: ReportArguments) -> int:
    """Write the report, and print where it is; return the exit code."""
    missing = [package for package in ("matplotlib", "scipy") if find_spec(package) is None]
    if missing:
        problem = f"{' and '.join(missing)} not installed; the report needs it"
        problem += f": {pip_command('phd-transformer[report]')}"
        raise ConfigError([problem], "the environment")
    from train.experiments.contents import report_of
    from train.experiments.page import write_report

    results, unread = read_results(args.runs)
    title = args.title or f"Comparison of {plural(len(results), 'run')}"
    write_report(report_of(results, title, unread), args.directory)
    print(f"{args.directory / REPORT_PAGE}: {plural(len(results), 'run')}")
    return 0


class Found(NamedTuple):
    """What was read of runs, and what could not be."""

    results: list[Result]
    unread: list[Unread]


def read_results(patterns: Sequence[str]) -> Found:
    """The results of all runs that some patterns name, each once, by their paths.

    Runs that cannot be read are named on stderr with the reason. What such a run has written as its
    result is taken; one without that is left out.

    Raises:
        ConfigError: a pattern names no run.
        DataError: no run can be read; all are named.
    """
    paths: set[Path] = set()
    problems: list[Problem | str] = []
    for pattern in patterns:
        found = set(
            filter(None, map(run_at, glob.glob(os.path.expanduser(pattern), recursive=True)))
        )
        paths |= found
        if not found:
            expected = f"no directory of a run and no {FILE} is there"
            problems.append(Problem("runs", pattern, expected, "give a pattern such as 'runs/*'"))
    if problems:
        raise ConfigError(problems, "the arguments")
    results, unread, lines = [], [], []
    for path in sorted(paths):
        try:
            results.append(read_run(path))
        except (OSError, DataError, ConfigError) as error:
            reason = reason_of(error)
            if written := _written(path):
                results.append(written)
                print(f"{path}: {reason}; its {FILE} is taken as it is", file=sys.stderr)
            else:
                lines.append(f"{path}: {reason}")
            unread.append(_unread(path, reason, kept=written is not None))
    told = "\n".join([f"{plural(len(lines), 'run')} cannot be read:", *lines])
    if not results:
        raise DataError(told)
    if lines:
        print(f"left out: {told}", file=sys.stderr)
    return Found(results, unread)


def _written(path: Path) -> Result | None:
    """The result that a run has written itself; None if there is none that can be read."""
    try:
        return kept_result(path / FILE)
    except (OSError, DataError):
        return None


def _unread(path: Path, reason: str, *, kept: bool) -> Unread:
    """A run that cannot be read, without the folders above it: the page may be shown to others."""
    directory = path.parent if path.name == FILE else path
    name = directory.name if path.name == FILE or path.is_dir() else path.name
    for folder in (directory, directory.parent):
        reason = reason.replace(f"{folder}/", "")
    return Unread(name, reason, kept)


def run_at(name: str) -> Path | None:
    """What the result of a run is read from: its directory, or a file that was kept; None if none.

    A directory and the `result.json` in it are the same run.
    """
    path = Path(name).resolve()
    directory = path if path.is_dir() else path.parent
    if is_run(directory):
        return directory if path.is_dir() or path.name == FILE else None
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.suffix == ".json" else None
