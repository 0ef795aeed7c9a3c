"""The names of a checkpoint's files, and the dtypes and shapes in its index."""

from typing import NamedTuple

import torch

from conf.errors import DataError

INDEX = "tensors.json"
"""The index of the tensors: `{name: {dtype, shape, pieces: [{start, shape, file, ...}]}}`."""

STATE = "state.json"
"""Everything that is not a tensor: the step, the cursors, the config, ..."""


TOKENIZER = "tokenizer.model"
"""The run's SentencePiece model; checkpoints of earlier versions have none."""


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name; the inverse of `dtype_name`.

    Raises:
        DataError: this version of torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"{INDEX} names a dtype {name!r}, which this torch does not know")
    return dtype
