"""A tokenizer for a run: the one given, or one trained on the run's own data at first use."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from xxhash import xxh3_128_hexdigest

from data.config import TokenizerConfig
from data.sources.documents import Documents
from data.sources.token_files import TokenCorpus
from data.tokenizer import SPACE, Tokenizer

# Everything that makes decoding the inverse of encoding for any text, and pieces of line ends and
# indentation: both are much of what code is made of.
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


def prepare_tokenizer(
    config: TokenizerConfig, documents: Documents, *, vocab_size: int
) -> Tokenizer:
    """The tokenizer that the settings mean, for a model with `vocab_size` embeddings.

    Sources of tokens bring the one that made them.

    Raises:
        ValueError: the given model is missing, broken, too large or not that of the tokens, or none
            could be trained.
    """
    corpora = documents.corpora.items()
    tokens = {name: corpus for name, corpus in corpora if isinstance(corpus, TokenCorpus)}
    if config.path is not None:
        setting = f"tokenizer.path={config.path!r}"
        tokenizer = _given(config.path)
    elif tokens:
        name, corpus = next(iter(tokens.items()))
        setting = f"data.sources.{name}.path={str(corpus.path)!r}"
        tokenizer = Tokenizer.load(corpus.tokenizer_path)
    else:
        setting = f"tokenizer.vocab_size={config.vocab_size}"
        tokenizer = _trained(config, documents, config.vocab_size or vocab_size)
    _check_made_by(tokenizer, setting, tokens)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{setting}: has {tokenizer.vocab_size} pieces, more than "
            f"model.vocab_size={vocab_size}; set model.vocab_size to that or more"
        )
    return tokenizer


def training_options(config: TokenizerConfig, vocab_size: int) -> dict[str, Any]:
    """What SentencePiece is told to train, by its own names."""
    return {**LOSSLESS, "model_type": config.kind, "vocab_size": config.vocab_size or vocab_size}


def _given(path: str) -> Tokenizer:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={path!r}: no such file; give a SentencePiece .model, or null to train "
            "one on the data"
        )
    try:
        return Tokenizer.load(file)
    except ValueError as error:
        raise ValueError(f"tokenizer.path={path!r}: cannot be used ({error})") from error


def _check_made_by(tokenizer: Tokenizer, setting: str, tokens: dict[str, TokenCorpus]) -> None:
    """Makes sure that the tokens of all these sources are the tokenizer's."""
    for name, corpus in tokens.items():
        if corpus.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"data.sources.{name}.path={str(corpus.path)!r}: its tokens are not those of the "
                f"tokenizer of {setting}; set tokenizer.path={corpus.tokenizer_path}, leave out "
                "sources of other tokens, or make them anew with python train/pretokenize.py"
            )


def _trained(config: TokenizerConfig, documents: Documents, vocab_size: int) -> Tokenizer:
    """The tokenizer from the cache, trained and put there if it is not in it yet."""
    options = training_options(config, vocab_size)
    made_from = {
        **options,
        **documents.identity,
        "weights": documents.config.mixture[0][1],
        "sample_bytes": config.sample_bytes,
        "sentencepiece": sentencepiece.__version__,
    }
    digest = xxh3_128_hexdigest(json.dumps(made_from, sort_keys=True).encode())
    path = _cache(config) / f"{config.kind}-{vocab_size}-{digest}.model"
    if not path.exists():
        train(documents.sample(config.sample_bytes), options).save(path)
    return Tokenizer.load(path)


def train(texts: Iterator[str], options: dict[str, Any]) -> Tokenizer:
    """A tokenizer trained on whole documents; equal texts and options make equal ones.

    Raises:
        ValueError: the texts have more characters than the vocabulary has room for.
    """
    model = io.BytesIO()
    failures: list[ValueError] = []

    def read() -> Iterator[str]:
        """The texts; SentencePiece would take what goes wrong with them for its own failure."""
        try:
            yield from texts
        except ValueError as error:
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=read(), model_writer=model, **options
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        raise ValueError(
            f"tokenizer.vocab_size={options['vocab_size']}: SentencePiece cannot make so small a "
            f"vocabulary of this text ({error}); raise it, or give a tokenizer.path"
        ) from error
    if failures:
        raise failures[0]
    return Tokenizer(model.getvalue())


def _cache(config: TokenizerConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("PHD_CACHE", "~/.cache/phd")).expanduser() / "tokenizers"
