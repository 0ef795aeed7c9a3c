"""Pretraining runs: the commands a user types, the loop, checkpoints and hooks."""
