"""What a new run starts from: the weights, moments and tokenizer of `run.start_from`."""
