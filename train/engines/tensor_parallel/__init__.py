"""Tensor parallelism: matrices cut over neighbouring ranks, applied to a model from outside."""
