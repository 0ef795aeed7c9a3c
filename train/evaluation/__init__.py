"""What a trained model is worth: its loss on any text, and its answers to downstream tasks."""
