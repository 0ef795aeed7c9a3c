"""Text to token ids and back, by a SentencePiece model."""

import json
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protocol
from xxhash import xxh3_128_hexdigest

from conf.errors import DataError
from data.source import Document, TokenDocument
from data.storage.atomic import write_atomic

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space in its pieces

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that a clone without Git LFS has in place of a large one."""

# The settings in a model file that decide how it encodes and decodes. All the others tell how it
# was trained, or follow from the pieces, as byte fallback does.
SYMBOLS = ("unk_piece", "bos_piece", "eos_piece", "pad_piece", "unk_surface")
CHARACTERS = ("precompiled_charsmap", "escape_whitespaces")
SPACES = ("add_dummy_prefix", "remove_extra_whitespaces")
SETTINGS = {
    "trainer_spec": ("model_type", "treat_whitespace_as_suffix", *SYMBOLS),
    "normalizer_spec": (*CHARACTERS, *SPACES),
    "denormalizer_spec": (*CHARACTERS, *SPACES),
}


class Tokenizer:
    """A trained SentencePiece model.

    Text never becomes a control symbol: a text that spells `</s>` is encoded as four characters.

    Attributes:
        vocab_size: V, the number of ids.
        eos_id: the control symbol that ends a document.
        byte_lengths: [V] int64, the UTF-8 bytes that each id stands for; 0 for control symbols
            and for unknown characters (which a model with byte fallback does not have). Summed
            over `encode(text)` they are the bytes of `text` for any model that encodes it
            losslessly, as all those do that are trained here.
        fingerprint: a hash of the pieces and settings; models that encode alike have the same one,
            however they were trained.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.byte_lengths = _byte_lengths(self._processor)
        self.fingerprint = _fingerprint(model)
        bytes_of_space = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self._space = bytes_of_space if all(map(self._processor.is_byte, bytes_of_space)) else None

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a `.model` file.

        Raises:
            DataError: it is no model, or has no control symbol that could end a document.
            OSError: it cannot be read.
        """
        model = path.read_bytes()
        # Of no bytes at all, SentencePiece makes a processor that fails when it is used.
        if not model:
            raise _no_model(path, model)
        try:
            tokenizer = cls(model)
        except RuntimeError as error:
            raise _no_model(path, model) from error
        if tokenizer.eos_id < 0:
            raise DataError(
                f"{path}: has no end-of-sentence control symbol to stand between documents; train "
                "it with one (SentencePiece's --eos_id)"
            )
        return tokenizer

    def save(self, path: Path) -> None:
        """Write the `.model` file; several processes may do so at the same time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.model)

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] of a text, int32. No control symbol is among them."""
        if self._space is None or SPACE not in text:
            return self._processor.encode_as_numpy(text)
        # SentencePiece writes spaces as this character, and would decode it as a space.
        first, *others = map(self._processor.encode_as_numpy, text.split(SPACE))
        space = np.array(self._space, dtype=np.int32)
        return np.concatenate([first, *(part for other in others for part in (space, other))])

    def encode_document(self, text: str) -> np.ndarray:
        """The ids [n] of a text and, last, the separator that ends a document."""
        return np.append(self.encode(text), np.int32(self.eos_id))

    def document_tokens(self, document: Document | TokenDocument) -> np.ndarray:
        """The ids [n] of a document and its separator; a `TokenDocument` has them already."""
        if isinstance(document, TokenDocument):
            return document.tokens
        return self.encode_document(document.text)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of some ids, without control symbols.

        Ids from V on are left out, too; a model with more embeddings than pieces may sample them.
        """
        ids = np.asarray(ids, dtype=np.int64)
        return self._processor.decode(ids[ids < self.vocab_size].tolist())


def _no_model(path: Path, content: bytes) -> DataError:
    """The error for a file that is no SentencePiece model, which says what it is instead."""
    beginning = content.lstrip()[:1]
    if not content:
        what = "it is empty"
    elif content.startswith(LFS_POINTER):
        what = "it is a pointer of Git LFS; get the file itself with git lfs pull"
    elif beginning == b"{":
        what = (
            "it is JSON, as Hugging Face's tokenizer.json is; SentencePiece's own file is often "
            "called tokenizer.model"
        )
    else:
        what = "it is another kind of file, or damaged"
    return DataError(f"{path}: not a SentencePiece model: {what}")


def _fingerprint(model: bytes) -> str:
    given = protocol.ModelProto.FromString(model)  # type: ignore[attr-defined]
    pieces = [[piece.piece, piece.score, piece.type] for piece in given.pieces]
    settings = [
        [part, name, repr(getattr(getattr(given, part), name))]
        for part, names in SETTINGS.items()
        for name in names
    ]
    return xxh3_128_hexdigest(json.dumps([pieces, settings]).encode())


def _byte_lengths(processor: SentencePieceProcessor) -> np.ndarray:
    lengths = np.zeros(processor.vocab_size(), dtype=np.int64)
    for i in range(len(lengths)):
        if processor.is_byte(i):
            lengths[i] = 1
        elif not (processor.is_control(i) or processor.is_unknown(i)):
            lengths[i] = len(processor.id_to_piece(i).replace(SPACE, " ").encode())
    return lengths
