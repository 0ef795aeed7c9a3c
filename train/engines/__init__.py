"""How a model is trained on one device or many: FSDP2, DDP, HSDP and DeepSpeed's ZeRO."""
