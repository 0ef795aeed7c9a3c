"""How a model is trained on the hardware at hand: FSDP2, DDP, HSDP and DeepSpeed's ZeRO."""
