"""The table of costs in docs/neighbours.md says what the code computes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phd.config import ModelConfig
from phd.flops import training_flops
from phd.inference.cache import KVCache, kv_bytes
from phd.inference.equal_rows import EqualRows
from phd.model import number_of_parameters
from phd.pattern import patterns_of
from phd.rope import Rope
from train.compose import load

PAGE = Path(__file__).parents[3] / "docs" / "neighbours.md"
HEADER = "| variant | parameters added | training FLOPs | prefill | decode: slots, keys read |"
T = 4096


def table() -> dict[str, list[str]]:
    """The cells of each row, by its variant."""
    lines = PAGE.read_text(encoding="utf-8").split(HEADER)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0].replace("`", ""): cells[1:] for cells in rows[: rows.index([""])]}


TABLE = table()


def config_of(row: str) -> ModelConfig:
    name, _, full_every = row.partition(", full_every=")
    positions = "flattened" if name.startswith("hidden_decoding") else "shared"
    model = replace(load(["size=550m"]).model, copy_positions=positions)
    return replace(model.as_variant(name), full_every=int(full_every or 1))


def value_of(formula: str, model: ModelConfig) -> int:
    """A formula of the table, in which letters that stand together are multiplied."""
    names = {"T": T, "L": model.layers, "D": model.dim, "V": model.vocab_size, "P": model.passes}
    names |= {"W": model.window, "w": model.window, "C": model.chunk}
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.removesuffix(" at most"))
    return int(eval(product, {"__builtins__": {}}, names))


def slots_of_a_prompt(model: ModelConfig) -> int:
    """The slots that pass through the first layer of each pass, of a prompt of T tokens."""
    cache = KVCache(model, capacity=T, device="meta")
    with torch.device("meta"):
        rows = EqualRows(cache, Rope(model), T, keep=1)
    firsts = range(0, model.depth, model.layers)
    return sum(
        1 if rows.is_again(i) else rows.cached + rows.spans[i] * rows.hidden_per_token
        for i in firsts
    )


def test_the_table_has_every_variant_of_the_sweep() -> None:
    of_sweep = {"vanilla", "phd_cswa", "phd", "phd_swa", "naive_repeat", "hidden_decoding"}
    of_sweep |= {"pause", "free_pause", "sps", "loop"}
    assert {re.split(r"[-,]", row)[0] for row in TABLE} == of_sweep


@pytest.mark.parametrize("row", TABLE)
def test_every_figure_of_the_table_is_the_codes(row: str) -> None:
    model, (added, flops, prefill, decode, bytes_) = config_of(row), TABLE[row]
    vanilla = model.vanilla_twin
    number, _, formula = added.partition(" (")
    more = number_of_parameters(model) - number_of_parameters(vanilla)
    assert int(number.replace(",", "")) == more
    assert value_of(formula.rstrip(")") or "0", model) == more
    ratio = training_flops(model, T) / training_flops(vanilla, T)
    assert flops in (f"{ratio:.3f}", f"{ratio:.0f}" * (ratio == 1))
    assert value_of(prefill, model) == slots_of_a_prompt(model)
    slots, keys, *_ = re.split("[,;]", decode)
    assert int(slots) == model.K
    assert value_of(keys.strip(), model) == sum(patterns_of(model)[-1].cached_slots(T))
    passes = " in P L layers" in decode
    assert passes == (model.passes > 1)
    theirs, ours = (kv_bytes(c, T, torch.bfloat16).total for c in (vanilla, model))
    assert bytes_ == f"{ours / theirs:.4f}".rstrip("0").rstrip(".")


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("pause", ("pause-2", "learned", "shared", 1)),
        ("free_pause", ("free_pause-2", "learned", "shared", 1)),
        ("sps", ("sps-2-16", "learned", "shared", 1)),
        ("hidden_decoding", ("hidden_decoding-2", "table", "flattened", 1)),
        ("loop", ("loop-2", "token", "shared", 2)),
    ],
)
def test_a_chosen_neighbour_is_what_the_page_says(
    group: str, expected: tuple[str, str, str, int]
) -> None:
    model = load([f"model={group}"]).model
    found = model.name, model.hidden_input, model.copy_positions, model.passes
    assert found == expected
