"""A traceback becomes a few lines that name the exception and its place; other text stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.traces import Condenser, lost_another, summary

PLAIN = """Traceback (most recent call last):
  File "a.py", line 9, in <module>
    main()
    ^^^^^^
  File "b.py", line 3, in main
    raise ValueError(text)
    ^^^^^^^^^^^^^^^^^^^^^^
ValueError: seven
"""
CHAINED = f"""Traceback (most recent call last):
  File "z.py", line 1, in f
    {{}}["K"]
KeyError: 'K'

During handling of the above exception, another exception occurred:

{PLAIN}"""
HYDRA = f"""Error executing job with overrides: ['model.K=3']
{PLAIN}
Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.
"""
RANK = "".join(f"[rank3]: {line}\n" for line in PLAIN.splitlines())
NCCL = """[rank1]: Traceback (most recent call last):
[rank1]:   File "a.py", line 9, in <module>
[rank1]:     dist.all_reduce(x)
[rank1]: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77
[rank1]: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting
[rank1]: Exception raised from check at ProcessGroupNCCL.cpp:77 (most recent call first):
[rank1]: frame #0: c10::Error::Error(c10::SourceLocation) + 0x42 (0x7f in libc10.so)
[rank1]: frame #1: c10d::x() + 0x4 (0x7f in libtorch_cuda.so)
"""
SEGV = """Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "a.py", line 11 in deep
  File "a.py", line 17 in <module>

Extension modules: numpy, torch._C (total: 2)
"""
PLACE = ['File "b.py", line 3, in main', "raise ValueError(text)", "ValueError: seven"]
KINDS = {
    "plain": (PLAIN, PLACE),
    "chained": (CHAINED, PLACE),
    "hydra": (HYDRA, PLACE),
    "of_a_rank": (RANK, PLACE),
    "segmentation_fault": (
        SEGV,
        [
            "Fatal Python error: Segmentation fault",
            'File "a.py", line 11 in deep',
            'File "a.py", line 17 in <module>',
        ],
    ),
    "none": ("\nline 1\nline 2\n\nline 3\nline 4\n", ["line 2", "line 3", "line 4"]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_exception_and_its_place_are_told(kind: str) -> None:
    text, lines = KINDS[kind]
    assert summary(text) == lines


@pytest.mark.process
def test_pythons_own_tracebacks_are_understood(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("def f(n):\n    return f(n - 1) if n else {}['K']\nf(5)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    place, code, error = summary(done.stderr)
    assert place == f'File "{script}", line 2, in f'
    assert (code, error) == ("return f(n - 1) if n else {}['K']", "KeyError: 'K'")


def test_long_messages_are_cut_and_a_lost_connection_is_no_cause() -> None:
    assert len(summary(PLAIN.replace("seven", "seven " * 1000))[2]) < 400
    assert lost_another(summary(NCCL))
    assert not lost_another(summary(PLAIN))


def shown(condenser: Condenser, text: str, size: int) -> str:
    """What is shown at once of a text that comes in pieces."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return "".join(map(condenser.feed, pieces))


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("kind", ["plain", "chained", "hydra", "of_a_rank", "segmentation_fault"])
def test_a_traceback_is_held_back_from_its_first_line_on(kind: str, size: int) -> None:
    condenser = Condenser("rank_1.log")
    assert "line" not in shown(condenser, f"before\n{KINDS[kind][0]}", size)
    assert condenser.holds
    condenser.drop()
    assert shown(condenser, "after\n", size) == "after\n"


def test_a_traceback_of_a_process_that_goes_on_is_shown_in_brief() -> None:
    condenser = Condenser("rank_1.log")
    assert shown(condenser, f"before\n{PLAIN}after\n", 5) == "before\n"
    told = condenser.release().splitlines()
    assert told == ["Traceback, whole in rank_1.log:", *(f"  {line}" for line in PLACE), "after"]
    assert not condenser.holds


def test_other_text_passes_as_it_is_also_bars_that_overwrite_themselves() -> None:
    condenser = Condenser("rank_1.log")
    text = "10%\r20%\r30%\nwarning: a Traceback (most recent call last): within\n  indented\n"
    assert shown(condenser, text, 3) == text
    assert condenser.feed("no end") == ""
    assert condenser.end() == "no end"
