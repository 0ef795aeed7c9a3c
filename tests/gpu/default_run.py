"""The default run from end to end: uninterrupted, killed and continued, and exported in bf16."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import torch

from tests.gpu.lines import FAIL, PASS, tell
from train.checkpoint.load_run import load_run

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-2
"""By which a loss or a logit may differ, as a part of the largest. The CPU's are equal."""

SIZES = {
    "cuda": (),
    "cpu": (
        *("model.layers=2", "model.dim=32", "model.ffn_dim=48", "model.heads=2"),
        *("model.kv_heads=1", "model.head_dim=16", "train.seq_len=32", "train.max_steps=40"),
        *("checkpoint.every=10", "eval.rows=8", "engine.threads=1"),
    ),
}


def command(run: Path, device: str) -> list[str]:
    """The default run, in a directory of its own; on the CPU a smaller one."""
    own = [f"run.dir={run}", f"engine.device={device}", "hooks.log_every=1"]
    return [sys.executable, str(ROOT / "train/main.py"), *SIZES[device], *own]


def started(words: list[str]) -> subprocess.Popen[bytes]:
    # What it prints goes to the log of this part, where it is looked for if something fails.
    return subprocess.Popen(words, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True)


def losses(run: Path) -> dict[int, float]:
    """The training loss of each step that the run has logged; of a repeated step the last one."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["train/loss"] for line in whole if "train/loss" in line}


def checkpoints(run: Path) -> list[int]:
    """The steps of the whole checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/COMPLETE"))


def killed(run: Path, device: str, deadline_s: float = 120) -> int | None:
    """Start the run and kill it after its first checkpoint; the last step of its log, or None if
    it ended before."""
    process = started(command(run, device))
    end = monotonic() + deadline_s
    while not checkpoints(run) and monotonic() < end:
        if process.poll() is not None:
            return None
        sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    return max(losses(run), default=0) if process.wait() == -signal.SIGKILL else None


def apart(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest difference of a step's losses, as a part of the loss; infinite if one lacks."""
    if not expected or found.keys() != expected.keys():
        return float("inf")
    return max(abs(found[step] - loss) / loss for step, loss in expected.items())


def check_resuming(folder: Path, device: str) -> Path:
    """Tell of the uninterrupted run, of the kill and of the rest; return the continued run."""
    whole, cut = folder / "whole", folder / "cut"
    code = started(command(whole, device)).wait()
    expected = losses(whole)
    last = expected.get(max(expected, default=0))
    fine = PASS if code == 0 and last is not None else f"{FAIL}: exit code {code}"
    tell({"what": "uninterrupted", "steps": len(expected), "last loss": last, "result": fine})
    step = killed(cut, device)
    saved = checkpoints(cut)
    fine = PASS if step is not None and saved else f"{FAIL}: ended before the kill"
    what = f"killed by SIGKILL, saved at step {saved[-1] if saved else None}"
    tell({"what": what, "steps": step, "last loss": losses(cut).get(step or 0), "result": fine})
    code = started(command(cut, device)).wait()
    found = losses(cut)
    differ = apart(found, expected)
    fine = PASS if code == 0 and differ <= TOLERANCE else f"{FAIL}: exit code {code}"
    tell(
        {
            "what": "the same command again",
            "steps": len(found),
            "last loss": found.get(max(found, default=0)),
            "apart": differ,
            "result": fine,
        }
    )
    return cut


def check_export(run: Path, out: Path, device: str) -> None:
    """Tell whether transformers computes the run's logits from its export in bf16."""
    from transformers import AutoModelForCausalLM

    words = [sys.executable, str(ROOT / "train/export.py"), f"run={run}", f"out={out}"]
    if code := started([*words, "dtype=bfloat16"]).wait():
        tell({"what": "bf16 export", "result": f"{FAIL}: exit code {code}"})
        return
    ours = load_run(run, torch.device(device)).model.to(torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(out), trust_remote_code=True, dtype=torch.bfloat16
    ).to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 64), generator=generator).to(device)
    with torch.no_grad():
        with torch.autocast(device, torch.bfloat16):  # norms and residuals of ours are float32
            expected = ours.logits(tokens).float()
        found = theirs(input_ids=tokens).logits.float()
    differ = ((found - expected).abs().max() / expected.abs().max()).item()
    fine = PASS if differ <= TOLERANCE else FAIL
    tell({"what": "bf16 export, logits in transformers", "apart": differ, "result": fine})


def main(device: str) -> None:
    """Print a row for each claim."""
    with tempfile.TemporaryDirectory() as folder:
        run = check_resuming(Path(folder), device)
        check_export(run, Path(folder) / "exported", device)


if __name__ == "__main__":
    main(sys.argv[1])
