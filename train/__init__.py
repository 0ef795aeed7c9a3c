"""Pretraining runs: the commands a user types, the loop, checkpoints and hooks."""

import os

# The OpenMP of PyTorch reads this once, when torch is loaded, so it is set here, before anything
# of this package is. By default a thread that waits for another spins for milliseconds: on two
# cores with one other busy process a training step then takes 2.5 times as long. With next to none
# (100), threads sleep between the small operations of decoding, which takes a fourth longer.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
