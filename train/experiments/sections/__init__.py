"""The sections of a report: each is a function of the experiment, which may have nothing to say."""
