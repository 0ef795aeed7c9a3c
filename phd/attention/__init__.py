"""Attention by a pattern: one function, several backends with equal outputs and gradients."""
