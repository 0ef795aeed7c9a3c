"""Which of several machines is not like the others, from what each of their ranks has measured.

Nothing here measures anything: `launch.preflight` does, on every rank.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from launch.config import Thresholds

BUSY = 0.1  # of a device's memory, which other processes may hold


@dataclass(frozen=True)
class Report:
    """What one rank has measured.

    Attributes:
        rank: its number among all ranks.
        machine: the number of its machine, from 0.
        host: the name of its machine.
        device: the name of its device.
        failures: what did not work at all.
        busy: the part of the device's memory that other processes hold.
        tflops: of a matrix multiplication, in 10^12 operations per second; None if it failed.
        free_gib: the free space in GiB of each directory.
        versions: of each library, the code of this project among them.
        offset_s: the clock of machine 0 minus that of this machine; None if another rank told.
        offset_error_s: how wrong that may be: half of the shortest round trip.
        within_gb_s: the bus bandwidth among the ranks of the machine; None if it has only one.
        pairs_gb_s: that with each of some other machines, by their numbers.
        all_gb_s: that among all ranks; None if there is only one.
    """

    rank: int
    machine: int
    host: str
    device: str = "cpu"
    failures: Sequence[str] = ()
    busy: float = 0.0
    tflops: float | None = None
    free_gib: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    offset_s: float | None = None
    offset_error_s: float = 0.0
    within_gb_s: float | None = None
    pairs_gb_s: Mapping[str, float] = field(default_factory=dict)
    all_gb_s: float | None = None


class Finding(NamedTuple):
    """Something that is wrong with a machine."""

    host: str
    text: str


def diagnose(reports: Sequence[Report], thresholds: Thresholds) -> list[Finding]:
    """Everything that is wrong, with the machine that it is wrong with; empty if all is well."""
    found = [
        *_failures(reports),
        *_clocks(reports, thresholds.max_clock_skew_s),
        *_disks(reports, thresholds.min_free_disk_gib),
        *_differences(reports),
        *_slow_devices(reports, thresholds.min_relative_speed),
        *_bandwidths(reports, thresholds),
    ]
    return list(dict.fromkeys(found))


def _failures(reports: Iterable[Report]) -> Iterator[Finding]:
    for report in reports:
        for failure in report.failures:
            yield Finding(report.host, f"rank {report.rank}: {failure}")
        if report.busy > BUSY:
            text = f"other processes hold {report.busy:.0%} of the memory of {report.device}"
            yield Finding(report.host, f"rank {report.rank}: {text}")


def _clocks(reports: Iterable[Report], most_s: float) -> Iterator[Finding]:
    """Clocks that differ from most: of two machines, from the first."""
    offsets = {r.host: (r.offset_s, r.offset_error_s) for r in reports if r.offset_s is not None}
    if len(offsets) < 2:
        return
    values = [offset for offset, _ in offsets.values()]
    right = median(values) if len(values) > 2 else 0.0
    reference = "most others'" if len(values) > 2 else f"that of {next(iter(offsets))}"
    for host, (offset, error) in offsets.items():
        behind = offset - right
        if abs(behind) - error > most_s:
            way = "behind" if behind > 0 else "ahead of"
            text = f"its clock is {abs(behind):.3g} s {way} {reference}"
            yield Finding(host, f"{text}; expected at most max_clock_skew_s={most_s:g}: start NTP")


def _disks(reports: Iterable[Report], least_gib: float) -> Iterator[Finding]:
    for report in reports:
        for path, free in report.free_gib.items():
            if free < least_gib:
                expected = f"expected at least min_free_disk_gib={least_gib:g}"
                yield Finding(report.host, f"{path} has {free:.1f} GiB free; {expected}")


def _differences(reports: Sequence[Report]) -> Iterator[Finding]:
    """Libraries and devices that are not those of most ranks; in doubt, of rank 0."""
    names = list(dict.fromkeys(name for report in reports for name in report.versions))
    for name in ("device", *names):

        def value(report: Report, name: str = name) -> str:
            return report.device if name == "device" else report.versions.get(name, "none")

        usual = _usual(map(value, reports))
        for report in reports:
            if (own := value(report)) != usual:
                yield Finding(report.host, f"{name} is {own}, and {usual} elsewhere")


def _usual(values: Iterable[str]) -> str:
    """The most frequent value; of two that are equally frequent, the first."""
    return Counter(values).most_common(1)[0][0]


def _slow_devices(reports: Sequence[Report], least: float) -> Iterator[Finding]:
    speeds = {r.rank: r.tflops for r in reports if r.tflops is not None}
    for report in reports:
        if report.rank in speeds and (others := _others(speeds, report.rank)):
            own = speeds[report.rank]
            if own < least * others:
                text = f"{report.device} computes {own:.3g} TFLOP/s, and others {others:.3g}"
                yield Finding(report.host, f"rank {report.rank}: {text}")


def _bandwidths(reports: Sequence[Report], thresholds: Thresholds) -> Iterator[Finding]:
    """Machines that send slowly, within themselves or to every other that they were paired with."""
    least = thresholds.min_bandwidth_gb_s
    hosts = {report.machine: report.host for report in reports}
    within = _by_machine(reports, lambda report: report.within_gb_s)
    # A slow machine is slow with everybody, and makes a good one slow with itself alone.
    between = _by_machine(reports, lambda report: max(report.pairs_gb_s.values(), default=None))
    kinds = {"among its own ranks": within, "with other machines": between}
    for words, speeds in kinds.items():
        for machine, speed in speeds.items():
            others = _others(speeds, machine)
            text = f"an all-reduce {words} moves {speed:.3g} GB/s"
            if least is not None and speed < least:
                expected = f"expected at least min_bandwidth_gb_s={least:g}"
                yield Finding(hosts[machine], f"{text}; {expected}")
            elif others is not None and speed < thresholds.min_relative_speed * others:
                yield Finding(hosts[machine], f"{text}, and {others:.3g} elsewhere")


def _by_machine(
    reports: Iterable[Report], value: Callable[[Report], float | None]
) -> dict[int, float]:
    """A value of each machine: that of its slowest rank, among those that have one."""
    found: dict[int, float] = {}
    for report in reports:
        if (own := value(report)) is not None:
            found[report.machine] = min(own, found.get(report.machine, own))
    return found


def _others(values: Mapping[Any, float], own: Any) -> float | None:
    """The median of all others; None without others."""
    rest = [value for name, value in values.items() if name != own]
    return median(rest) if rest else None


def table(reports: Sequence[Report]) -> str:
    """One line for each machine."""
    head = ("machine", "ranks", "device", "TFLOP/s", "within GB/s", "between GB/s")
    rows = [(*head, "clock ms", "free GiB")]
    within = _by_machine(reports, lambda report: report.within_gb_s)
    between = _by_machine(reports, lambda report: max(report.pairs_gb_s.values(), default=None))
    for machine in dict.fromkeys(report.machine for report in reports):
        own = [report for report in reports if report.machine == machine]
        offset = next((r.offset_s for r in own if r.offset_s is not None), None)
        rows.append(
            (
                own[0].host,
                f"{own[0].rank}-{own[-1].rank}" if len(own) > 1 else str(own[0].rank),
                own[0].device,
                _number(min((r.tflops for r in own if r.tflops is not None), default=None)),
                _number(within.get(machine)),
                _number(between.get(machine)),
                _number(None if offset is None else 0.0 - 1e3 * offset),
                _number(min((gib for r in own for gib in r.free_gib.values()), default=None)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    speed = reports[0].all_gb_s
    if speed is not None:
        lines.append(f"all-reduce among all {len(reports)} ranks: {speed:.3g} GB/s")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
