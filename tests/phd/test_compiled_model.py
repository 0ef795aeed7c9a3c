"""`torch.compile` changes nothing but the speed."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from phd.config import ModelConfig
from phd.loss import fused_cross_entropy
from phd.model import Transformer
from phd.segments import Segments

# Dynamo's own: it instantiates autograd functions and reads `.grad` of what it traces.
pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]
# It traces, functionalises and differentiates as the default backend does, and builds no C++.
BACKEND = "aot_eager"


def model() -> Transformer:
    config = ModelConfig(
        K=3, window=4, chunk=8, layers=1, dim=16, ffn_dim=24, head_dim=8, vocab_size=31
    )
    return Transformer(config).reset(0)


def test_the_traced_loss_and_its_gradients_equal_the_eager_ones() -> None:
    eager = model()
    tokens, targets = torch.randint(0, 31, (2, 1, 20))
    results = []
    for loss in (eager.loss, torch.compile(eager.loss, backend=BACKEND)):
        total = loss(tokens, targets).total
        results.append([total, *torch.autograd.grad(total, list(eager.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_fused_loss_is_traced_once_for_any_number_of_rows() -> None:
    """It is one operator in the graph: nothing is broken in two, and no chunks are unrolled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(BACKEND)

    def mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fused_cross_entropy(hidden, weight, targets, 1e-4)[0] / len(hidden)

    traced = torch.compile(mean, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(70, 8, requires_grad=True)
    for rows in (5, 9, 12):
        hidden, targets = torch.randn(rows, 8, requires_grad=True), torch.randint(0, 70, (rows,))
        results = []
        for loss in (mean, traced):
            total = loss(hidden, weight, targets)
            results.append([total, *torch.autograd.grad(total, (hidden, weight))])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_traced_twice_at_most_the_model_holds_for_all_documents() -> None:
    """Once for the first number of documents, once for any other, and never broken in two."""
    torch.compiler.reset()
    eager, counter = model().double(), CompileCounterWithBackend(BACKEND)
    traced = torch.compile(eager, backend=counter, fullgraph=True)
    tokens = torch.randint(0, 31, (2, 20))
    for cuts in ([], [7], [3], [3, 15], list(range(1, 20))):
        opens = torch.zeros(2, 20, dtype=torch.int64)
        opens[1, cuts] = torch.tensor(cuts, dtype=torch.int64)
        segments = Segments.of(opens.cummax(1).values)
        results = []
        for call in (eager, traced):
            hidden = call(tokens, segments)
            total = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
            results.append([hidden, *torch.autograd.grad(total, list(eager.parameters()))])
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2
