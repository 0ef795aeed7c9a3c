"""Documents that are tokens already: files that are written once, mapped, and read by lanes.

    index.json             what is in the other files; written last: while it is missing, the
                           directory is not finished
    tokenizer.model        the SentencePiece model that made the tokens
    00000.tokens           uint16 or uint32 each: the documents of a shard, end to end
    00000.documents        two uint64 for each document: where it ends, in tokens, and the xxh3_64
                           of its text, which decides whether it is held out
    00000.quarantine.jsonl the records that are no documents; only if there were any
    00001.tokens           ...

    00000.tokens       a a a / b b / c c c c c /        / is the separator that ends a document
    00000.documents    4 #a    7 #b   13      #c

All numbers are little-endian. While the directory is written, `unfinished.json` holds the index of
the shards that are whole; a shard that is not in it is written again.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from conf.errors import ConfigError, DataError, Problem, TransientError, reason_of
from data.fingerprint import changed_settings
from data.source import Position, TokenDocument
from data.storage.atomic import file_xxh3_128, flush_to_disk, write_atomic
from data.tokenizer import Tokenizer

INDEX = "index.json"
UNFINISHED = "unfinished.json"
MODEL = "tokenizer.model"
COMMAND = "`python train/pretokenize.py`"

TABLE_ROWS = 1024
"""Documents whose ends and digests become Python's numbers at a time; one at a time costs three
times more."""


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """What is in one shard.

    Attributes:
        name: of its files, without their suffix.
        bytes: UTF-8 bytes of the text that the tokens were made of.
        xxh3_128: hashes of the two files, by suffix.
        quarantined: records that were no documents.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    xxh3_128: dict[str, str]
    quarantined: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenIndex:
    """What is in a directory of token files.

    Attributes:
        dtype: of a token.
        vocab_size: V of the tokenizer.
        tokenizer: its fingerprint.
        separator: the id that ends each document.
        made_from: the text and the settings that decide the tokens, by setting.
        parts: how many shards there are when all are written.
        shards: those that are, by name.
    """

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer: str
    separator: int
    made_from: dict[str, Any]
    parts: int
    shards: tuple[TokenShard, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "TokenIndex":
        """The index in a file.

        Raises:
            DataError: the file is no index.
            FileNotFoundError: there is no such file.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            flaw = error.errors()[0]
            key = ".".join(map(str, flaw["loc"]))
            raise DataError(f"{path}: not an index of token files ({key} {flaw['msg']})") from None

    def save(self, path: Path) -> None:
        """Write the file as a whole; when this returns, the disk has it."""
        totals = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        write_atomic(path, json.dumps({**totals, **asdict(self)}, indent=1))

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all shards, separators included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def quarantined(self) -> int:
        """Records of all shards that were no documents."""
        return sum(shard.quarantined for shard in self.shards)

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that are not written yet."""
        written = {shard.name for shard in self.shards}
        return [number for number in range(self.parts) if shard_name(number) not in written]

    def with_shard(self, shard: TokenShard) -> "TokenIndex":
        """The index with one more shard."""
        shards = sorted([*self.shards, shard], key=lambda shard: shard.name)
        return replace(self, shards=tuple(shards))


def shard_name(number: int) -> str:
    """The name of a shard's files, without their suffix.

    >>> shard_name(7)
    '00007'
    """
    return f"{number:05}"


class TokenCorpus:
    """The documents of a directory of token files, as they were written.

    A lane reads an equal interval of the tokens of all shards end to end: the documents whose
    first token is in it. A position is the number of the next document, counted over all shards.

        tokens     a a a / b b / c c c c c /      lane 0 of 2 has a and b, for b begins at 4,
        interval   0 0 0 0 0 0 1 1 1 1 1 1 1      lane 1 has c

    Args:
        name: the source's.
        path: the directory.

    Raises:
        ConfigError: there is no such directory, or nothing of this kind in it.
        DataError: it is not finished, or not as it was written.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.index = self._load_index()
        # Little-endian on any machine, as written.
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._check_sizes()
        shards = self.index.shards
        # Of each shard and, last, of one that would come after them all.
        self._first_document = [*accumulate((s.documents for s in shards), initial=0)]
        self._first_token = [*accumulate((s.tokens for s in shards), initial=0)]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The contents of the files; where they lie does not matter."""
        parts = [self.tokenizer_fingerprint, *(shard.xxh3_128 for shard in self.index.shards)]
        contents = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        count = f"{self.index.documents} documents of {self.index.tokens} tokens"
        return {f"data.sources.{self.name}": f"{count} {contents}"}

    @property
    def is_seekable(self) -> bool:
        """True, because the files are mapped."""
        return True

    @property
    def tokenizer_fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the tokens."""
        return self.index.tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """The `.model` file of the tokenizer that made the tokens."""
        return self.path / MODEL

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[TokenDocument, Position]]:
        """One pass over a lane's documents, whose tokens are not copied; see `Corpus`.

        Raises:
            DataError: a file is missing or damaged.
            TransientError: a file cannot be read at present.
        """
        total = self._first_token[-1]
        stop = self._first_from((lane + 1) * total // lanes)
        number = self._first_from(lane * total // lanes) if position is None else position
        while number < stop:
            shard = bisect_right(self._first_document, number) - 1
            first = self._first_document[shard]
            tokens, table = self._tokens(shard), self._table(shard)
            origin = f"{self.path / self.index.shards[shard].name}.tokens#"
            # Documents [at, here) of this shard are the lane's; `start` is the first one's token.
            here = min(stop - first, len(table))
            at = number - first
            start = int(table[at - 1, 0]) if at else 0
            for begin in range(at, here, TABLE_ROWS):
                # `tolist` gives Python's numbers, which are cheaper to use one by one than NumPy's.
                for end, digest in table[begin : min(begin + TABLE_ROWS, here)].tolist():
                    document = TokenDocument(tokens[start:end], digest, f"{origin}{at}")
                    start = end
                    at += 1
                    yield document, first + at
            number = first + here

    def verify(self) -> None:
        """Read every file and compare it with the index.

        Raises:
            DataError: one has changed since it was written.
            TransientError: one cannot be read at present.
        """
        for shard in self.index.shards:
            for suffix, expected in shard.xxh3_128.items():
                file = self.path / f"{shard.name}.{suffix}"
                try:
                    found = file_xxh3_128(file)
                except OSError as error:
                    raise self._unreadable(file.name, error) from error
                if found != expected:
                    raise self._damaged(f"{file.name} is not as it was written: its hash differs")
        if Tokenizer.load(self.tokenizer_path).fingerprint != self.tokenizer_fingerprint:
            raise self._damaged(f"{MODEL} is not the one that made the tokens")

    def _first_from(self, token: int) -> int:
        """The number of the first document that begins at this token or after it."""
        shard = bisect_right(self._first_token, token) - 1
        first, offset = self._first_document[shard], token - self._first_token[shard]
        if offset == 0:
            return first
        # Document i begins where i - 1 ends, so a search among the ends finds the first one.
        ends = self._table(shard)[:, 0]
        return first + 1 + int(np.searchsorted(ends, np.uint64(offset)))

    def _tokens(self, shard: int) -> np.ndarray:
        """The tokens [n] of a shard, as a plain array: slices of a memmap cost five times more."""
        return self._mapped(f"{self.index.shards[shard].name}.tokens", self._dtype)

    def _table(self, shard: int) -> np.ndarray:
        """The end and the digest of each document [n, 2] of a shard."""
        return self._mapped(f"{self.index.shards[shard].name}.documents", np.dtype("<u8")).reshape(
            -1, 2
        )

    def _mapped(self, file: str, dtype: np.dtype) -> np.ndarray:
        try:
            # A mapping needs no open file, so a directory may have thousands of shards.
            return np.asarray(np.memmap(self.path / file, dtype, mode="r"))
        except ValueError as error:
            raise self._damaged(f"{file} cannot be mapped ({reason_of(error)})") from error
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _load_index(self) -> TokenIndex:
        try:
            return TokenIndex.load(self.path / INDEX)
        except (FileNotFoundError, NotADirectoryError):
            raise self._no_index() from None
        except OSError as error:
            raise self._unreadable(INDEX, error) from error
        except DataError as error:
            raise self._damaged(reason_of(error)) from None

    def _no_index(self) -> ConfigError | DataError:
        """The error for a directory without an index; it says what to do."""
        if (self.path / UNFINISHED).exists():
            index = TokenIndex.load(self.path / UNFINISHED)
            return DataError(
                f"{self._setting}={str(self.path)!r}: not finished, {len(index.shards)} of "
                f"{index.parts} shards are written; run the same {COMMAND} again, which goes on "
                "where it ended"
            )
        found = f"no {INDEX} in it" if self.path.is_dir() else "no such directory"
        inside = [str(index.parent) for index in sorted(self.path.glob(f"*/{INDEX}"))]
        choice = " or ".join(inside) or f"a directory that {COMMAND} wrote"
        hint = f"give {choice} (relative paths start at {Path.cwd()})"
        return ConfigError([Problem(self._setting, str(self.path), found, hint)])

    def _check_sizes(self) -> None:
        """Compare the files' sizes with the index."""
        for shard in self.index.shards:
            expected = {
                "tokens": shard.tokens * self._dtype.itemsize,
                "documents": shard.documents * 16,
            }
            for suffix, size in expected.items():
                file = self.path / f"{shard.name}.{suffix}"
                if not file.exists():
                    raise self._damaged(f"{file.name} is missing")
                if (found := file.stat().st_size) != size:
                    raise self._damaged(f"{file.name} has {found} bytes instead of {size}")
        if not self.tokenizer_path.exists():
            raise self._damaged(f"{MODEL} is missing")

    @property
    def _setting(self) -> str:
        return f"data.sources.{self.name}.path"

    def _damaged(self, found: str) -> DataError:
        return DataError(
            f"{self._setting}={str(self.path)!r}: damaged, {found}; delete it and write it anew, "
            "or copy it again"
        )

    def _unreadable(self, file: str, error: OSError) -> DataError | TransientError:
        """The error for a file that the disk does not give: gone, or out of reach for now."""
        if isinstance(error, FileNotFoundError):
            return self._damaged(f"{file} is missing")
        return TransientError(
            f"{self._setting}={str(self.path)!r}: {file} cannot be read ({reason_of(error)}); "
            "make sure that its disk can be reached, and start the run again"
        )


def new_index(tokenizer: Tokenizer, made_from: dict[str, Any], parts: int) -> TokenIndex:
    """The index of a directory in which nothing is written yet."""
    return TokenIndex(
        dtype=_smallest_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        separator=tokenizer.eos_id,
        made_from=made_from,
        parts=parts,
    )


def begin(directory: Path, wanted: TokenIndex, tokenizer: Tokenizer) -> TokenIndex:
    """Make a directory for the shards of `wanted`, or go on with one that was begun.

    Returns:
        `wanted` with the shards that are written already.

    Raises:
        ConfigError: the directory holds tokens that were made with other settings.
    """
    for name in (INDEX, UNFINISHED):
        if (directory / name).exists():
            found = TokenIndex.load(directory / name)
            _check_same(directory, replace(found, shards=()), wanted)
            return found
    directory.mkdir(parents=True, exist_ok=True)
    # First the model: whoever sees `unfinished.json` can tokenise the shards.
    tokenizer.save(directory / MODEL)
    wanted.save(directory / UNFINISHED)
    return wanted


def finish(directory: Path) -> None:
    """Make a directory whose shards are all written one that can be read."""
    if (directory / UNFINISHED).exists():
        (directory / UNFINISHED).replace(directory / INDEX)


def write_shard(
    directory: Path, number: int, texts: Iterable[tuple[str, int]], tokenizer: Tokenizer
) -> TokenShard:
    """Tokenise texts, each given with its xxh3_64, into the files of a shard.

    The disk has the files when this returns, but they count only when the index names them. So they
    are written in place: what a killed process leaves is written over.
    """
    name = shard_name(number)
    dtype = np.dtype(_smallest_dtype(tokenizer.vocab_size)).newbyteorder("<")
    paths = {suffix: directory / f"{name}.{suffix}" for suffix in ("tokens", "documents")}
    documents = size = end = 0
    with paths["tokens"].open("wb") as tokens_file, paths["documents"].open("wb") as table_file:
        for text, digest in texts:
            tokens = tokenizer.encode_document(text)
            documents, size, end = documents + 1, size + len(text.encode()), end + len(tokens)
            # One document at a time, so that a shard of any size takes little memory.
            tokens_file.write(tokens.astype(dtype).tobytes())
            table_file.write(np.array([end, digest], "<u8").tobytes())
        for file in (tokens_file, table_file):
            flush_to_disk(file)
    hashes = {suffix: file_xxh3_128(path) for suffix, path in paths.items()}
    return TokenShard(name=name, documents=documents, tokens=end, bytes=size, xxh3_128=hashes)


def write_tokens(directory: Path, parts: Sequence[Iterable[str]], tokenizer: Tokenizer) -> None:
    """Tokenise texts into a whole directory, a shard for each part."""
    index = begin(directory, new_index(tokenizer, {}, len(parts)), tokenizer)
    for number, part in enumerate(parts):
        texts = ((text, xxhash.xxh3_64_intdigest(text.encode())) for text in part)
        index = index.with_shard(write_shard(directory, number, texts, tokenizer))
    index.save(directory / UNFINISHED)
    finish(directory)


def _smallest_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The type that holds every id of a vocabulary.

    >>> _smallest_dtype(65536), _smallest_dtype(65537)
    ('uint16', 'uint32')
    """
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _check_same(directory: Path, found: TokenIndex, wanted: TokenIndex) -> None:
    before, now = (asdict(index) for index in (found, wanted))
    before |= before.pop("made_from")
    now |= now.pop("made_from")
    if changed := "; ".join(changed_settings(before, now).values()):
        problem = (
            f"{directory}: holds tokens that were made otherwise: {changed}. Restore what changed, "
            "choose another directory, or delete this one"
        )
        raise ConfigError([problem])
