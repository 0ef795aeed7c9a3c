"""The source of a run is kept once, whatever git knows of it."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from train.run_dir.snapshot import PACKAGES, ROOT, read_revision, write_snapshot


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a commit of the packages."""
    root = tmp_path / "root"
    for package in PACKAGES:
        (root / package / "__pycache__").mkdir(parents=True)
        (root / package / "__init__.py").write_text(f'"""{package}"""\n')
        (root / package / "__pycache__/a.pyc").write_bytes(b"\0")
    (root / "conf/a.yaml").write_text("a: 1\n")
    (root / ".gitignore").write_text("__pycache__\n")
    git(root, "init", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--message=first")
    return root


def snapshot(directory: Path, root: Path = ROOT) -> Path:
    return write_snapshot(directory, read_revision(root), root)


def revision(path: Path) -> dict:
    return json.loads((path / "revision.json").read_text())


def test_unchanged_source_is_its_commit(root: Path, tmp_path: Path) -> None:
    path = snapshot(tmp_path / "run", root)
    assert path.parent == tmp_path / "run/source"
    commit = git(root, "rev-parse", "HEAD").strip()
    known = {"commit": commit, "branch": "main", "dirty": False, "unknown": None}
    assert revision(path) == known
    assert (path / "changes.patch").read_text() == ""


def test_the_patch_turns_the_commit_into_the_source(root: Path, tmp_path: Path) -> None:
    (root / "phd/__init__.py").write_text("changed = 1\n")
    (root / "train/new.py").write_text("new = 'é'\n")
    (root / "data/staged.py").write_text("staged = 1\n")
    git(root, "add", "data/staged.py")
    (root / "conf/a.yaml").unlink()
    (root / "notes.txt").write_text("not of a package")
    path = snapshot(tmp_path / "run", root)
    assert revision(path)["dirty"] is True
    clone = tmp_path / "clone"
    git(tmp_path, "clone", str(root), str(clone))
    git(clone, "apply", str(path / "changes.patch"))
    for package in PACKAGES:
        ours, theirs = (
            {p.name: p.read_text() for p in (r / package).glob("*.*")} for r in (root, clone)
        )
        assert ours == theirs
    assert not (clone / "notes.txt").exists()


def test_the_archive_holds_the_packages_as_they_are(root: Path, tmp_path: Path) -> None:
    (root / "launch/job.sh").write_text("new\n")
    path = snapshot(tmp_path / "run", root)
    with tarfile.open(path / "source.tar.gz") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {*(f"{name}/__init__.py" for name in PACKAGES), "conf/a.yaml", "launch/job.sh"}
    assert (tmp_path / "out/launch/job.sh").read_text() == "new\n"


def test_it_is_written_anew_only_when_the_source_has_changed(root: Path, tmp_path: Path) -> None:
    first = snapshot(tmp_path / "run", root)
    content = {file.name: file.read_bytes() for file in first.iterdir()}
    os.utime(root / "phd/__init__.py", (1, 1))
    assert snapshot(tmp_path / "run", root) == first
    elsewhere = snapshot(tmp_path / "other", root)
    assert elsewhere.name == first.name
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == content
    (root / "conf/a.yaml").write_text("a: 2\n")
    second = snapshot(tmp_path / "run", root)
    git(root, "commit", "--all", "--message=second")
    third = snapshot(tmp_path / "run", root)
    assert sorted((tmp_path / "run/source").iterdir()) == sorted([first, second, third])
    assert len({first, second, third}) == 3


def test_what_a_crash_left_half_written_is_replaced(root: Path, tmp_path: Path) -> None:
    path = snapshot(tmp_path / "run", root)
    half = path.rename(path.with_name(f".{path.name}.0a1b2c3d.partial"))
    (half / "changes.patch").unlink()
    assert snapshot(tmp_path / "run", root) == path
    assert (path / "changes.patch").exists()
    assert not half.exists()


def test_without_git_or_a_repository_of_its_own_the_source_is_kept_all_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / ".git").rename(tmp_path / "moved")
    unknown = revision(snapshot(tmp_path / "run", root))
    assert unknown.pop("unknown").startswith("fatal: not a git repository")
    assert set(unknown.values()) == {None}

    (tmp_path / "moved").rename(root / ".git")
    site = root / ".venv/site-packages"  # as in somebody else's repository
    for package in PACKAGES:
        (site / package).mkdir(parents=True)
        (site / package / "a.py").touch()
    (root / ".gitignore").write_text(".venv\n")
    path = snapshot(tmp_path / "run", site)
    assert "does not hold the packages" in revision(path)["unknown"]
    with tarfile.open(path / "source.tar.gz") as archive:
        assert "phd/a.py" in archive.getnames()

    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(snapshot(tmp_path / "run", root))["unknown"] == "git is not installed"


def test_a_repository_without_a_commit_or_a_branch_is_said_to_be_one(
    root: Path, tmp_path: Path
) -> None:
    git(root, "checkout", "--detach")
    assert revision(snapshot(tmp_path / "run", root))["branch"] is None
    git(root, "checkout", "--orphan", "empty")
    unknown = revision(snapshot(tmp_path / "run", root))["unknown"]
    assert "HEAD" in unknown


def test_variables_of_git_and_settings_of_its_user_change_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "conf/a.yaml").write_text("a: 2\n")
    path = snapshot(tmp_path / "run", root)
    for name, value in {"color.ui": "always", "diff.external": "false"}.items():
        git(root, "config", name, value)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert snapshot(tmp_path / "run", root) == path


def test_a_disk_that_refuses_is_an_oserror(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        snapshot(tmp_path / "file", root)


def test_this_project_is_kept_in_less_than_a_megabyte(tmp_path: Path) -> None:
    path = snapshot(tmp_path)
    assert sum(file.stat().st_size for file in path.iterdir()) < 1e6
    with tarfile.open(path / "source.tar.gz") as archive:
        kept = archive.extractfile("train/run_dir/snapshot.py")
        assert kept is not None
        assert kept.read() == (ROOT / "train/run_dir/snapshot.py").read_bytes()


@pytest.mark.parametrize("name", ["phd/.env", "data/keys.yaml", "train/local/notes.py"])
def test_files_that_git_ignores_are_left_out(root: Path, tmp_path: Path, name: str) -> None:
    (root / ".gitignore").write_text("__pycache__\n.env\nkeys.yaml\nlocal/\n")
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("API_KEY=4711\n")
    path = snapshot(tmp_path / "run", root)
    with tarfile.open(path / "source.tar.gz") as archive:
        assert name not in archive.getnames()
        assert "phd/__init__.py" in archive.getnames()
    assert "4711" not in (path / "changes.patch").read_text()
