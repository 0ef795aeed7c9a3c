"""The measurements behind `python train/bench.py`."""
