"""What `auto` chooses is the least recomputation and the most rows that fit, on every rank."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.errors import ConfigError
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.accelerators import ACCELERATORS
from train.engines.device import device_memory, machine_memory
from train.engines.memory import FITS, LEVELS, divisors, fit, predict_memory
from train.loop import train_step
from train.run import open_engine

BF16 = torch.bfloat16
K3 = ("size=1b2", "model=phd_cswa", "model.K=3", "engine.compile=false")


def choice(*overrides: str, gib: float | None, **given: Any) -> dict[str, int | str]:
    """What is chosen for a GPU of this memory."""
    available = None if gib is None else int(gib * 2**30)
    settings: dict[str, Any] = {"device": "cuda", "available": available, **given}
    return fit(load([*K3, *overrides]), BF16, **settings).chosen


def chosen(recompute: str, rows: int | None = None) -> dict[str, int | str]:
    found: dict[str, int | str] = {"engine.activation_checkpointing": recompute}
    return found if rows is None else found | {"train.micro_batch": rows}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_default_settings_fit_four_rows_of_three_copies_into_80_gb(compiled: bool) -> None:
    config = load([*K3, f"engine.compile={str(compiled).lower()}"])
    assert config.train.micro_batch == 4
    available = int(ACCELERATORS["H100"].memory_gib * 2**30)
    found = fit(config, BF16, device="cuda", available=available)
    assert found.chosen == chosen("selective")
    assert predict_memory(found.config, BF16, device="cuda").total < 0.9 * available


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (400, "none"),
        (139.7, "none"),
        (79.1, "selective"),
        (48, "full"),
        (10, "full"),
        (None, "none"),
    ],
)
def test_the_least_recomputation_that_fits_is_chosen(gib: float | None, expected: str) -> None:
    assert choice(gib=gib) == chosen(expected)


@pytest.mark.parametrize("gib", [14, 16, 23.5, 39.4])
def test_the_chosen_rows_fit_and_no_others_would_be_better(gib: float) -> None:
    shape = ("size=550m", "model=vanilla", "engine.compile=false", "train.micro_batch=auto")
    config = load([*shape, "train.global_batch=6", "data.lanes=1"])
    available = int(gib * 2**30)

    def fits(recompute: str, rows: int) -> bool:
        engine = replace(config.engine, activation_checkpointing=recompute)  # type: ignore[arg-type]
        train = replace(config.train, micro_batch=rows)
        settled = replace(config, engine=engine, train=train)
        return predict_memory(settled, BF16, device="cuda").total <= FITS["cuda"] * available

    best = next(
        chosen(recompute, rows)
        for recompute in LEVELS
        for rows in reversed(divisors(6))
        if fits(recompute, rows)
    )
    assert fit(config, BF16, device="cuda", available=available).chosen == best


def test_where_not_one_row_fits_the_key_and_the_bytes_are_told() -> None:
    with pytest.raises(ConfigError) as error:
        choice("train.micro_batch=auto", gib=16)
    [problem] = error.value.problems
    assert problem.key == "train.micro_batch"
    for part in ("one row of train.seq_len=4096", " GiB with engine.activation_checkpointing=full",
                 "the device has 16 GiB", "more ranks"):  # fmt: skip
        assert part in str(problem)


def test_what_is_given_is_kept_and_what_is_chosen_divides_a_ranks_rows() -> None:
    given = ("engine.activation_checkpointing=none", "train.micro_batch=1")
    config = load([*K3, *given])
    found = fit(config, BF16, device="cuda", available=1)
    assert found == (config, {})
    for ranks in (4, 16):
        rows = choice("train.micro_batch=auto", "train.global_batch=48", "data.lanes=16",
                      gib=79.1, world_size=ranks)["train.micro_batch"]  # fmt: skip
        assert isinstance(rows, int)
        assert (48 // ranks) % rows == 0


def test_on_the_cpu_nothing_is_computed_again_and_half_of_the_memory_is_taken(config) -> None:
    settings = config("train.global_batch=12", "train.micro_batch=auto")
    most = fit(settings, torch.float32, available=1 << 40).chosen
    assert most == chosen("none", 12)
    one = replace(settings, train=replace(settings.train, micro_batch=1))
    memory = predict_memory(fit(one, torch.float32).config, torch.float32)
    assert fit(settings, torch.float32, available=2 * memory.total).chosen == chosen("none", 1)


def test_the_memory_of_this_machine_is_shared_by_its_processes() -> None:
    cpu = torch.device("cpu")
    assert 2**28 < machine_memory() == device_memory(cpu)
    assert device_memory(cpu, 4) == machine_memory() // 4


# In the engine

SMALL = (
    *("data=files", "data.sources.files.paths=unread.jsonl", "data.lanes=1", "hooks=quiet"),
    *("model.K=3", "model.layers=2", "model.dim=16", "model.ffn_dim=24", "model.heads=2"),
    *("model.kv_heads=1", "model.head_dim=8", "model.vocab_size=64", "model.max_seq_len=32"),
    *("train.max_steps=9", "train.global_batch=8", "train.seq_len=32", "hooks.sample.tokens=4"),
    *("engine.device=cpu", "train.micro_batch=auto"),
)
ROWS = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(0))


def steps(
    groups: ProcessGroups, config: Config, processes: list[tuple[int, ...]]
) -> list[tuple[int, float, float]]:
    """For each case what is chosen, and a step of it.

    A case says how many processes share the memory of each rank's machine.
    """
    found = []
    for case in processes:
        dist_env = replace(groups.dist_env, local_world_size=case[groups.rank])
        engine = open_engine(config, replace(groups, dist_env=dist_env))
        result = train_step(engine, batch_of(ROWS[groups.rank :: groups.world_size]), 1e-3)
        assert result is not None
        found.append((engine.micro_batch, result.loss.item(), result.grad_norm.item()))
    return found


@pytest.mark.process
def test_the_smallest_device_decides_for_all_ranks_and_the_step_stays_the_same() -> None:
    config = load(SMALL)
    [(most, loss, norm)] = steps(ProcessGroups(), config, [(1,)])
    assert most == 8
    one = replace(config, train=replace(config.train, micro_batch=1))
    settled = fit(one, torch.float32, world_size=2).config
    many = machine_memory() // (2 * predict_memory(settled, torch.float32, 2).total)
    for cases in run_ranks(2, steps, config, [(1, 1), (1, many), (many, 1)]):
        for found, rows in zip(cases, (4, 1, 1), strict=True):
            assert found[0] == rows
            assert found[1:] == pytest.approx((loss, norm), rel=1e-5)
