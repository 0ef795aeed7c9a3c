"""Each fault is put into the reports of healthy machines, and its machine alone is named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launch.config import Check
from launch.diagnosis import Finding, Report, diagnose, table

LIMITS = Check(min_free_disk_gib=10.0, max_clock_skew_s=1.0)
Change = Callable[[Report], Report]


def healthy(machines: int, per_machine: int = 2) -> list[Report]:
    """Machines that differ as good ones do."""
    reports = []
    for rank in range(machines * per_machine):
        machine, first = rank // per_machine, rank % per_machine == 0
        neighbours = {str((machine + step) % machines) for step in (1, -1)} - {str(machine)}
        reports.append(
            Report(
                rank,
                machine,
                f"node{machine}",
                device="H100",
                busy=0.02,
                tflops=600.0 - 20 * (rank % 3),
                free_gib={"/runs": 900.0, "/tmp": 50.0 + machine},
                versions={"torch": "2.13.0", "the project's code": "abc"},
                offset_s=(0.002 * machine if first else None),
                offset_error_s=0.0001,
                within_gb_s=400.0 + machine if per_machine > 1 else None,
                pairs_gb_s=dict.fromkeys(neighbours, 45.0 + machine),
                all_gb_s=40.0,
            )
        )
    return reports


def only(rank: int, **changed: Any) -> Change:
    return lambda report: replace(report, **changed) if report.rank == rank else report


def machine(number: int, **changed: Any) -> Change:
    return lambda report: replace(report, **changed) if report.machine == number else report


def slow_link(number: int) -> Change:
    """A machine is slow with all others, and so are they with it."""

    def change(report: Report) -> Report:
        speeds = {
            other: 3.0 if number in (report.machine, int(other)) else speed
            for other, speed in report.pairs_gb_s.items()
        }
        return replace(report, pairs_gb_s=speeds)

    return change


def clock(number: int, offset_s: float, error_s: float = 0.0001) -> Change:
    def change(report: Report) -> Report:
        if report.machine != number or report.offset_s is None:
            return report
        return replace(report, offset_s=offset_s, offset_error_s=error_s)

    return change


FAULTS: dict[str, tuple[Change, str, str]] = {
    "no_device": (only(5, failures=("no CUDA device is available",)), "node2", "rank 5: no CUDA"),
    "another_device": (machine(1, device="A100"), "node1", "device is A100, and H100 elsewhere"),
    "a_device_in_use": (only(2, busy=0.4), "node1", "rank 2: other processes hold 40% of the mem"),
    "a_slow_device": (only(7, tflops=200.0), "node3", "rank 7: H100 computes 200 TFLOP/s"),
    "a_clock_behind": (clock(2, 7.0), "node2", "its clock is 7 s behind most others'"),
    "a_clock_ahead": (clock(3, -7.0), "node3", "its clock is 7 s ahead of most others'"),
    "a_full_disk": (
        machine(1, free_gib={"/runs": 900.0, "/tmp": 0.5}),
        "node1",
        "/tmp has 0.5 GiB free; expected at least min_free_disk_gib=10",
    ),
    "other_code": (
        machine(2, versions={"torch": "2.13.0", "the project's code": "xyz"}),
        "node2",
        "the project's code is xyz, and abc elsewhere",
    ),
    "another_version": (
        machine(0, versions={"torch": "2.12.1", "the project's code": "abc"}),
        "node0",
        "torch is 2.12.1, and 2.13.0 elsewhere",
    ),
    "a_missing_library": (
        machine(3, versions={"the project's code": "abc"}),
        "node3",
        "torch is none, and 2.13.0 elsewhere",
    ),
    "a_slow_bus": (machine(1, within_gb_s=20.0), "node1", "among its own ranks moves 20 GB/s"),
    "a_slow_network": (slow_link(2), "node2", "with other machines moves 3 GB/s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_machine_named(fault: str) -> None:
    change, host, text = FAULTS[fault]
    found = diagnose([change(report) for report in healthy(4)], LIMITS)
    assert {finding.host for finding in found} == {host}
    assert all(text in finding.text for finding in found)


@pytest.mark.parametrize("machines", [1, 2, 3, 5])
@pytest.mark.parametrize("per_machine", [1, 8])
def test_good_machines_are_left_alone(machines: int, per_machine: int) -> None:
    assert diagnose(healthy(machines, per_machine), LIMITS) == []


def test_of_two_machines_the_first_is_what_the_other_is_compared_with() -> None:
    skewed = [clock(1, 5.0)(report) for report in healthy(2)]
    assert [finding.host for finding in diagnose(skewed, LIMITS)] == ["node1"]
    other = [machine(1, device="A100")(report) for report in healthy(2)]
    assert [finding.host for finding in diagnose(other, LIMITS)] == ["node1"]


def test_when_the_first_clock_is_wrong_it_is_the_one_that_is_named() -> None:
    """All others are equally far from it."""
    reports = healthy(4)
    for number in (1, 2, 3):
        reports = [clock(number, -60.0)(report) for report in reports]
    assert {finding.host for finding in diagnose(reports, LIMITS)} == {"node0"}


def test_a_clock_is_wrong_only_beyond_what_the_network_hides() -> None:
    reports = [clock(2, 5.0, error_s=4.5)(report) for report in healthy(4)]
    assert diagnose(reports, LIMITS) == []


def test_a_bandwidth_below_the_threshold_is_named_on_every_machine() -> None:
    limits = replace(LIMITS, min_bandwidth_gb_s=46.5)
    found = diagnose(healthy(4), limits)
    assert [finding.host for finding in found] == ["node0", "node1"]
    assert found[0] == Finding(
        "node0",
        "an all-reduce with other machines moves 45 GB/s; expected at least "
        "min_bandwidth_gb_s=46.5",
    )


def test_speeds_are_not_compared_if_nobody_wants_that() -> None:
    limits = replace(LIMITS, min_relative_speed=0.0)
    reports = [slow_link(2)(only(7, tflops=1.0)(report)) for report in healthy(4)]
    assert diagnose(reports, limits) == []


def test_the_table_has_a_line_for_each_machine() -> None:
    lines = table(healthy(3)).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:3] == ["machine", "ranks", "device"]
    assert lines[2].split() == ["node1", "2-3", "H100", "560", "401", "46", "-2", "51"]
    assert lines[-1] == "all-reduce among all 6 ranks: 40 GB/s"
