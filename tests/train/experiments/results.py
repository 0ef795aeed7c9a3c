"""Results of runs that never were, for tests of what is made of results."""

from typing import Any

from train.experiments.result import Result


def a_result(**values: Any) -> Result:
    """A finished run of a vanilla model, but for what is given."""
    usual: dict[str, Any] = {
        "name": "vanilla-micro",
        "status": "finished",
        "model": "vanilla",
        "size": "micro",
        "seed": 0,
        "config_hash": "0",
        "group": "vanilla",
        "differences": {},
        "settings": {},
        "command": "train/main.py model=vanilla",
        "commit": None,
        "changed": None,
        "versions": {},
        "device": "a processor",
        "devices": 1,
        "parameters": 1000,
        "embedding_parameters": 100,
        "steps": 10,
        "tokens": 1000,
        "train_flops": 1e6,
        "train_s": 10.0,
        "tokens_per_s": 100.0,
        "mfu": None,
        "loss": 3.0,
        "loss_ema": 3.0,
        "kv_context": 4096,
        "kv_bytes": 1000,
        "kv_hidden_bytes": 0,
        "flops_per_token": 1000.0,
    }
    return Result(**(usual | values))
