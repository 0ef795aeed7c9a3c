"""The coordinate check: one learning rate moves all widths alike with muP, and not without."""

import csv
import io
import json
import sysconfig
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from phd.model import Transformer
from train.arguments import BenchArguments
from train.bench import main
from train.benchmarks.coordinates import (
    QUANTITIES,
    Check,
    Coordinates,
    activations,
    python_text,
    words,
)
from train.settings.optim import OptimConfig

GROWING = {"attention", "feed-forward", "logits"}
"""What training changes more in wider models in the standard parametrisation."""


class Measured(NamedTuple):
    slopes: dict[tuple[str, str], float]
    lines: list[Coordinates]
    out: Path
    printed: str


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("bench")
    with redirect_stdout(io.StringIO()) as printed:
        main(BenchArguments(name="coordinates", widths=(64, 256), out=str(out), device="cpu"))
    report = json.loads((out / "coordinates.json").read_text(encoding="utf-8"))
    slopes = {(row["by"], row["work"]): row["slope of change"] for row in report["rows"]}
    with (out / "coordinates-steps.csv").open(encoding="utf-8", newline="") as file:
        lines = [
            Coordinates(
                *(row["parametrisation"], int(row["width"]), int(row["step"]), row["quantity"]),
                *(int(row["layer"]) if row["layer"] else None, float(row["size"])),
                float(row["change"]),
            )
            for row in csv.DictReader(file)
        ]
    return Measured(slopes, lines, out, printed.getvalue())


def test_what_training_changes_is_level_over_widths_with_mup_alone(measured: Measured) -> None:
    for (by, quantity), slope in measured.slopes.items():
        if by == "muP":
            assert abs(slope) < 0.4, quantity
        else:
            assert (slope > 0.5) == (quantity in GROWING), quantity
    told = next(line for line in measured.printed.split("\n") if line.startswith("standard: "))
    assert told.startswith("standard: training changes more in wider models: attention (as D^")


def test_all_that_was_measured_is_written_and_drawn(measured: Measured) -> None:
    found = {(x.parametrisation, x.width, x.step, x.quantity, x.layer) for x in measured.lines}
    assert len(found) == len(measured.lines) == 2 * 2 * 9 * (2 + 4 * 3)
    assert {x.quantity for x in measured.lines} == set(QUANTITIES)
    assert all((x.change == 0) == (x.step == 0) for x in measured.lines)
    # Where the width is muP's base, both parametrisations are one.
    base = [x[2:] for x in measured.lines if x.width == 64]
    assert base[: len(base) // 2] == base[len(base) // 2 :]
    pytest.importorskip("matplotlib")
    assert (measured.out / "coordinates.png").stat().st_size > 50_000


def test_activations_are_those_of_the_forward_pass_and_scores_of_what_is_seen(
    config: Any,
) -> None:
    model = replace(config().model, norm="pre")
    check = Check(model, (16, 32), OptimConfig())
    transformer = Transformer(check.model_of(32, "muP")).reset(0)
    tokens = torch.randint(0, 256, (2, 7))
    found = activations(transformer, tokens)
    assert torch.equal(found["logits", None], transformer.logits(tokens))
    stream = found["embedding", None][:, None]
    for layer in range(model.layers):
        stream = stream + found["attention", layer] + found["feed-forward", layer]
        torch.testing.assert_close(found["residual stream", layer], stream)
        assert found["scores", layer].shape == (2, 4, 1, 7, 7)
        assert found["scores", layer].triu(1).abs().max() == 0
    assert set(found) == set(activations(transformer, tokens))  # hooks are gone


def test_more_text_than_python_has_is_its_source_again(config: Any) -> None:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = b"".join(path.read_bytes() for path in files)
    check = Check(config().model, (16, 32), OptimConfig(), steps=1, rows=1, tokens=len(source))
    text = python_text(check, torch.device("cpu"))
    assert text.shape == (2, 1, len(source) + 1)
    assert bytes(text.flatten().tolist()) == (3 * source)[: text.numel()]


def test_what_shrinks_is_told_too() -> None:
    rows = [
        {"by": by, "work": work, "slope of change": slope}
        for by, slopes in (("standard", (-0.5, 1.0)), ("muP", (-0.001, 0.1)))
        for work, slope in zip(("embedding", "logits"), slopes, strict=True)
    ]
    assert words(rows) == [
        "standard: training changes more in wider models: logits (as D^1.00)",
        "standard: training changes less in wider models: embedding (as D^-0.50)",
        "muP: training changes everything equally at all widths (as D^0.00 to D^0.10)",
    ]


@pytest.mark.parametrize("widths", [(64,), (64, 96), (6, 12), (0, 64)])
def test_widths_that_do_not_grow_alike_are_refused(widths: tuple[int, ...]) -> None:
    (problem,) = BenchArguments(name="coordinates", widths=widths).problems()
    assert str(problem) == (
        f"widths={list(widths)}: expected at least two numbers, each a multiple of the smallest, "
        "and that one of 4"
    )
