"""A run's directory, and the source code that is kept in it."""
