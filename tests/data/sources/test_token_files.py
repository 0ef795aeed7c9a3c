"""Claims about token files: what was written is read, by lanes, from anywhere, or refused."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from conf.errors import ConfigError, DataError, TransientError
from data.config import DataConfig, FilesSource, TokensSource
from data.source import Document, TokenDocument
from data.sources.documents import Documents
from data.sources.token_files import (
    TokenCorpus,
    TokenIndex,
    begin,
    finish,
    new_index,
    write_shard,
    write_tokens,
)
from data.tokenizer import Tokenizer
from data.tokenizer_training import LOSSLESS, train

Read = list[tuple[list[int], int, str, int]]


def write(
    directory: Path, shards: list[list[str]], tokenizer: Tokenizer, *, done: bool = True
) -> Path:
    """Writes texts, of which each shard gets its own, the last shard first."""
    index = begin(directory, new_index(tokenizer, {"text": "mine"}, len(shards)), tokenizer)
    for number in reversed(index.missing):
        texts = ((text, xxh3_64_intdigest(text.encode())) for text in shards[number])
        index = index.with_shard(write_shard(directory, number, texts, tokenizer))
        index.save(directory / "unfinished.json")
    if done:
        finish(directory)
    return directory


def read(corpus: TokenCorpus, lane: int, lanes: int, position: int | None = None) -> Read:
    return [
        (document.tokens.tolist(), document.digest, document.origin, after)
        for document, after in corpus.documents(lane, lanes, position)
    ]


@pytest.fixture(scope="session")
def shards(texts: list[str]) -> list[list[str]]:
    """The texts in five shards, of which the second and the last are empty."""
    return [texts[:20], [], texts[20:21], texts[21:], []]


@pytest.fixture(scope="session")
def written(
    shards: list[list[str]], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write(tmp_path_factory.mktemp("tokens") / "written", shards, tokenizer)


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return shutil.copytree(written, tmp_path / "copied")


def test_the_files_are_as_they_are_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["the tokens", "é 😀", "keeps its"]
    write(tmp_path, [texts[:2], texts[2:]], tokenizer)
    ids = [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]
    ends = [len(ids[0]), len(ids[0]) + len(ids[1]), len(ids[2])]
    digests = [xxh3_64_intdigest(text.encode()) for text in texts]
    assert np.fromfile(tmp_path / "00000.tokens", "<u2").tolist() == ids[0] + ids[1]
    assert np.fromfile(tmp_path / "00001.tokens", "<u2").tolist() == ids[2]
    table = np.fromfile(tmp_path / "00000.documents", "<u8").tolist()
    assert table == [ends[0], digests[0], ends[1], digests[1]]
    assert np.fromfile(tmp_path / "00001.documents", "<u8").tolist() == [ends[2], digests[2]]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["documents"] == 3
    assert index["tokens"] == ends[1] + ends[2]
    assert index["bytes"] == len("".join(texts).encode())
    assert (index["dtype"], index["separator"]) == ("uint16", tokenizer.eos_id)
    assert Tokenizer.load(tmp_path / "tokenizer.model").fingerprint == index["tokenizer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("00000.documents", "00000.tokens", "00001.documents", "00001.tokens"),
        *("index.json", "tokenizer.model"),
    ]


def test_what_is_read_is_what_the_tokenizer_makes_of_the_texts(
    written: Path, shards: list[list[str]], tokenizer: Tokenizer
) -> None:
    found = read(TokenCorpus("mine", written), 0, 1)
    texts = list(chain(*shards))
    assert [tokens for tokens, *_ in found] == [
        tokenizer.encode_document(text).tolist() for text in texts
    ]
    assert [digest for _, digest, *_ in found] == [xxh3_64_intdigest(t.encode()) for t in texts]
    origins = [
        f"{written}/0000{s}.tokens#{i}" for s, ts in enumerate(shards) for i in range(len(ts))
    ]
    assert [origin for *_, origin, _ in found] == origins


def test_tokens_are_views_of_the_file(written: Path) -> None:
    documents = [document for document, _ in TokenCorpus("mine", written).documents(0, 1)]
    first, second = documents[:2]
    assert not first.tokens.flags.owndata
    assert not first.tokens.flags.writeable
    assert second.tokens.ctypes.data == first.tokens.ctypes.data + first.tokens.nbytes


# A text of n characters is n + 1 tokens: lengths are then of the test's choosing.
LENGTHS = st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=4)


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """A tokenizer that knows no pairs."""
    return train(iter(["ab", "a"]), {**LOSSLESS, "model_type": "char", "vocab_size": 262})


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=LENGTHS, lanes=st.integers(1, 7))
def test_a_document_belongs_to_the_lane_in_whose_interval_it_begins(
    letters: Tokenizer, lengths: list[list[int]], lanes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = TokenCorpus(
            "mine", write(Path(folder), [["a" * n for n in shard] for shard in lengths], letters)
        )
        whole = read(corpus, 0, 1)
        total = sum(len(tokens) for tokens, *_ in whole)
        assert total == sum(n + 1 for n in chain(*lengths))
        bounds = [lane * total // lanes for lane in range(lanes + 1)]
        expected: list[Read] = [[] for _ in range(lanes)]
        begins = 0
        for found in whole:
            [lane] = [i for i in range(lanes) if bounds[i] <= begins < bounds[i + 1]]
            expected[lane].append(found)
            begins += len(found[0])
        assert [read(corpus, lane, lanes) for lane in range(lanes)] == expected


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_pass_goes_on_exactly_from_every_position(written: Path, lanes: int) -> None:
    corpus = TokenCorpus("mine", written)
    for lane in range(lanes):
        whole = read(corpus, lane, lanes)
        assert len(whole) > 5
        for i, (*_, position) in enumerate(whole):
            again = TokenCorpus("mine", written)
            assert read(again, lane, lanes, json.loads(json.dumps(position))) == whole[i + 1 :]


def test_shards_of_many_documents_are_read_to_their_end(letters: Tokenizer, tmp_path: Path) -> None:
    texts = ["a" * (i % 3) for i in range(5000)]
    corpus = TokenCorpus("mine", write(tmp_path, [texts[:2048], texts[2048:]], letters))
    found = [read(corpus, lane, 2) for lane in range(2)]
    assert [len(tokens) - 1 for tokens, *_ in chain(*found)] == [len(text) for text in texts]
    assert [after for *_, after in chain(*found)] == list(range(1, 5001))
    assert read(corpus, 1, 2, 3072) == found[1][3072 - len(found[0]) :]


def test_passes_do_not_disturb_each_other(written: Path) -> None:
    corpus = TokenCorpus("mine", written)

    def tokens(lane: int) -> Iterator[bytes]:
        return (document.tokens.tobytes() for document, _ in corpus.documents(lane, 2))

    both = list(zip_longest(tokens(0), tokens(1), tokens(0)))
    assert [one for one, _, _ in both] == [one for _, _, one in both]
    assert [one for one, _, _ in both if one] + [one for _, one, _ in both if one] == [
        document.tokens.tobytes() for document, _ in corpus.documents(0, 1)
    ]


def test_a_directory_of_many_shards_keeps_no_file_open(letters: Tokenizer, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    corpus = TokenCorpus("mine", write(tmp_path, [["a"]] * 40, letters))
    documents = corpus.documents(0, 1)
    for _ in range(35):
        next(documents)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # of the shard that is being read


def test_the_same_documents_are_held_out_as_of_the_text(
    shards: list[list[str]], written: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in chain(*shards)]
    (tmp_path / "text.jsonl").write_text("".join(lines))

    def split(source: FilesSource | TokensSource) -> tuple[list[list[int]], list[list[int]]]:
        documents = Documents(DataConfig(sources={"mine": source}, holdout=0.3, lanes=1))
        training = (document for document, _ in documents.training("mine", 0))
        return tuple(
            [tokens_of(d) for d in part] for part in (documents.held_out("mine"), training)
        )

    def tokens_of(document: Document | TokenDocument) -> list[int]:
        if isinstance(document, TokenDocument):
            return document.tokens.tolist()
        return tokenizer.encode_document(document.text).tolist()

    held_out, training = split(TokensSource(kind="tokens", path=str(written)))
    assert 4 < len(held_out) < 20 < len(training)
    text = FilesSource(kind="files", paths=str(tmp_path / "text.jsonl"))
    assert (held_out, training) == split(text)


@pytest.fixture(scope="session")
def large() -> Tokenizer:
    """A tokenizer with more pieces than 16 bits can count."""
    symbols = [chr(0x20000 + i) for i in range(66_000)]
    options = {"model_type": "bpe", "vocab_size": 66_500, "user_defined_symbols": symbols}
    return train(iter(["abc abd"] * 3), {**LOSSLESS, **options})


def test_a_large_vocabulary_takes_four_bytes_a_token(large: Tokenizer, tmp_path: Path) -> None:
    text = "abc" + chr(0x20000 + 65_990)
    expected = large.encode_document(text).tolist()
    assert max(expected) > 2**16
    corpus = TokenCorpus("mine", write(tmp_path, [[text], ["abd"]], large))
    assert corpus.index.dtype == "uint32"
    assert (tmp_path / "00000.tokens").stat().st_size == 4 * len(expected)
    assert [tokens for tokens, *_ in read(corpus, 0, 1)] == [
        expected,
        large.encode_document("abd").tolist(),
    ]


def test_only_the_contents_decide_the_fingerprint(
    written: Path, copied: Path, shards: list[list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fingerprint = TokenCorpus("mine", written).fingerprint
    assert list(fingerprint) == ["data.sources.mine"]
    assert TokenCorpus("mine", copied).fingerprint == fingerprint
    changed = [[text.replace("7", "8") for text in shard] for shard in shards]
    other = TokenCorpus("mine", write(tmp_path / "other", changed, tokenizer))
    assert other.fingerprint != fingerprint
    moved = TokenCorpus("mine", write(tmp_path / "moved", [*shards[::-1]], tokenizer))
    assert moved.fingerprint != fingerprint


def test_a_corpus_brings_its_tokenizer(written: Path, tokenizer: Tokenizer) -> None:
    corpus = TokenCorpus("mine", written)
    assert corpus.tokenizer_fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(corpus.tokenizer_path).fingerprint == tokenizer.fingerprint


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, r"no such directory; give a directory that .* wrote"),
    "no index": (lambda d: (d / "index.json").unlink(), r"no index\.json in it; give a directory"),
    "cut tokens": (
        lambda d: cut(d / "00000.tokens"),
        r"00000\.tokens has \d+ bytes instead of \d+",
    ),
    "cut table": (lambda d: cut(d / "00003.documents"), r"00003\.documents has 318 bytes .* 320"),
    "a lost shard": (lambda d: (d / "00002.tokens").unlink(), r"00002\.tokens is missing"),
    "cut index": (lambda d: cut(d / "index.json"), r"index\.json: not an index of token files"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), r"tokenizer\.model is missing"),
}


@pytest.mark.parametrize("harm", DAMAGE)
def test_what_is_not_as_it_was_written_is_refused(copied: Path, harm: str) -> None:
    do, message = DAMAGE[harm]
    do(copied)
    wrong_path = harm in ("no directory", "no index")
    with pytest.raises(ConfigError if wrong_path else DataError, match=message) as error:
        TokenCorpus("mine", copied)
    said = error.value.problems[0] if isinstance(error.value, ConfigError) else error.value
    assert str(said).startswith(f"data.sources.mine.path='{copied}': ")
    assert "; " in str(said)


def test_an_index_of_another_format_is_refused_by_its_number(copied: Path) -> None:
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(DataError, match=r"not an index of token files \(format .*1"):
        TokenCorpus("mine", copied)


def test_the_directory_above_is_refused_with_those_in_it(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"no index\.json in it; give ") as error:
        TokenCorpus("mine", written.parent)
    assert f"give {written} (" in str(error.value)


def test_an_unfinished_directory_is_refused(
    shards: list[list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write(tmp_path, shards, tokenizer, done=False)
    with pytest.raises(DataError, match=r"not finished, 5 of 5 shards are written; run the same"):
        TokenCorpus("mine", tmp_path)


@pytest.mark.parametrize("file", ["00000.tokens", "00003.documents"])
def test_verifying_finds_a_single_bit(copied: Path, file: str) -> None:
    TokenCorpus("mine", copied).verify()
    flip(copied / file)
    corpus = TokenCorpus("mine", copied)
    with pytest.raises(DataError, match=rf"sources\.mine\.path=.*{file} is not as it was written"):
        corpus.verify()


def test_verifying_finds_another_tokenizer(copied: Path, letters: Tokenizer) -> None:
    letters.save(copied / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer\.model is not the one that made the tokens"):
        TokenCorpus("mine", copied).verify()


def test_what_is_begun_goes_on_with_the_shards_that_are_missing(
    written: Path, tokenizer: Tokenizer, copied: Path
) -> None:
    wanted = new_index(tokenizer, {"text": "mine"}, 5)
    assert begin(copied, wanted, tokenizer).missing == []
    (copied / "index.json").rename(copied / "unfinished.json")
    index = TokenIndex.load(copied / "unfinished.json")
    shards = tuple(shard for shard in index.shards if shard.name != "00002")
    TokenIndex(**{**vars(index), "shards": shards}).save(copied / "unfinished.json")
    assert begin(copied, wanted, tokenizer).missing == [2]

    assert TokenCorpus("mine", written).index == index


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_begun_does_not_go_on_as_something_else(
    copied: Path, tokenizer: Tokenizer, letters: Tokenizer, finished: bool
) -> None:
    if not finished:
        (copied / "index.json").rename(copied / "unfinished.json")
    for wanted, change in (
        (new_index(tokenizer, {"text": "yours"}, 5), "text was 'mine' and is now 'yours'"),
        (new_index(tokenizer, {"text": "mine"}, 6), "parts was 5 and is now 6"),
        (new_index(letters, {"text": "mine"}, 5), "tokenizer was "),
    ):
        with pytest.raises(
            ConfigError, match=f"{copied}: holds tokens that were made otherwise: .*"
        ) as error:
            begin(copied, wanted, tokenizer)
        assert change in str(error.value)


def test_a_shard_that_vanishes_while_it_is_read_is_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_tokens(tmp_path, [["a text"], ["another"]], tokenizer)
    documents = TokenCorpus("x", tmp_path).documents(0, 1)
    next(documents)
    (tmp_path / "00001.tokens").unlink()
    with pytest.raises(DataError, match=r"data\.sources\.x\.path=.*00001\.tokens is missing"):
        list(documents)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tokens(tmp_path, [["a text"], ["another"]], tokenizer)
    corpus = TokenCorpus("x", tmp_path)
    (tmp_path / "00001.tokens").unlink()
    (tmp_path / "00001.tokens").mkdir()  # which opening refuses, as a failing disk does
    for read in (lambda: list(corpus.documents(0, 1)), corpus.verify):
        with pytest.raises(TransientError, match=r"00001\.tokens cannot be read \(.*start the run"):
            read()
