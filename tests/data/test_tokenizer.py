from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizer import SPACE, Tokenizer
from data.tokenizer_training import LOSSLESS, train

TEXT = ["def f(x):\n        return x + 1\n\n\n", "hello  world 123\t\tx\r\n"] * 30


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return train(iter(TEXT), {**LOSSLESS, "model_type": request.param, "vocab_size": 300})


@pytest.mark.parametrize("spaceless", [False, True])
@given(text=st.text())
@example(text="\r\n\t\x00\x01 \x0b\x1c\x85\u2028\ufeff\u2585 ⁇ 😀e\u0301\U0010ffff\n")
@example(text=f"{SPACE} {SPACE}{SPACE}a{SPACE}")
@example(text="<s></s><unk><0x0A><pad>▁</s>")
@example(text="  def f(x):\n\n        return 100\n  ")
def test_any_text_survives_and_its_bytes_are_counted(
    tokenizers: dict[bool, Tokenizer], spaceless: bool, text: str
) -> None:
    tokenizer = tokenizers[spaceless]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Tokenizer) -> dict[bool, Tokenizer]:
    """The corpus' tokenizer, and one trained on text without any space."""
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 270}
    return {False: tokenizer, True: train(iter(["日本語\n" * 5]), options)}


def test_both_kinds_are_lossless(trained: Tokenizer) -> None:
    for text in (*TEXT[:2], f"  {SPACE} 日本\x00 </s>"):
        assert trained.decode(trained.encode(text)) == text
        assert trained.byte_lengths[trained.encode(text)].sum() == len(text.encode())


def test_indentation_and_line_ends_are_pieces() -> None:
    trained = train(iter(TEXT), {**LOSSLESS, "model_type": "bpe", "vocab_size": 300})
    assert len(trained.encode("    ")) == 1
    assert len(trained.encode("):\n")) == 1


def test_digits_are_single_pieces(trained: Tokenizer) -> None:
    assert len(trained.encode("123")) == 3


def test_text_that_spells_control_symbols_stays_text(tokenizer: Tokenizer) -> None:
    for text in ("</s>", "a </s> b", "<unk>", "<0x0A>"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids


def test_a_model_with_symbols_of_its_own_never_makes_control_symbols_of_text() -> None:
    options = {
        **LOSSLESS,
        "model_type": "bpe",
        "vocab_size": 300,
        "user_defined_symbols": ["<sep>"],
        "control_symbols": ["<mask>"],
        "eos_piece": "<|end|>",
    }
    tokenizer = train(iter(TEXT), options)
    text = "a<sep>b<mask>c<|end|>d"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text)  # <sep> is one id of five bytes
    assert tokenizer.eos_id not in ids


def test_a_document_ends_with_its_separator(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document("hidden")
    assert ids.tolist() == [*tokenizer.encode("hidden").tolist(), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hidden"
    assert tokenizer.byte_lengths[tokenizer.eos_id] == 0


def test_a_saved_model_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(path := tmp_path / "new/a.model")
    again = Tokenizer.load(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode("the original"), tokenizer.encode("the original"))
    assert [p.name for p in path.parent.iterdir()] == ["a.model"]


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "a.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"a\.model: not a SentencePiece model \("):
        Tokenizer.load(path)


def test_a_model_without_a_separator_is_refused(tmp_path: Path) -> None:
    # Here </s> is a symbol that text can spell, so it cannot stand between documents.
    options = {**LOSSLESS, "eos_id": -1, "user_defined_symbols": ["</s>"]}
    train(iter(TEXT), {**options, "model_type": "bpe", "vocab_size": 300}).save(
        tmp_path / "a.model"
    )
    with pytest.raises(ValueError, match=r"a\.model: has no end-of-sentence control symbol"):
        Tokenizer.load(tmp_path / "a.model")
