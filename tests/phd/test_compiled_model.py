"""`torch.compile` changes nothing but the speed."""

import shutil

import pytest
import torch

from phd.config import ModelConfig
from phd.model import Transformer


# Torch's own code generator still imports its deprecated scripting.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler"
)
def test_the_compiled_loss_and_its_gradients_equal_the_eager_ones() -> None:
    config = ModelConfig(
        K=3, window=4, chunk=8, layers=2, dim=16, ffn_dim=24, head_dim=8, vocab_size=31
    )
    model = Transformer(config).reset(0)
    tokens, targets = torch.randint(0, 31, (2, 1, 20))
    results = []
    for loss in (model.loss, torch.compile(model.loss)):
        total = loss(tokens, targets).total
        results.append([total, *torch.autograd.grad(total, list(model.parameters()))])
    torch.testing.assert_close(*results)
