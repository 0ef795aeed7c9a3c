"""The Parallel Hidden Decoding Transformer: pure torch, one device, no ranks, no files."""
