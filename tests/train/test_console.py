"""The line below a training shows what matters at every width, and a log breaks between words."""

import io

import pytest
from rich.console import Console

from train.console import (
    KEPT_LOSSES,
    TrainingBar,
    curve,
    fold,
    print_line,
    training_progress,
    warn,
)

LINE = "step 20/450  loss 5.902  2.636 bits/byte  lr 4.55e-03  grad 1.07  4,348 tokens/s  0.91 GiB"
SENTENCE = "step 20/300  throughput/warning: rank 3, the slowest, waited for data 41% of the time; "
WIDTHS = (40, 60, 80, 100, 120, 200)


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, soft_wrap=True
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(width: int, *, total: int | None = 100_000, reports: int = 30) -> str:
    console = terminal(width)
    progress = training_progress(console)
    bar = TrainingBar(progress, 41, total)
    for step in range(42, 42 + reports):
        bar.update(step, {"train/loss": 10 - step / 20, "throughput/tokens_per_s": 512_345.6})
    console.print(progress.get_renderable())
    return printed(console)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("total", [450, 100_000, None])
def test_steps_time_left_and_speed_are_whole_at_every_width(width: int, total: int | None) -> None:
    text = shown(width, total=total)
    assert len(text.splitlines()) == 1
    assert len(text.rstrip("\n")) <= width
    assert f"step 71/{total}  eta " in text or (total is None and "step 71  eta " in text)
    if width >= 60:
        assert "512,346 tokens/s" in text
        assert "loss 6.450" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_loss_is_drawn_and_a_bar_where_there_is_room(width: int) -> None:
    text = shown(width, total=450)
    assert "█" in text
    assert text.rstrip().endswith("▁")
    assert text.startswith("━")
    assert text.count("─") >= 5


def test_before_the_first_report_there_is_what_is_known() -> None:
    assert shown(80, total=450, reports=0).rstrip().endswith("step 41/450  eta -:--:--")


def test_a_run_by_time_knows_its_end_without_steps() -> None:
    console = terminal(80)
    progress = training_progress(console)
    TrainingBar(progress, 0, None, max_time=7200.0)
    console.print(progress.get_renderable())
    assert "eta 1:59:59" in printed(console)


@pytest.mark.parametrize("reports", [1, KEPT_LOSSES, 5 * KEPT_LOSSES])
def test_the_curve_of_a_long_run_is_of_all_of_it(reports: int) -> None:
    bar = TrainingBar(training_progress(terminal(80)), 0, None)
    for step in range(reports):
        bar.update(step, {"train/loss": float(step), "throughput/tokens_per_s": 1.0})
    assert bar.losses[0] == 0
    assert bar.losses[-1] >= 0.98 * (reports - 1)
    assert len(bar.losses) <= KEPT_LOSSES
    bar.update(reports, {"train/loss": float("nan"), "throughput/tokens_per_s": 1.0})
    assert len(curve(bar.losses, 10)) == min(10, len(bar.losses))


@pytest.mark.parametrize("width", [20, *WIDTHS])
@pytest.mark.parametrize("text", [LINE, SENTENCE * 3, "no spaces/" * 30])
def test_a_log_line_breaks_between_items_or_words(text: str, width: int) -> None:
    console = terminal(width)
    print_line(console, text)
    lines = printed(console).splitlines()
    assert " ".join(printed(console).split()) == " ".join(text.split())
    for line in lines:
        assert len(line) <= width or len(line.split()) == 1
    if width >= 30 and text == LINE:
        assert all(item in printed(console) for item in LINE.split("  "))


def test_a_file_gets_each_line_whole_and_a_sample_is_left_alone() -> None:
    file = Console(file=io.StringIO(), width=30, soft_wrap=True)
    print_line(file, LINE)
    warn(file, SENTENCE)
    assert printed(file).splitlines() == [LINE, SENTENCE]
    console = terminal(30)
    sample = "step 3/6  a sample:\ndef f(x):\n        return [x, x, x, x, x, x]\n"
    print_line(console, sample)
    assert printed(console) == f"{sample}\n"


def test_a_warning_breaks_between_words() -> None:
    console = terminal(50)
    warn(console, SENTENCE)
    assert all(len(line) <= 50 for line in printed(console).splitlines())
    assert printed(console).split() == SENTENCE.split()


def test_folding_keeps_a_line_that_fits() -> None:
    assert fold(LINE, len(LINE)) == LINE
