"""The profile of a few steps (`train.profile`): a trace, and where the time of a step goes."""
