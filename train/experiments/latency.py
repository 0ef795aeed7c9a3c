"""The speed of a run's model at inference, from the `inference.json` in the run's directory.

`python train/bench.py inference run=<directory>` writes it. Its rows tell of the run's model, and
of vanilla of the same shape, beside which it was timed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conf.errors import DataError
from phd.config import ModelConfig
from train.experiments.result import Latency

FILE = "inference.json"


def read_latency(directory: Path, model: ModelConfig) -> list[Latency]:
    """What was measured of a run's model, by the length of the context; [] if nothing was.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / FILE
    try:
        report = json.loads(path.read_bytes())
        if not report["complete"]:
            return []
        return latency_of(report["rows"], report["machine"], model)
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: is damaged ({why}); delete it and measure again") from None


def latency_of(
    rows: Iterable[Mapping[str, Any]], machine: Mapping[str, Any], model: ModelConfig
) -> list[Latency]:
    """The rows of a model at batch 1, prefill and decode of one length joined.

    Args:
        rows: as `bench.py inference` writes them.
        machine: the environment of the benchmark.
        model: whose rows are taken.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        if (row["variant"], row["K"]) == model.kind:
            times.setdefault(row["tokens"], {})[row["work"]] = row["ms"]
    on_cpu = machine["device"] == "cpu"
    return [
        Latency(
            device=machine["processor"] if on_cpu else machine["device"],
            dtype="float32" if on_cpu else "bfloat16",
            context=tokens,
            batch=1,
            prefill_ms=times[tokens].get("prefill"),
            decode_ms=times[tokens].get("decode"),
        )
        for tokens in sorted(times)
    ]
