"""What the files of a checkpoint are called, and how its index describes tensors."""

from typing import NamedTuple

import torch

from conf.errors import DataError

INDEX = "tensors.json"
"""Where each tensor's pieces are: `{name: {dtype, shape, pieces: [{start, shape, file, ...}]}}`."""

STATE = "state.json"
"""Everything that is not a tensor: step, cursors, config, ..."""


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
    """The inverse of `dtype_name`.

    Raises:
        DataError: this version of torch does not know it.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"{INDEX} names a dtype {name!r}, which this torch does not know")
    return dtype
