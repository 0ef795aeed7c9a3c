"""Hugging Face: the model as a transformers class, and weights to and from its checkpoints."""
