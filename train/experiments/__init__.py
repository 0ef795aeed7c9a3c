"""From the runs of an experiment to a figure: the ledger, comparisons, fits and the report."""
