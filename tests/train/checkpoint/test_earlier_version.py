"""A run of version 0.1, before the code was laid out anew, goes on as it went on then."""

import json
import shutil
from pathlib import Path

import pytest

from train.checkpoint.load_run import load_run
from train.engines.device import choose_device
from train.settings.engine import FsdpConfig

EARLIER = Path(__file__).with_name("run_of_0_1")

# The settings of that run, beside those of every small run.
SETTINGS = (
    *("model=phd_cswa", "model.K=3", "model.copy_embedding=true", "schedule=constant"),
    *("optim.lr=5e-3", "hooks.sample.prompt='def '"),  # the defaults of its time
)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy of the directory that it left after 3 steps."""
    return Path(shutil.copytree(EARLIER, tmp_path / "run"))


def test_its_checkpoint_goes_on(earlier: Path, config, trained, logged) -> None:
    """Losses, gradients and evaluation are those that version 0.1 computed from there.

    Its texts were drawn by other numbers, so of them the file holds the prompt alone.
    """
    trained(config(f"run.dir={earlier}", *SETTINGS))
    expected = json.loads((earlier / "continued.json").read_text(encoding="utf-8"))
    lines = logged(earlier)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, before in zip(lines, expected, strict=True):
        for name, value in before.items():
            if name == "sample/text":
                assert line[name].startswith(value), name
                continue
            exact = isinstance(value, str)
            assert line[name] == (value if exact else pytest.approx(value, rel=1e-5)), name


def test_its_model_is_read_without_a_run(earlier: Path) -> None:
    loaded = load_run(earlier, choose_device(FsdpConfig(device="cpu")))
    assert (loaded.step, loaded.model.config.name) == (3, "phd_cswa-3-3-4")
