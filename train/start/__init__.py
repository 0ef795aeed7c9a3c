"""What a run starts with: its text, and its newest checkpoint or what `run.start_from` names."""
