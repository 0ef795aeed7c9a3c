import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import pytest

from data.config import DataConfig, DatasetsSource, FilesSource
from data.documents import Documents, is_held_out


@pytest.mark.parametrize(("files", "lanes"), [(1, 4), (3, 4), (3, 2), (4, 4), (6, 4), (3, 1)])
def test_every_document_is_in_one_epoch_of_one_lane(
    documents_of: Callable[..., Documents], texts: list[str], kind: str, files: int, lanes: int
) -> None:
    documents = documents_of(kind, files, lanes=lanes)
    read = [[d.text for d, _ in documents.training(lane)] for lane in range(lanes)]
    assert Counter(chain(*read)) == Counter(texts)
    assert max(map(len, read)) - min(map(len, read)) <= max(files, lanes)


def test_lanes_take_whole_shards_where_there_are_many(tmp_path: Path) -> None:
    for i in range(33):
        (tmp_path / f"{i:02}.jsonl").write_text(f'{{"text": "{i}"}}\n{{"text": "{i}"}}\n')
    source = DatasetsSource(kind="datasets", path="json", data_files=str(tmp_path / "*.jsonl"))
    documents = Documents(DataConfig(source=source, lanes=2, holdout=0.0))
    read = [[d.text for d, _ in documents.training(lane)] for lane in range(2)]
    assert sorted(map(len, read)) == [2 * 16, 2 * 17]
    assert sorted(map(int, chain(*map(set, read)))) == list(range(33))


def test_a_pass_goes_on_exactly_from_every_position(
    documents_of: Callable[..., Documents], kind: str
) -> None:
    documents = documents_of(kind, lanes=2)
    whole = list(documents.training(1))
    for i, (_, position) in enumerate(whole):
        rest = documents.training(1, json.loads(json.dumps(position)))
        assert [d for d, _ in rest] == [d for d, _ in whole[i + 1 :]]


@pytest.mark.parametrize("step", [1, 3])
def test_a_pass_can_be_interrupted_again_and_again(
    documents_of: Callable[..., Documents], kind: str, step: int
) -> None:
    documents = documents_of(kind, lanes=2)
    read, position = [], None
    while part := list(islice(documents.training(1, position), step)):
        read += [document for document, _ in part]
        position = part[-1][1]
    assert read == [d for d, _ in documents.training(1)]


def test_documents_are_split_by_their_text_alone(
    documents_of: Callable[..., Documents], texts: list[str]
) -> None:
    expected = [text for text in texts if is_held_out(text, 0.3)]
    assert 4 < len(expected) < 20
    for kind, lanes in (("txt", 1), ("jsonl", 4), ("datasets-parquet", 2)):
        documents = documents_of(kind, lanes=lanes, holdout=0.3)
        assert [d.text for d in documents.held_out()] == expected
        trained = [d.text for lane in range(lanes) for d, _ in documents.training(lane)]
        assert Counter(trained) + Counter(expected) == Counter(texts)


def test_a_larger_holdout_contains_a_smaller_one() -> None:
    texts = [str(i) for i in range(10_000)]
    small = {t for t in texts if is_held_out(t, 0.02)}
    assert small < {t for t in texts if is_held_out(t, 0.05)}
    assert 150 < len(small) < 250
    assert not any(is_held_out(t, 0.0) for t in texts)


def test_blank_documents_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "a"}\n')
    source = FilesSource(kind="files", paths=str(tmp_path))
    documents = Documents(DataConfig(source=source, lanes=1, holdout=0.0))
    assert [d.text for d, _ in documents.training(0)] == ["a"]


def test_a_sample_is_the_first_training_text_of_about_its_size(
    documents_of: Callable[..., Documents], texts: list[str]
) -> None:
    documents = documents_of(holdout=0.3)
    training = [t for t in texts if not is_held_out(t, 0.3)]
    assert list(documents.sample(10**6)) == training
    size = len("".join(training[:3]).encode())
    assert list(documents.sample(size)) == training[:3]
    assert list(documents.sample(size + 2)) == [*training[:3], training[3][:2]]


def write(path: Path, *texts: str) -> FilesSource:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return FilesSource(kind="files", paths=str(path))


def test_a_lane_without_documents_is_an_error_instead_of_an_endless_search(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "a", "b", "c")
    documents = Documents(DataConfig(source=source, lanes=4, holdout=0.0))
    assert [d.text for d, _ in documents.training(2)] == ["c"]
    with pytest.raises(ValueError, match="lanes=4") as error:
        list(documents.training(3))
    assert str(error.value) == (
        "data.lanes=4: a lane found no document to train on, for data.source has 3 and "
        "data.holdout=0.0 holds out 0 of them; lower data.lanes or add documents (a .txt file is "
        "one, unless data.source.separator cuts it)"
    )


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "", "  ")
    documents = Documents(DataConfig(source=source))
    for read in (lambda: list(documents.training(0)), lambda: list(documents.sample(100))):
        with pytest.raises(ValueError, match=r"data\.source: no text in it \(.*a\.jsonl\); choose"):
            read()
