"""Scaling laws that are fitted to the losses of runs."""
