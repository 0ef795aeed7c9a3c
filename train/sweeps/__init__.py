"""Several runs of one command line: one after another or side by side, and what came of them."""
