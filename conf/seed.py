"""The type of a seed in a configuration."""

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(lt=2**64), "an integer from 0 to below 2^64"]
"""Generators of PyTorch hold it in 64 bits without a sign. `at_least` looks for negative ones."""
