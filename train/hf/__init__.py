"""Hugging Face model directories and tokenizers, read and written."""
