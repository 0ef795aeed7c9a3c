"""The table of KV bytes sets a variant beside those that it has to be compared with."""

import pytest
import torch

from phd.inference.cache import kv_bytes
from train.compose import load
from train.costs.kv_cache import kv_rows


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa", "naive_repeat"])
def test_the_kv_table_sets_a_variant_beside_vanilla_and_repetition(variant: str) -> None:
    model = load([f"model={variant}", *(["model.K=3"] if variant != "vanilla" else [])]).model
    rows = {row.name: row for row in kv_rows(model, 1000, torch.bfloat16)}
    base = kv_bytes(model.vanilla_twin, 1000, torch.bfloat16).total
    repetition = [] if variant == "vanilla" else ["naive_repeat-3"]
    assert list(rows) == list(dict.fromkeys([model.name, "vanilla", *repetition]))
    assert (rows["vanilla"].total, rows["vanilla"].ratio) == (base, 1.0)
    assert [rows[name].ratio for name in repetition] == [3.0] * len(repetition)
    cost = kv_bytes(model, 1000, torch.bfloat16)
    assert rows[model.name][1:] == (cost.total, cost.hidden, cost.total / base)


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa"])
def test_with_one_copy_the_kv_table_has_no_row_of_repetition(variant: str) -> None:
    model = load([f"model={variant}", "model.K=1"]).model
    rows = kv_rows(model, 1000, torch.bfloat16)
    assert [row.name for row in rows] == list(dict.fromkeys([model.name, "vanilla"]))
    assert {row.ratio for row in rows} == {1.0}
