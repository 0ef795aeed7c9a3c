"""Where text comes from: files, Hub datasets, token files, and the documents of a run."""
