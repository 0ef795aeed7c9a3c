"""The tokenizer of a run: a given one, or one trained on the run's own data at first use."""

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from xxhash import xxh3_128_hexdigest

from conf.errors import ConfigError, DataError, Problem, reason_of
from data.config import TokenizerConfig
from data.sources.documents import Documents
from data.sources.token_files import TokenCorpus
from data.tokenizer import SPACE, Tokenizer

# The options that make decoding the inverse of encoding for any text. Pieces may also be of white
# space alone, since line ends and indentation are a large part of code.
LOSSLESS: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "required_chars": SPACE,  # or text without any space leaves none in the vocabulary
    "max_sentence_length": 1 << 30,  # bytes; longer documents would be left out
    "split_digits": True,
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "hard_vocab_limit": False,  # a small sample gives fewer pieces, which any model has room for
    "num_threads": 2,  # fixed: the model file mentions it, and `unigram` adds up in its order
    "minloglevel": 2,
}


class TokenizerOfWeights(NamedTuple):
    """The tokenizer that given weights were trained with, and the setting that named them."""

    key: str
    value: str
    tokenizer: Tokenizer


def prepare_tokenizer(
    config: TokenizerConfig,
    documents: Documents,
    *,
    vocab_size: int,
    of_weights: TokenizerOfWeights | None = None,
) -> Tokenizer:
    """The tokenizer that the settings mean, for a model with `vocab_size` embeddings.

    Weights decide it, because they know no other ids, and so does a source of tokens: its directory
    holds the tokenizer that made them.

    Raises:
        ConfigError: the given model is missing, broken, too large or not that of the weights or
            tokens, or the vocabulary is too small for the text.
        DataError: there is no text to train on.
    """
    corpora = documents.corpora.items()
    tokens = {name: corpus for name, corpus in corpora if isinstance(corpus, TokenCorpus)}
    key: str
    value: str | int | None
    if config.path is not None:
        key, value = "tokenizer.path", config.path
        tokenizer = given_tokenizer(config.path, vocab_size)
    elif of_weights:
        key, value, tokenizer = of_weights
    elif tokens:
        name, corpus = next(iter(tokens.items()))
        key, value = f"data.sources.{name}.path", str(corpus.path)
        tokenizer = Tokenizer.load(corpus.tokenizer_path)
    else:
        key, value = "tokenizer.vocab_size", config.vocab_size
        tokenizer = _trained(config, documents, config.vocab_size or vocab_size)
    if of_weights:
        _check_of_weights(tokenizer, config, of_weights)
    _check_made_by(tokenizer, key, value, tokens)
    _check_size(tokenizer, key, value, vocab_size)
    return tokenizer


def training_options(config: TokenizerConfig, vocab_size: int) -> dict[str, Any]:
    """The options of SentencePiece's trainer, by its own names."""
    return {**LOSSLESS, "model_type": config.kind, "vocab_size": config.vocab_size or vocab_size}


def given_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, for a model with `vocab_size` embeddings.

    Raises:
        ConfigError: it is missing, broken or too large.
    """
    tokenizer = _load(path)
    _check_size(tokenizer, "tokenizer.path", path, vocab_size)
    return tokenizer


def _check_size(tokenizer: Tokenizer, key: str, value: str | int | None, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        expected = f"has {tokenizer.vocab_size} pieces, more than model.vocab_size={vocab_size}"
        hint = "set model.vocab_size to that or more"
        raise ConfigError([Problem(key, value, expected, hint, ("model.vocab_size",))])


def _load(path: str) -> Tokenizer:
    file = Path(path).expanduser()
    hint = "give a SentencePiece .model, or null to train one on the data"
    try:
        return Tokenizer.load(file)
    except (FileNotFoundError, NotADirectoryError):
        wrong = "no such file"
    except IsADirectoryError:
        models = ", ".join(sorted(model.name for model in file.glob("*.model")))
        wrong = f"is a folder; in it: {models or 'no .model'}"
    except (DataError, OSError) as error:
        wrong = f"cannot be used ({reason_of(error)})"
    raise ConfigError([Problem("tokenizer.path", path, wrong, hint)])


def _check_of_weights(
    tokenizer: Tokenizer, config: TokenizerConfig, of_weights: TokenizerOfWeights
) -> None:
    """Make sure that a given tokenizer, or the size of one to train, is that of the weights."""
    setting = f"{of_weights.key}={of_weights.value}"
    hint = "leave it out to take the tokenizer of the weights, which know no other ids"
    problems = []
    if tokenizer.fingerprint != of_weights.tokenizer.fingerprint:
        expected = f"is another tokenizer than that of the weights of {setting}"
        problems.append(Problem("tokenizer.path", config.path, expected, hint, (of_weights.key,)))
    if config.vocab_size not in (None, of_weights.tokenizer.vocab_size):
        expected = f"the tokenizer of {setting} has {of_weights.tokenizer.vocab_size} pieces"
        key = "tokenizer.vocab_size"
        problems.append(Problem(key, config.vocab_size, expected, hint, (of_weights.key,)))
    if problems:
        raise ConfigError(problems)


def _check_made_by(
    tokenizer: Tokenizer, key: str, value: str | int | None, tokens: dict[str, TokenCorpus]
) -> None:
    """Make sure that the tokenizer, of the setting `key`, made the tokens of all these sources."""
    problems = [
        Problem(
            f"data.sources.{name}.path",
            str(corpus.path),
            f"its tokens are not those of the tokenizer of {key}={value!r}",
            f"set tokenizer.path={corpus.tokenizer_path}, leave out sources of other tokens, or "
            "make them anew with python train/pretokenize.py",
            (key,),
        )
        for name, corpus in tokens.items()
        if corpus.tokenizer_fingerprint != tokenizer.fingerprint
    ]
    if problems:
        raise ConfigError(problems)


def _trained(config: TokenizerConfig, documents: Documents, vocab_size: int) -> Tokenizer:
    """The tokenizer from the cache, where it is trained if it is not there yet."""
    options = training_options(config, vocab_size)
    made_from = {
        **options,
        # Everything that decides the model; a change of any of it trains another one.
        **documents.fingerprint,
        "weights": documents.config.mixture[0][1],
        "sample_bytes": config.sample_bytes,
        "sentencepiece": sentencepiece.__version__,
    }
    digest = xxh3_128_hexdigest(json.dumps(made_from, sort_keys=True).encode())
    path = _cache(config) / f"{config.kind}-{vocab_size}-{digest}.model"
    # Several runs may come here at once: each then trains the same model and saves it whole.
    try:
        if path.exists():
            return Tokenizer.load(path)
    except (OSError, DataError) as error:  # a directory that may not be entered, a damaged file
        _tell(config, f"{path} cannot be read ({reason_of(error)}); the tokenizer is trained anew")
    tokenizer = train(documents.sample(config.sample_bytes), options)
    try:
        tokenizer.save(path)
    except OSError as error:
        _tell(config, f"{path} cannot be written ({reason_of(error)}); the tokenizer is not kept")
    return tokenizer


def _tell(config: TokenizerConfig, found: str) -> None:
    """Name the setting of the cache; nothing that is wrong with a cache ends a run."""
    key = "PHD_CACHE" if config.cache_dir is None else "tokenizer.cache_dir"
    print(f"{key}: {found}", file=sys.stderr)


def train(texts: Iterator[str], options: dict[str, Any]) -> Tokenizer:
    """A tokenizer trained on whole documents; equal texts and options make equal ones.

    Raises:
        ConfigError: the texts have more characters than the vocabulary has room for.
    """
    model = io.BytesIO()
    failures: list[Exception] = []

    def read() -> Iterator[str]:
        """The texts; SentencePiece reports an error in them as its own, so it is kept here."""
        try:
            yield from texts
        except Exception as error:
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=read(), model_writer=model, **options
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        key, value = "tokenizer.vocab_size", options["vocab_size"]
        expected = (
            f"SentencePiece cannot make so small a vocabulary of this text ({reason_of(error)})"
        )
        hint = "raise it, or give a tokenizer.path"
        raise ConfigError([Problem(key, value, expected, hint)]) from error
    if failures:
        raise failures[0]
    return Tokenizer(model.getvalue())


def _cache(config: TokenizerConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("PHD_CACHE", "~/.cache/phd")).expanduser() / "tokenizers"
