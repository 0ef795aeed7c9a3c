"""Prefill, decode and sampling through the KV cache."""
