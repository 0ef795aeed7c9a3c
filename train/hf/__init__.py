"""Reading and writing Hugging Face model directories and tokenizers."""
