from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from conf.errors import DataError
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


def test_decoding_passes_over_what_has_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a hidden copy").tolist()
    end, beyond = tokenizer.eos_id, [tokenizer.vocab_size, 10**6]
    assert tokenizer.decode([end, *ids[:2], *beyond, end, *ids[2:], end]) == "a hidden copy"
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


def changed(tokenizer: Tokenizer, tmp_path: Path, change: Callable[[Any], None]) -> Tokenizer:
    """The same model with a change in its file."""
    tokenizer.save(path := tmp_path / "changed.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(model)
    return Tokenizer(model.SerializeToString())


def test_models_that_encode_alike_have_one_fingerprint(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def tell_of_another_training(model: Any) -> None:
        model.trainer_spec.num_threads = 7
        model.trainer_spec.input.append("elsewhere.txt")
        model.trainer_spec.model_prefix = "elsewhere"
        model.trainer_spec.split_digits = not model.trainer_spec.split_digits  # is in the pieces
        model.normalizer_spec.name = "none"
        model.denormalizer_spec.add_dummy_prefix = True  # as it is where nothing is said

    twin = changed(tokenizer, tmp_path, tell_of_another_training)
    assert twin.model != tokenizer.model
    assert twin.fingerprint == tokenizer.fingerprint


CHANGES: dict[str, Callable[[Any], None]] = {
    "a score": lambda model: setattr(model.pieces[-1], "score", model.pieces[-1].score - 1),
    "a piece": lambda model: setattr(model.pieces[-1], "piece", "€"),
    "a type": lambda model: setattr(model.pieces[-1], "type", 4),
    "the order": lambda model: model.pieces.insert(300, model.pieces.pop()),
    "one less": lambda model: model.pieces.pop(),
    "the kind": lambda model: setattr(model.trainer_spec, "model_type", 1),
    "a suffix": lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
    "the unknown": lambda model: setattr(model.trainer_spec, "unk_surface", "?"),
    "the separator": lambda model: setattr(model.trainer_spec, "eos_piece", "<unk>"),
    "a prefix": lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True),
    "spaces": lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True),
    "spaces kept": lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False),
    "decoding": lambda model: setattr(model.denormalizer_spec, "escape_whitespaces", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_what_encodes_changes_the_fingerprint(
    tokenizer: Tokenizer, tmp_path: Path, change: str
) -> None:
    other = changed(tokenizer, tmp_path, CHANGES[change])
    assert other.fingerprint != tokenizer.fingerprint


def test_a_change_of_normalization_changes_the_fingerprint(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 300}
    train(iter(TEXT), {**options, "normalization_rule_name": "nfkc"}).save(tmp_path / "nfkc.model")
    nfkc = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "nfkc.model").read_bytes())
    characters = nfkc.normalizer_spec.precompiled_charsmap

    def normalize(model: Any) -> None:
        model.normalizer_spec.precompiled_charsmap = characters

    other = changed(tokenizer, tmp_path, normalize)
    assert other.encode("ﬁ").tolist() == tokenizer.encode("fi").tolist()
    assert other.fingerprint != tokenizer.fingerprint


def test_a_saved_model_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(path := tmp_path / "new/a.model")
    again = Tokenizer.load(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode("the original"), tokenizer.encode("the original"))
    assert [p.name for p in path.parent.iterdir()] == ["a.model"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"no model", "it is another kind of file"),
        (bytes(3000), "it is another kind of file"),
        (b"PK\x03\x04" + bytes(99), "it is another kind of file"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "Hugging Face's tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model_is_told_so_and_what_it_is(
    tmp_path: Path, content: bytes, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "a.model").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.model: not a SentencePiece model: ") as error:
        Tokenizer.load(path)
    assert what in str(error.value)
    assert capfd.readouterr().err == "", "SentencePiece itself says nothing"


def test_a_model_that_is_cut_off_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (path := tmp_path / "a.model").write_bytes(tokenizer.model[: len(tokenizer.model) // 2])
    with pytest.raises(DataError, match=r"not a SentencePiece model: .* damaged"):
        Tokenizer.load(path)


def test_a_model_without_a_separator_is_refused(tmp_path: Path) -> None:
    # Here </s> is a symbol that text can spell, so it cannot stand between documents.
    options = {**LOSSLESS, "eos_id": -1, "user_defined_symbols": ["</s>"]}
    train(iter(TEXT), {**options, "model_type": "bpe", "vocab_size": 300}).save(
        tmp_path / "a.model"
    )
    with pytest.raises(DataError, match=r"a\.model: has no end-of-sentence control symbol"):
        Tokenizer.load(tmp_path / "a.model")
