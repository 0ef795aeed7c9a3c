"""The sections of a run's settings, in a file each that has the section's name."""
