"""The Triton kernel, run by Triton's interpreter, equals attention as it is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

pytest.importorskip("triton", reason="needs triton, which comes with CUDA builds of torch")

# In a process of its own: Triton asks when it is imported whether it is to interpret.
SCRIPT = """
import torch
from phd.inference.split_kv import split_attention

dice = torch.Generator().manual_seed(0)
for B, G, rows, H, keys, splits in (
    (2, 2, 8, 16, 100, 3), (1, 2, 70, 24, 300, None), (2, 1, 1, 64, 64, 1), (1, 1, 5, 96, 130, 9)
):
    q, k, v = (torch.randn(B, G, n, H, generator=dice) for n in (rows, keys + 7, keys + 7))
    k, v = k[:, :, :keys], v[:, :, :keys]
    seen = torch.randint(1, keys + 1, (B, rows), generator=dice)
    for limit in (seen, None):
        out, lse = split_attention(q, k, v, limit, splits)
        scores = q @ k.mT * H**-0.5
        if limit is not None:
            hidden = torch.arange(keys) >= limit[:, None, :, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=2e-6)
"""


def test_the_kernel_equals_attention_as_it_is_written() -> None:
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
