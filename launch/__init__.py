"""Starts the processes of a run: torchrun's agent, SLURM, Kubernetes. Knows nothing of models."""
