"""What a run starts with: its text, its newest checkpoint, or another run's weights or trunk."""
