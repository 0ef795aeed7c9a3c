"""Batches of tensors, as tests draw them."""

from torch import Tensor

from data.batch import Batch


def batch_of(rows: Tensor, mask: Tensor | None = None, starts: Tensor | None = None) -> Batch:
    """The batch of rows, int64 (B, T+1), with what else is given; shares their memory."""
    return Batch(*(None if x is None else x.numpy() for x in (rows, mask, starts)))
