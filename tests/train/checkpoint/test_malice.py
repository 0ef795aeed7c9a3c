"""Nothing in a checkpoint runs code when it is loaded, even where its hashes fit."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.checkpoint.format import INDEX
from train.checkpoint.manifest import MANIFEST, MARKER, Entries, new_file, seal
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore

DATA = "__0_0.distcp"


class Trap:
    """Its unpickling creates a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sprung,)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    return tmp_path / "sprung"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, {"model": {"w": torch.ones(3)}}, {"cursor": 1})
    return store.wait().path


def forge(path: Path, **contents: bytes) -> None:
    """Give files other contents, and the checkpoint a manifest that fits them."""
    (path / MANIFEST).unlink()
    (path / MARKER).unlink()
    files = {file.name: file.read_bytes() for file in path.iterdir()} | contents
    entries: Entries = {}
    for name, content in files.items():
        (path / name).unlink()
        with new_file(path / name, entries) as file:
            file.write(content)
    seal(path, entries)


def load(path: Path) -> torch.Tensor:
    wanted = {"model": {"w": torch.zeros(3)}}
    found = Checkpoint.open(path)
    found.load(wanted)
    assert torch.equal(found.load_weights()["w"], wanted["model"]["w"])
    return wanted["model"]["w"]


def test_the_trap_is_a_trap(sprung: Path) -> None:
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


def test_the_metadata_that_others_unpickle_is_never_opened(path: Path, sprung: Path) -> None:
    forge(path, **{".metadata": pickle.dumps(Trap(sprung))})
    assert load(path).tolist() == [1, 1, 1]
    assert not sprung.exists()


def with_torch(trap: Trap, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"tensor": trap}, file, **options)
    return file.getvalue()


FORMS: dict[str, Callable[[Trap], bytes]] = {
    "saved by torch": with_torch,
    "saved by an old torch": lambda trap: with_torch(trap, _use_new_zipfile_serialization=False),
    "a bare pickle": lambda trap: pickle.dumps(trap, protocol=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_read_without_running_what_is_among_them(
    path: Path, sprung: Path, form: str
) -> None:
    content = FORMS[form](Trap(sprung))
    index = json.loads((path / INDEX).read_text())
    index["model.w"]["pieces"][0] |= {"offset": 0, "bytes": len(content)}
    forge(path, **{DATA: content, INDEX: json.dumps(index).encode()})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(path)
    assert not sprung.exists()


@pytest.mark.parametrize("file", ["state.json", INDEX])
def test_a_pickle_in_the_place_of_json_is_refused(path: Path, sprung: Path, file: str) -> None:
    forge(path, **{file: pickle.dumps(Trap(sprung))})
    with pytest.raises(ValueError, match="decode"):
        load(path)
    assert not sprung.exists()


def test_a_dtype_is_nothing_else_of_torch(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["model.w"]["dtype"] = "load"
    forge(path, **{INDEX: json.dumps(index).encode()})
    with pytest.raises(ValueError, match="names a dtype 'load', which this torch does not know"):
        load(path)
