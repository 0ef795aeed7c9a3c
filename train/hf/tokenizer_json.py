"""Converting a SentencePiece model to transformers' `tokenizer.json`, with the same ids."""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protocol

from data.tokenizer import SPACE, Tokenizer

# Values of SentencePiece's enums; see sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

UNLIKELY = 1000.0
"""How much lower than any other the score of a special piece is, so that no text has one."""


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write the SentencePiece model and, if it can be converted, the files for `AutoTokenizer`.

    A text becomes its own tokens and no separator, as with OLMo 2's tokenizer. The separator is
    `bos_token` and `eos_token`, and whoever needs it puts it there: lm-evaluation-harness does so
    before each text whose likelihood it measures, and a tokenizer that does so too makes it two.
    `AutoTokenizer.from_pretrained(..., add_bos_token=True)` puts one before each text.

    A text that contains `</s>` does not become a separator: it stays four characters.
    """
    tokenizer.save(directory / "tokenizer.model")
    if not_converted(tokenizer):
        return
    # Imported here, because transformers takes seconds to import and is optional.
    from transformers import PreTrainedTokenizerFast

    fast = converted(tokenizer)
    separator, unknown = fast.id_to_token(tokenizer.eos_id), fast.id_to_token(_unknown(tokenizer))
    written = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), separator),
        unk_token=unknown,
        padding_side="left",  # a batch of prompts is continued at its right end
        split_special_tokens=True,  # `</s>` in a text is no separator
        clean_up_tokenization_spaces=False,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
    )
    written.save_pretrained(directory)


def not_converted(tokenizer: Tokenizer) -> list[str]:
    """Reasons why a tokenizer cannot be converted; `[]` for all that this project trains."""
    model = _proto(tokenizer)
    normalizer, kinds = model.normalizer_spec, {piece.type for piece in model.pieces}
    reasons = {
        "it changes characters": bool(normalizer.precompiled_charsmap),
        "it puts a space before each text": normalizer.add_dummy_prefix,
        "it drops spaces": normalizer.remove_extra_whitespaces,
        "it writes spaces behind words": model.trainer_spec.treat_whitespace_as_suffix,
        "it has no pieces for bytes": BYTE not in kinds,
        "it has pieces of the user's": not kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE},
        "it is neither BPE nor unigram": model.trainer_spec.model_type not in (UNIGRAM, BPE),
    }
    return [f"tokenizer.model: {reason}" for reason, holds in reasons.items() if holds]


def converted(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` that gives the same ids and texts.

    Pieces have real spaces here. So U+2581, which SentencePiece writes for a space, is a character
    like any other. Special pieces and bytes do not stand for text: no BPE merge makes one, and
    unigram gives them a score that is never the best.

    Unigram may differ in rare cases. SentencePiece adds up the scores of a text in float32; two
    segmentations whose scores are equal to this precision may be chosen differently.
    """
    import tokenizers
    from tokenizers import decoders, models

    # Byte pieces keep their names, <0x00> to <0xFF>, by which `ByteFallback` finds them.
    proto = _proto(tokenizer)
    is_text = [piece.type == NORMAL for piece in proto.pieces]
    names = [
        piece.piece.replace(SPACE, " ") if text else piece.piece
        for piece, text in zip(proto.pieces, is_text, strict=True)
    ]
    scores = [piece.score for piece in proto.pieces]
    unknown = _unknown(tokenizer)
    model: Any
    if proto.trainer_spec.model_type == BPE:
        texts = {n: s for n, s, text in zip(names, scores, is_text, strict=True) if text}
        # Bytes stand for characters that have no piece, as in SentencePiece.
        model = models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=merges(texts),
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    else:
        lowest = min(scores) - UNLIKELY
        vocab = [
            (n, s if text else lowest) for n, s, text in zip(names, scores, is_text, strict=True)
        ]
        model = models.Unigram(vocab, unk_id=unknown, byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return fast


def merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make another piece, in the order in which SentencePiece merges.

    It merges the pair with the best score first, and does not store the pairs themselves.

    >>> merges({"ab": -1.0, "a": -3.0, "b": -4.0, "aba": -2.0})
    [('a', 'b'), ('ab', 'a')]
    """
    return [
        (piece[:i], piece[i:])
        for piece in sorted(pieces, key=lambda piece: -pieces[piece])
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]


def _proto(tokenizer: Tokenizer) -> Any:
    return protocol.ModelProto.FromString(tokenizer.model)  # type: ignore[attr-defined]


def _unknown(tokenizer: Tokenizer) -> int:
    return [piece.type for piece in _proto(tokenizer).pieces].index(UNKNOWN)
