"""From text to batches of token rows, as a pure function of the config, the seed and the step."""
