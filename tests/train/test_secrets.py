"""A password or a signature of a URL stays in config.yaml, which its owner alone can read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.storage.fault_server import serving
from tests.forked_python import forked_python

REPOSITORY = Path(__file__).parents[2]
PASSWORD, SIGNATURE, KEY = (
    "my-pass-4711",
    "5ignature0815",
    "0123456789abcdef0123456789abcdef01234567",
)


@pytest.mark.process
def test_no_file_and_no_output_of_a_run_holds_a_secret(
    small_at: Callable[..., list[str]], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "text.jsonl").write_bytes(b"not JSON\n" + corpus.read_bytes())
    (tmp_path / "work").mkdir()
    with serving(folder, password=f"user:{PASSWORD}") as server, forked_python():
        address = server.url.removeprefix("http://")
        url = f"http://user:{PASSWORD}@{address}/text.jsonl?sig={SIGNATURE}"
        arguments = [
            *(text for text in small_at(tmp_path) if not text.startswith("run.dir=")),
            *("hooks.console=true", "hooks.wandb.mode=offline"),
            f"data.sources.files.paths='{url}'",
            "train.max_steps=1,2",  # a sweep, whose overrides Hydra writes
            "hydra.sweep.dir=sweep",
        ]
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "train/main.py"), "-m", *arguments],
            cwd=tmp_path / "work",
            env={**os.environ, "WANDB_API_KEY": KEY},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    for secret in (PASSWORD, SIGNATURE, KEY):
        assert secret not in done.stdout + done.stderr
    written = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"environment.json", "quarantine.jsonl", "state.json", "metrics.jsonl"} <= names
    assert any(path.suffix == ".wandb" for path in written)
    holding = {
        path
        for path in written
        if any(secret.encode() in path.read_bytes() for secret in (PASSWORD, SIGNATURE, KEY))
    }
    assert {path.name for path in holding} == {"config.yaml", "multirun.yaml"}
    assert {path.stat().st_mode & 0o777 for path in holding} == {0o600}
