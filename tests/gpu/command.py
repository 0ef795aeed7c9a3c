"""Everything that needs a GPU, once, in at most nine and a half minutes, as one dated page.

Tests and scenarios run beside each other; then the benchmarks, one after the other, so that their
times are their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, strftime

from conf.errors import Problem
from conf.settings import at_least
from tests.gpu.parts import parts, run
from tests.gpu.report import Report, Section
from train.run_dir.environment import environment
from train.run_dir.snapshot import read_revision
from train.settings.engine import device_problems


@dataclass(frozen=True, kw_only=True)
class GpuArguments:
    """Arguments of `make gpu ARGS="key=value ..."`.

    Attributes:
        out: the directory for the page, which is named after the day and the device.
        logs: the directory for what each part prints, with the tracebacks of what failed.
        device: `cuda`; `cpu` tries the parts at small sizes where there is no GPU.
        budget_s: the seconds after which no part begins and none goes on.
        processes: how many processes run the tests.
        parts: names of the parts to run, with commas between them; null: all.
        commit: of the source, if it is not in a git repository any more.
    """

    out: str = "docs/gpu"
    logs: str = "bench/gpu"
    device: str = "cuda"
    budget_s: float = 565
    processes: int = 8
    parts: str | None = None
    commit: str | None = None

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "budget_s", "processes") + device_problems(self.device)
        if self.device == "auto":
            found.append(Problem("device", "auto", "expected cpu or cuda"))
            return found
        known = parts(self.device, Path(self.logs), 1)
        return found + [
            Problem("parts", name, f"expected one of {', '.join(known)}")
            for name in self.names(known)
            if name not in known
        ]

    def names(self, known: Iterable[str]) -> list[str]:
        """The names of the parts to run."""
        return self.parts.split(",") if self.parts else list(known)


def main(args: GpuArguments) -> int:
    """Run the parts and write the page; the exit code is 1 if something failed."""
    deadline = monotonic() + args.budget_s
    logs = Path(args.logs).expanduser().absolute()
    known = parts(args.device, logs, args.processes)
    chosen = {name: part for name, part in known.items() if name in args.names(known)}
    machine = environment(read_revision())
    if args.commit:
        machine["revision"] = args.commit
    device = str(machine["device"]).replace(" ", "_")
    path = Path(args.out).expanduser() / f"{strftime('%Y-%m-%d')}_{device}.md"
    report = Report(path, machine, {name: Section(part.title) for name, part in chosen.items()})
    report.write()

    def done(name: str, section: Section) -> None:
        report.sections[name] = section
        report.write()
        print(f"{section.title}: {section.result} ({section.seconds:.0f} s)", flush=True)

    run(chosen, logs, deadline, done)
    print(f"written: {path} (what the parts printed: {logs})")
    return int(
        any(section.failed or section.seconds is None for section in report.sections.values())
    )
