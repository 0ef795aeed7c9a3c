"""The compiler for GPUs outlives its own death."""

import pytest

from tests.gpu_compiler import _compiler, compile_for_gpus


def test_another_compiler_is_started_when_one_has_died() -> None:
    assert compile_for_gpus([]) == []
    _compiler().kill()
    _compiler().wait()
    with pytest.raises(AssertionError, match="died with exit code -9"):
        compile_for_gpus([])
    assert compile_for_gpus([]) == []
