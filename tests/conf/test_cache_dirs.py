"""A home or a cache that cannot be written is told once, and another directory is used."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conf.cache_dirs import CACHES, COMPILED, DEFAULTS, use_writable_caches

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_variable_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (*CACHES, *DEFAULTS):
        monkeypatch.setenv(variable, "")  # so that what the test sets is undone
        monkeypatch.delenv(variable)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.mark.parametrize("home", ["/proc/1/nohome", "/sys/nohome", "/dev/null", "/dev/null/home"])
def test_a_home_that_cannot_be_written_is_told_once_and_left(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", home)
    use_writable_caches()
    told = capsys.readouterr().err
    for variable in CACHES:
        assert variable in told
        Path(os.environ[variable]).mkdir(parents=True)
        assert Path(os.environ[variable]).is_relative_to(tmp_path / "temporary")
    assert told.startswith(f"caches cannot be written ({home}/.cache/phd: ")
    use_writable_caches()
    assert capsys.readouterr().err == ""


def test_a_user_without_a_home_has_caches_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that runs under a number no user has."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    use_writable_caches()
    assert "Could not determine home directory" in capsys.readouterr().err
    assert Path(os.environ["PHD_CACHE"]).is_relative_to(tmp_path / "temporary")


def test_where_all_can_be_written_nothing_is_set_made_or_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    use_writable_caches()
    assert set(CACHES) & set(os.environ) == {COMPILED}
    assert list(home.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_one_cache_that_cannot_be_written_is_moved_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHD_CACHE", "/proc/1/cache")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    use_writable_caches()
    assert set(CACHES) & set(os.environ) == {"PHD_CACHE", COMPILED}
    told = capsys.readouterr().err
    assert "/proc/1/cache: No such file or directory" in told
    assert told.endswith(f"set PHD_CACHE, {COMPILED}\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "home/.cache/phd/torchinductor"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/phd/torchinductor"),
        ({"PHD_CACHE": "mine"}, "mine/torchinductor"),
        ({"PHD_CACHE": "mine", COMPILED: "other"}, "other"),
    ],
)
def test_what_is_compiled_is_kept_for_later_starts(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable, folder in given.items():
        monkeypatch.setenv(variable, str(tmp_path / folder))
    use_writable_caches()
    assert os.environ[COMPILED] == str(tmp_path / expected)


def test_without_any_place_each_user_of_a_cache_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/proc/1/nohome")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/1/none")
    use_writable_caches()
    assert not set(CACHES) & set(os.environ)


DATASETS = """
import sys
from conf.cache_dirs import use_writable_caches
use_writable_caches()
from data.config import DatasetsSource
from data.sources.hub import HubCorpus
source = DatasetsSource(kind="datasets", path="json", data_files=sys.argv[1])
print(sum(1 for _ in HubCorpus("x", source).documents(0, 1)))
"""


@pytest.mark.process
def test_datasets_read_without_a_home(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", DATASETS, str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": "/proc/1/nohome", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr
