"""What a run needs besides memory: text, time and disk."""
