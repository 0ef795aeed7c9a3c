"""Bad steps: how they are detected, what is done about them, what is written down."""
