"""What the evaluation of held-out text measures, and what makes no difference to it."""

import numpy as np
import pytest

from data.batch import Batch, BatchStats
from data.prefetch import never
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.evaluation.heldout_hook import HeldoutEvaluation


def held_out(rows: np.ndarray, mask: np.ndarray) -> Batch:
    """Rows of held-out text that stand for 100 bytes."""
    return Batch(rows, mask, stats=BatchStats(int(mask.sum()), mask.size, 100, {}, {}))


def test_padding_never_counts(config) -> None:
    settings = config()
    engine = FsdpEngine(settings, ProcessGroups())
    rows = np.random.default_rng(0).integers(0, 320, (3, 33))
    mask = np.ones((3, 32), dtype=bool)
    mask[2, 10:] = False
    other = rows.copy()
    other[2, 11:] = 5  # what the padding holds
    results = [
        HeldoutEvaluation(settings, engine, "x", held_out(r, mask), never) for r in (rows, other)
    ]
    assert results[0].measure() == results[1].measure()
    seen = HeldoutEvaluation(
        settings, engine, "x", held_out(other, np.ones_like(mask)), never
    ).measure()
    assert seen != results[0].measure()


@pytest.mark.parametrize("z_loss", [1e-4, 0.1, 3.0])
def test_the_held_out_loss_is_the_cross_entropy_alone(config, z_loss: float) -> None:
    rows = np.random.default_rng(0).integers(0, 320, (3, 33))
    text = held_out(rows, np.ones((3, 32), dtype=bool))
    plain, steered = (
        HeldoutEvaluation(c, FsdpEngine(c, ProcessGroups()), "x", text, never).measure()
        for c in (config(), config(f"optim.z_loss={z_loss}"))
    )
    assert steered == plain


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_evaluation_does_not_depend_on_the_micro_batch(micro_batch: int, config) -> None:
    rows = np.random.default_rng(0).integers(0, 320, (7, 33))
    text = held_out(rows, np.ones((7, 32), dtype=bool))
    whole, cut = config(), config(f"train.micro_batch={micro_batch}")
    metrics = [
        HeldoutEvaluation(c, FsdpEngine(c, ProcessGroups()), "x", text, never).measure()
        for c in (whole, cut)
    ]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)
