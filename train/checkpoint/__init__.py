"""Checkpoints: written completely or not at all, and the same for every engine."""
