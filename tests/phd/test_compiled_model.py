"""`torch.compile` changes nothing but the speed."""

import pytest
import torch

from phd.config import ModelConfig
from phd.model import Transformer


# Dynamo's own: it instantiates autograd functions and reads `.grad` of what it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_traced_loss_and_its_gradients_equal_the_eager_ones() -> None:
    # It traces, functionalises and differentiates as the default backend does, and builds no C++.
    backend = "aot_eager"
    config = ModelConfig(
        K=3, window=4, chunk=8, layers=1, dim=16, ffn_dim=24, head_dim=8, vocab_size=31
    )
    model = Transformer(config).reset(0)
    tokens, targets = torch.randint(0, 31, (2, 1, 20))
    results = []
    for loss in (model.loss, torch.compile(model.loss, backend=backend)):
        total = loss(tokens, targets).total
        results.append([total, *torch.autograd.grad(total, list(model.parameters()))])
    torch.testing.assert_close(*results)
