"""Stored masks, outputs and gradients, computed in float64 one slot at a time, are reproduced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from phd.attention.attend import attend
from phd.config import Backend, ModelConfig
from phd.pattern import Pattern

FOLDER = Path(__file__).parent / "oracle"
CASES = json.loads((FOLDER / "index.json").read_text())
NAMES = [Path(case["file"]).stem for case in CASES]


def pattern_of(case: dict) -> Pattern:
    named = {"K": "K", "W": "window", "C": "chunk", "span_unit": "span_unit"}
    settings = {ours: case[theirs] for theirs, ours in named.items() if theirs in case}
    return Pattern.of(ModelConfig(variant=case["rule"], **settings))


def tensors_of(case: dict) -> dict[str, Tensor]:
    with np.load(FOLDER / case["file"]) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_mask_is_the_stored_one(case: dict) -> None:
    assert torch.equal(pattern_of(case).mask(case["T"]), tensors_of(case)["mask"])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("backend", ["reference", "packed"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_output_and_gradients_are_the_stored_ones(
    case: dict, backend: Backend, dtype: torch.dtype, atol: float
) -> None:
    stored = tensors_of(case)
    q, k, v = (stored[name].to(dtype).requires_grad_() for name in "qkv")
    out = attend(q, k, v, pattern_of(case), backend)
    gradients = torch.autograd.grad(out, (q, k, v), stored["dout"].to(dtype))
    for name, ours in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        torch.testing.assert_close(
            ours.double(), stored[name], rtol=0, atol=atol, msg=f"{name}: {{}}".format
        )
