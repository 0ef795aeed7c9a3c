"""A result is read as it was written, and what is no result is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import DataError
from tests.train.experiments.results import a_result
from train.experiments.result import Curve, Estimate, Heldout, Latency, read_result, write_result


def test_what_was_written_is_read(tmp_path: Path) -> None:
    text = Heldout(bits_per_byte=Estimate(value=1.5), loss=3.0, tokens=10, bytes=20)
    curve = Curve(step=[1], tokens=[2], flops=[3.0], seconds=[0.5], loss=[6.0], loss_ema=[6.0])
    speed = Latency(
        device="GPU", dtype="bfloat16", context=9, batch=1, prefill_ms=None, decode_ms=1.5
    )
    written = replace(a_result(), heldout={"python": text}, curve=curve, latency=[speed])
    assert read_result(write_result(tmp_path, written)) == written


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no result of a run"),
        ("[]", "is no result of a run"),
        ('{"version": 1}', "is no result of a run"),
        ('{"version": 2}', "has the form 2, and this version of the program reads 1"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_result(path)
