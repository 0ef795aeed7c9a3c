"""What `make gpu` runs: commands, how long each may take, and where its rows come from."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple, get_args

from tests.gpu.lines import FAIL, PASS, Row, told
from tests.gpu.report import Section
from tests.gpu.targets import TARGETS, Target
from train.arguments import Benchmark

ROOT = Path(__file__).parents[2]
LAST_WORDS_S = 5
"""How long a part whose time is over may still write after SIGINT."""


@dataclass(frozen=True)
class Part:
    """A command whose output is rows.

    Attributes:
        title: of its section.
        words: the command.
        limit_s: its time.
        rows: the rows in what it has printed, and in what it has written.
        together: it measures no time, and runs beside the others that measure none.
    """

    title: str
    words: list[str]
    limit_s: float
    rows: Callable[[str], list[Row]] = told
    together: bool = False


class Short(NamedTuple):
    """The short form of a benchmark.

    Attributes:
        benchmark: its name for `train/bench.py`.
        arguments: where it would be too small to tell much otherwise.
        limit_s: its time.
        variables: of its environment, each NAME=value.
    """

    benchmark: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 50
    variables: tuple[str, ...] = ()


INFERENCE = ("inference", "throughput", "decode")
"""The benchmarks of inference."""

ON_CPU = {
    name: Short(name, limit_s=100 if name in INFERENCE else 50) for name in get_args(Benchmark)
}
ON_CPU["decode"] = ON_CPU["decode"]._replace(variables=("TRITON_INTERPRET=1",))

ON_CUDA = {
    "inference_1b2": Short(
        "inference",
        (
            *("size=1b2", "variants=phd_cswa", "copies=[2,16,64,256]"),
            *("prompts=1024", "contexts=1024"),
        ),
        limit_s=95,
    ),
    "inference_550m": Short(
        "inference",
        (
            *("size=550m", 'variants=["phd","phd_swa","phd_cswa"]', "copies=16"),
            *("prompts=8192", "contexts=1024"),
        ),
        limit_s=65,
    ),
    "throughput": Short(
        "throughput",
        ("size=550m", "batches=[1,16,64]", "copies=[2,16]", "contexts=1024"),
        limit_s=85,
    ),
    "decode": Short("decode", ("size=1b2", "copies=[2,16,64]"), limit_s=65),
    **{name: Short(name) for name in get_args(Benchmark) if name not in INFERENCE},
    "step": Short("step", ("size=1b2",)),
}
"""The benchmarks on a GPU, by the names of their parts. The most important ones come first, and
last those of which most is not the GPU's. A limit is about twice the time that a part is expected
to take where everything is compiled already, most of which is starting, tracing and drawing."""

COMPILED_BEFORE = ("step", "inference_1b2", "inference_550m", "throughput", "decode")
"""The benchmarks that run once beside the tests, so that Triton's and Inductor's caches have their
kernels."""


def parts(device: str, logs: Path, processes: int) -> dict[str, Part]:
    """All parts by name; the most important ones first."""
    python = sys.executable
    own = {
        name: [python, "-m", f"tests.gpu.{name}", device]
        for name in ("default_run", "ceilings", "steps")
    }
    # Eight processes with as many threads as cores each would wait for each other.
    pytest = [
        "env",
        "OMP_NUM_THREADS=1",
        python,
        "-m",
        "pytest",
        "-v",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
    ]
    # Warnings of another version of torch are not what is tested here.
    pytest += ["-o", "filterwarnings=default", "--continue-on-collection-errors"]
    pytest += ["-n", str(processes), *cuda_tests()]
    short = ON_CUDA if device == "cuda" else ON_CPU
    benchmarks = {name: bench(name, device, logs / name) for name in short}
    found = {
        "tests": Part("Tests that need CUDA", pytest, 190, rows_of_tests, together=True),
        "default_run": Part(
            "The default run: kill, resume, export", own["default_run"], 190, together=True
        ),
        "ceilings": Part("Ceilings", own["ceilings"], 20),
        **{name: part for name, part in benchmarks.items() if name not in LAST},
        "engines": Part("Twenty steps of every engine, eager", [*own["steps"], "engines"], 45),
        "float8": Part("Twenty steps in float8, compiled", [*own["steps"], "float8"], 45),
        **{name: benchmarks[name] for name in LAST},
    }
    if device == "cuda":
        for name in COMPILED_BEFORE:
            first = bench(name, device, logs / f"compile_{name}", "repeat=1")
            title = f"The first {first.title}, which compiles while the tests run"
            words = ["nice", *first.words]  # the tests come first
            found[f"compile_{name}"] = replace(
                first, title=title, words=words, limit_s=190, together=True
            )
    return found


def bench(name: str, device: str, out: Path, *others: str) -> Part:
    """The part of a benchmark's short form; `out` is named after the part, as its log is."""
    short = (ON_CUDA if device == "cuda" else ON_CPU)[name]
    benchmark, arguments, limit_s, variables = short
    words = ["env", *variables] if variables else []
    words += [sys.executable, str(ROOT / "train/bench.py"), benchmark, *arguments, *others]
    words += [f"device={device}", "short=true", f"out={out}"]
    size = [word for word in arguments if word.startswith("size=")]
    title = f"`bench.py {' '.join([benchmark, *size])}`"
    return Part(title, words, limit_s, bench_rows(out / f"{benchmark}.json", TARGETS.get(name, {})))


LAST = ("checkpoint", "data", "resume")
"""The benchmarks that come after everything else."""


def cuda_tests() -> list[str]:
    """The files with tests that need CUDA: the others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "cuda.is_available" in path.read_text(encoding="utf-8")]


def rows_of_tests(text: str) -> list[Row]:
    """The counts and the failures in what pytest -v has printed, to its end or until it was ended.

    >>> line = "[gw1] [ 50%] FAILED tests/a.py::test_b[x y] "
    >>> rows_of_tests(f"[gw0] [ 25%] PASSED tests/a.py::test_a \\n{line}\\n")
    [{'what': '1 passed'}, {'what': 'tests/a.py::test_b[x y]', 'result': 'FAIL'}]
    """
    word = re.compile(r"(PASSED|FAILED|SKIPPED|XFAIL|ERROR)")
    bad_words = ("FAILED", "ERROR")
    found = [(word.search(line), line) for line in text.splitlines() if "::" in line]
    # With one process the word follows the test, with several it stands before it.
    ended = [(m[1], line) for m, line in found if m and re.search(r"\[ *\d+%\]", line)]
    counts = [f"{sum(1 for w, _ in ended if w == x)} {x.lower()}" for x in ("PASSED", "SKIPPED")]
    names = [
        re.search(r"\S+::.*?(?= (?:FAILED|ERROR)|\s*$)", line)
        for w, line in ended
        if w in bad_words
    ]
    broken = re.findall(r"^ERROR (\S+)(?: - .*)?$", text, re.MULTILINE)
    bad = [*dict.fromkeys([*(m[0] for m in names if m), *broken])]
    shown = ", ".join(count for count in counts if not count.startswith("0 "))
    return [{"what": shown or "none ran"}, *({"what": name, "result": FAIL} for name in bad)]


def bench_rows(path: Path, targets: Mapping[str, Target]) -> Callable[[str], list[Row]]:
    """The rows and ratios that a benchmark has written, and beside a ratio what is hoped for."""

    def rows(_: str) -> list[Row]:
        if not path.is_file():
            return []
        found = json.loads(path.read_text(encoding="utf-8"))
        shown = [
            {key: value for key, value in row.items() if not key.endswith("seconds")}
            for row in found["rows"]
        ]
        ratios = [
            {"ratio": name, "is": value} | (targets[name]._asdict() if name in targets else {})
            for name, value in found["ratios"].items()
        ]
        return [*shown, *ratios]

    return rows


class Started:
    """A part that runs; what it prints goes to a file."""

    def __init__(self, part: Part, log: Path, limit_s: float) -> None:
        self.part, self.log = part, log
        self.began = monotonic()
        self.end = self.began + min(part.limit_s, limit_s)
        for old in log.with_suffix("").glob("*.json"):  # what an earlier run has measured
            old.unlink()
        variables = {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                part.words,
                cwd=ROOT,
                env=os.environ | variables | {"PYTHONPATH": path},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether it has ended, or its time is over."""
        return self.process.poll() is not None or monotonic() > self.end

    def close(self) -> Section:
        """End it, if it has not ended, and return what it has come to."""
        code = self.process.poll()
        for how in (signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, how)
                self._wait(LAST_WORDS_S)
        text = self.log.read_text(encoding="utf-8", errors="replace")
        section = Section(self.part.title, rows=self.part.rows(text))
        section.seconds = monotonic() - self.began
        if code is None:
            section.result = f"{FAIL}: out of time"
        elif code or section.failed or not section.rows:
            section.result = f"{FAIL}: {last_line(text)}" if code else FAIL
            section.result += f" ({self.log.name})"
        else:
            section.result = PASS
        return section

    def _wait(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return


def last_line(text: str) -> str:
    """The last line that says something.

    >>> last_line("Traceback\\nValueError: no\\n\\n")
    'ValueError: no'
    """
    return next(
        (line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing"
    )


def run(
    chosen: dict[str, Part], logs: Path, deadline: float, done: Callable[[str, Section], None]
) -> None:
    """Run the parts until a moment of `monotonic`: those that measure no time beside each other,
    then the others, one after the other.

    Args:
        chosen: the parts by name.
        logs: the directory for what they print.
        deadline: parts that have not begun by then are left out.
        done: is called with the name of a part and what it has come to.
    """
    logs.mkdir(parents=True, exist_ok=True)
    beside = [name for name, part in chosen.items() if part.together]
    for names in [beside, *([name] for name in chosen if name not in beside)]:
        _run_together({name: chosen[name] for name in names}, logs, deadline, done)


def _run_together(
    chosen: dict[str, Part], logs: Path, deadline: float, done: Callable[[str, Section], None]
) -> None:
    left = deadline - monotonic()
    if left <= 0:
        return
    running = {name: Started(part, logs / f"{name}.log", left) for name, part in chosen.items()}
    try:
        while running:
            for name in [name for name, part in running.items() if part.ended()]:
                done(name, running.pop(name).close())
            sleep(0.05)
    finally:
        for part in running.values():  # by Ctrl-C
            part.close()
