"""An experiment that never was: its runs differ in all that a report has to tell."""

import math
from typing import Any

from tests.train.experiments.results import a_result
from train.experiments.result import (
    Curve,
    Estimate,
    Heldout,
    HeldoutCurve,
    Latency,
    Result,
    TaskScore,
)

STEPS = 512
TOKENS_PER_STEP = 2048

HOSTILE = """<script>alert("1")</script>&'|`$x_1$"""
"""What a report has to show as it is, wherever it comes from a run."""

GAINS = {
    "vanilla": 0.0,
    "naive_repeat-2": -0.03,
    "phd-2": -0.04,
    "phd_swa-2-16-inf": -0.06,
    "phd_cswa-2-4-32": -0.05,
    "phd_cswa-2-16-32": -0.055,
    "phd_cswa-3-16-32": -0.09,
}


def a_run(model: str, seed: int, *, gain: float, steps: int = STEPS, **values: Any) -> Result:
    """A run whose loss falls smoothly, and differs from that of other seeds."""
    family, *numbers = model.split("-")
    K = int(numbers[0]) if numbers else 1
    window, chunk = [*numbers[1:], "16", "32"][:2] if len(numbers) > 1 else ("16", "32")
    settings: dict[str, Any] = {
        "seed": seed,
        "model.variant": family,
        "model.K": K,
        "model.window": int(window),
        "model.chunk": 32 if chunk == "inf" else int(chunk),
        "model.size": "micro",
        "model.copy_embedding": False,
        "train.max_steps": steps,
        "optim.lr": 0.003,
    }
    settings |= values.pop("settings", {})
    per_token = 6.3e6 * (1 + 0.65 * (K - 1))
    shift = gain + 0.01 * (seed - 1)
    logged = list(range(8, steps + 1, 8))
    smooth = [3.5 + 4.5 * math.exp(-step / 90) + shift for step in logged]
    noisy = [
        loss + 0.15 * math.sin(step * 12.9 + seed)
        for step, loss in zip(logged, smooth, strict=True)
    ]
    over = {
        "tokens": [step * TOKENS_PER_STEP for step in logged],
        "flops": [step * TOKENS_PER_STEP * per_token for step in logged],
        "seconds": [step * 0.17 * K for step in logged],
    }
    some = slice(15, None, 16)
    bits = [loss * 0.6 for loss in smooth[some]]
    usual: dict[str, Any] = {
        "name": f"{model}-micro-seed_{seed}" if steps == STEPS else f"{model}-micro-{steps}-{seed}",
        "model": model,
        "seed": seed,
        "group": f"{model} {steps} {sorted(settings.items())[:-1]}".replace(f"'seed', {seed}", ""),
        "settings": settings,
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "train_flops": steps * TOKENS_PER_STEP * per_token,
        "flops_per_token": per_token,
        "train_s": steps * 0.17 * K,
        "tokens_per_s": 12000.0 / K,
        "kv_bytes": 8 * 2**20 * (K if family == "naive_repeat" else 1),
        "kv_hidden_bytes": 8 * 2**20 * (K - 1) if family == "naive_repeat" else 0,
        "loss": noisy[-1],
        "loss_ema": smooth[-1],
        "heldout": {
            "heldout": Heldout(
                bits_per_byte=Estimate(value=bits[-1], standard_error=0.01),
                loss=smooth[-1],
                tokens=60000,
                bytes=150000,
                documents=90,
            )
        },
        "curve": Curve(step=logged, loss=noisy, loss_ema=smooth, **over),
        "heldout_curves": {
            "heldout": HeldoutCurve(
                step=logged[some],
                bits_per_byte=bits,
                **{key: found[some] for key, found in over.items()},
            )
        },
    }
    return a_result(**(usual | values))


def an_experiment() -> list[Result]:
    """Variants with three seeds, one with one, FLOPs-matched vanilla, and runs that went wrong."""
    runs = [
        a_run(model, seed, gain=gain)
        for model, gain in GAINS.items()
        for seed in range(1 if model == "phd_cswa-2-4-32" else 3)
    ]
    latency = {
        model: [
            Latency(
                device="a GPU",
                dtype="bfloat16",
                context=4096,
                batch=1,
                prefill_ms=ms,
                decode_ms=2.0,
            )
        ]
        for model, ms in (("vanilla", 10.0), ("phd_cswa-2-16-32", 11.0))
    }
    score = TaskScore(
        accuracy=Estimate(value=0.3, standard_error=0.01),
        accuracy_norm=None,
        shots=5,
        questions=1000,
        chance=0.25,
    )
    runs = [
        a_run(
            r.model,
            r.seed,
            gain=GAINS[r.model],
            latency=latency[r.model],
            tasks={"arc_easy": score},
        )
        if r.model in latency and r.seed == 0
        else r
        for r in runs
    ]
    runs += [a_run("vanilla", seed, gain=-0.05, steps=848) for seed in range(3)]
    learned = {"model.copy_embedding": True}
    runs += [a_run("phd-2", 0, gain=-0.03, settings=learned, name="phd-2-micro-copy_embedding")]
    wrong = {"status": "failed", "reason": f"RuntimeError: {HOSTILE}", "loss": None}
    runs += [a_run("phd-2", 7, gain=0.0, name=HOSTILE, **wrong)]
    runs += [a_run("phd-2", 8, gain=0.0, status="diverged", reason="the loss is not finite")]
    return [*runs, a_run("phd-3", 0, gain=0.0, status="unfinished", reason="it was interrupted")]
