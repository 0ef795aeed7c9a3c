"""The plan of a run: compute, memory, text, time and disk, and what is odd about them."""
