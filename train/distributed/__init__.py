"""What ranks tell each other: process groups, stop synchronisation, signals, the watchdog."""
