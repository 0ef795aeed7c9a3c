from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DatasetsSource
from data.hub import HubCorpus


def test_a_missing_text_field_is_named_with_those_there(
    source_of: Callable[..., DatasetsSource],
) -> None:
    source = source_of("datasets-jsonl")
    corpus = HubCorpus(
        DatasetsSource(
            kind="datasets", path="json", data_files=source.data_files, text_field="body"
        )
    )
    with pytest.raises(
        ValueError, match=r"text_field='body': json\[0/1\]:1 has no .* has id, text"
    ):
        next(corpus.documents(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_files": "missing.jsonl"}, r"data_files='missing\.jsonl': .* cannot open it \("),
        ({"split": "test"}, r"split='test', .* cannot open it \(.*Available splits: \['train'\]"),
    ],
)
def test_what_cannot_be_opened_is_named(
    source_of: Callable[..., DatasetsSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = source_of("datasets-jsonl").data_files
    with pytest.raises(ValueError, match=r"data\.source\.path='json', .*" + message):
        HubCorpus(DatasetsSource(kind="datasets", path="json", **{"data_files": files, **settings}))


def test_identity_holds_every_setting_that_decides_the_documents(
    source_of: Callable[..., DatasetsSource],
) -> None:
    source = source_of("datasets-jsonl")
    identity = HubCorpus(source).identity
    assert identity["data.source.path"] == "json"
    assert identity["data.source.data_files"] == list(source.data_files or ())
    assert len(identity) == 6
