import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError, TransientError
from data.config import DataConfig, FilesSource, PythonSource, TokenizerConfig, TokensSource
from data.sources.documents import Documents
from data.sources.token_files import write_tokens
from data.tokenizer import Tokenizer
from data.tokenizer_training import LOSSLESS, prepare_tokenizer, train


def models(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_it_is_trained_once_and_then_read(
    documents_of: Callable[..., Documents], tmp_path: Path
) -> None:
    documents, config = documents_of(), TokenizerConfig(cache_dir=str(tmp_path))
    first = prepare_tokenizer(config, documents, vocab_size=350)
    cached = models(tmp_path)
    assert len(cached) == 1
    assert prepare_tokenizer(config, documents, vocab_size=350).fingerprint == first.fingerprint
    assert models(tmp_path) == cached


def test_whatever_changes_the_tokenizer_makes_another(
    documents_of: Callable[..., Documents], tmp_path: Path
) -> None:
    documents, cache = documents_of(), str(tmp_path)
    for count, (config, data) in enumerate(
        [
            (TokenizerConfig(cache_dir=cache), documents),
            (TokenizerConfig(cache_dir=cache, vocab_size=320), documents),
            (TokenizerConfig(cache_dir=cache, kind="unigram"), documents),
            (TokenizerConfig(cache_dir=cache, sample_bytes=1000), documents),
            (TokenizerConfig(cache_dir=cache), documents_of(holdout=0.3)),
            (TokenizerConfig(cache_dir=cache), documents_of(files=1)),
        ],
        start=1,
    ):
        assert prepare_tokenizer(config, data, vocab_size=350).vocab_size <= 350
        assert len(models(tmp_path)) == count


def test_training_is_deterministic(texts: list[str]) -> None:
    for kind in ("bpe", "unigram"):
        options = {**LOSSLESS, "model_type": kind, "vocab_size": 330}
        assert train(iter(texts), options).fingerprint == train(iter(texts), options).fingerprint


def test_it_never_sees_held_out_text(
    documents_of: Callable[..., Documents], texts: list[str], tmp_path: Path
) -> None:
    documents = documents_of(holdout=0.3)
    held_out = {d.text for d in documents.held_out("text")}
    config = TokenizerConfig(cache_dir=str(tmp_path))
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 350}
    twin = train((t for t in texts if t not in held_out), options)
    assert prepare_tokenizer(config, documents, vocab_size=350).fingerprint == twin.fingerprint


def test_a_small_sample_gives_fewer_pieces(texts: list[str]) -> None:
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 100_000}
    assert 259 < train(iter(texts), options).vocab_size < 1000


@pytest.mark.parametrize("cache", ["/proc/1/none", "/dev/null", "/dev/null/none"])
def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    cache: str,
    documents_of: Callable[..., Documents],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    documents = documents_of()
    kept = prepare_tokenizer(TokenizerConfig(cache_dir=str(tmp_path)), documents, vocab_size=350)
    config = TokenizerConfig(cache_dir=cache)
    own = prepare_tokenizer(config, documents, vocab_size=350)
    assert own.fingerprint == kept.fingerprint
    told = capsys.readouterr().err
    assert told.startswith(f"tokenizer.cache_dir: {cache}/bpe-350-")
    assert "cannot be written (" in told


@pytest.mark.parametrize("damage", [b"", b"not a model"])
def test_a_damaged_model_in_the_cache_is_told_and_made_anew(
    damage: bytes,
    documents_of: Callable[..., Documents],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    documents, config = documents_of(), TokenizerConfig(cache_dir=str(tmp_path))
    first = prepare_tokenizer(config, documents, vocab_size=350)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage)
    assert prepare_tokenizer(config, documents, vocab_size=350).fingerprint == first.fingerprint
    assert path.read_bytes() == first.model
    assert "the tokenizer is trained anew" in capsys.readouterr().err


def test_the_cache_is_where_the_environment_says(
    documents_of: Callable[..., Documents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path))
    prepare_tokenizer(TokenizerConfig(), documents_of(), vocab_size=350)
    assert os.listdir(tmp_path) == ["tokenizers"]
    monkeypatch.delenv("PHD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_tokenizer(TokenizerConfig(), documents_of(), vocab_size=350)
    assert len(models(tmp_path / ".cache/phd/tokenizers")) == 1


def test_a_vocabulary_too_small_for_the_text_is_named(texts: list[str]) -> None:
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 200}
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=200: SentencePiece cannot make"):
        train(iter(texts), options)


def test_a_given_model_is_used_as_it_is(
    documents_of: Callable[..., Documents], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "a.model")
    config = TokenizerConfig(path=str(tmp_path / "a.model"))
    given = prepare_tokenizer(config, documents_of(), vocab_size=4096)
    assert given.fingerprint == tokenizer.fingerprint
    with pytest.raises(
        ConfigError, match=r"a\.model': has \d+ pieces, more than model\.vocab_size="
    ):
        prepare_tokenizer(config, documents_of(), vocab_size=300)


def test_a_trained_vocabulary_has_to_fit_the_model(
    documents_of: Callable[..., Documents], tmp_path: Path
) -> None:
    config = TokenizerConfig(vocab_size=330, cache_dir=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"\n  tokenizer\.vocab_size=330: has 330 pieces, more than"
    ):
        prepare_tokenizer(config, documents_of(), vocab_size=300)


def test_a_missing_model_is_named(documents_of: Callable[..., Documents]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.path='no\.model': no such file; give a"):
        prepare_tokenizer(TokenizerConfig(path="no.model"), documents_of(), vocab_size=300)


@pytest.fixture(scope="module")
def tokens_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tokenizer], TokensSource]:
    """Writes a source of tokens that a tokenizer made."""

    def write(tokenizer: Tokenizer) -> TokensSource:
        directory = tmp_path_factory.mktemp("tokens")
        write_tokens(directory, [["the original", "hidden copies"]], tokenizer)
        return TokensSource(kind="tokens", path=str(directory))

    return write


@pytest.fixture(scope="module")
def other(texts: list[str]) -> Tokenizer:
    return train(iter(texts), {**LOSSLESS, "model_type": "bpe", "vocab_size": 330})


def test_sources_of_tokens_bring_their_tokenizer(
    tokens_of: Callable[..., TokensSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources = {"python": PythonSource(kind="python"), "tokens": tokens_of(tokenizer)}
    documents = Documents(DataConfig(sources=sources))
    config = TokenizerConfig(cache_dir=str(tmp_path))
    found = prepare_tokenizer(config, documents, vocab_size=4096)
    assert found.fingerprint == tokenizer.fingerprint
    assert models(tmp_path) == {}
    with pytest.raises(
        ConfigError, match=r"\n  data\.sources\.tokens\.path='.*': has \d+ pieces, more"
    ):
        prepare_tokenizer(config, documents, vocab_size=300)


def test_tokens_of_another_tokenizer_are_refused_by_name(
    tokens_of: Callable[..., TokensSource], tokenizer: Tokenizer, other: Tokenizer
) -> None:
    sources = {"mine": tokens_of(tokenizer), "theirs": tokens_of(other)}
    documents = Documents(DataConfig(sources=sources))
    advice = re.escape(f"set tokenizer.path={sources['theirs'].path}")
    for path, setting in (
        (None, r"data\.sources\.mine\.path='"),
        (f"{sources['mine'].path}/tokenizer.model", r"tokenizer\.path='"),
    ):
        problem = (
            rf"\n  data\.sources\.theirs\.path='.*not those of the tokenizer of {setting}.*{advice}"
        )
        with pytest.raises(ConfigError, match=problem):
            prepare_tokenizer(TokenizerConfig(path=path), documents, vocab_size=4096)


def test_tokens_of_a_given_tokenizer_are_taken(
    tokens_of: Callable[..., TokensSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = Documents(DataConfig(sources={"tokens": tokens_of(tokenizer)}))
    tokenizer.save(path := tmp_path / "a.model")
    config = TokenizerConfig(path=str(path))
    found = prepare_tokenizer(config, documents, vocab_size=4096)
    assert found.fingerprint == tokenizer.fingerprint


def test_what_is_wrong_with_the_text_is_not_blamed_on_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good words"}\nbad\n' * 100)
    source = FilesSource(kind="files", paths=str(tmp_path))
    documents = Documents(DataConfig(sources={"text": source}, holdout=0.0))
    config = TokenizerConfig(vocab_size=300, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data\.max_quarantined=0\.02: 21 of") as error:
        prepare_tokenizer(config, documents, vocab_size=300)
    assert "vocab_size" not in str(error.value)


def test_a_source_that_fails_while_it_is_sampled_is_no_failure_of_the_training() -> None:
    def texts() -> Iterator[str]:
        yield "good words"
        raise TransientError("the server is gone")

    with pytest.raises(TransientError, match="the server is gone"):
        train(texts(), {**LOSSLESS, "model_type": "bpe", "vocab_size": 300})


def test_a_given_file_that_is_no_model_is_an_error_of_the_settings(
    documents_of: Callable[..., Documents], tmp_path: Path
) -> None:
    (tmp_path / "a.model").write_bytes(b"no model")
    config = TokenizerConfig(path=str(tmp_path / "a.model"))
    with pytest.raises(ConfigError, match=r"tokenizer\.path='.*': cannot be used \(.*not a Sent"):
        prepare_tokenizer(config, documents_of(), vocab_size=300)


def test_a_mixture_of_other_weights_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    for name, word in (("a", "alpha beta"), ("b", "gamma delta")):
        text = "".join(f'{{"text": "{word} {i}"}}\n' for i in range(400))
        (tmp_path / f"{name}.jsonl").write_text(text)
    made = []
    for weight in (100.0, 0.01):
        sources = {
            n: FilesSource(kind="files", paths=str(tmp_path / f"{n}.jsonl"), weight=w)
            for n, w in (("a", weight), ("b", 1.0))
        }
        documents = Documents(DataConfig(sources=sources, holdout=0.0))
        config = TokenizerConfig(vocab_size=300, sample_bytes=500, cache_dir=str(tmp_path))
        made.append(prepare_tokenizer(config, documents, vocab_size=300).fingerprint)
    assert made[0] != made[1]
