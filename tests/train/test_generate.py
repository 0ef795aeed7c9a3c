"""The text of a trained model, as it comes, and what is said when there is none."""

import io
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conf.arguments import parse
from conf.errors import ConfigError
from phd.inference.generator import Generator
from train.checkpoint.load_run import load_run
from train.generate import GenerateArguments, Writer, main, read_input, read_prompts
from train.run import Run


def written(capsys: pytest.CaptureFixture[str], **given: object) -> str:
    assert main(GenerateArguments(device="cpu", **given)) == 0
    return capsys.readouterr().out


def refusal(run: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_run(run, torch.device("cpu"))
    assert str(error.value).startswith("1 problem in the arguments:\n")
    [problem] = error.value.problems
    return str(problem)


# What is written


def test_without_temperature_it_is_the_most_likely_text(config, trained, capsys) -> None:
    run = trained(config("model.K=3")).run
    ids = [run.tokenizer.eos_id, *run.tokenizer.encode("def é").tolist()]
    context = ids
    for _ in range(70):  # beyond the 64 positions that the model has
        context = context if len(context) <= 64 else context[-32:]
        with torch.no_grad():
            logits = run.engine.model.logits(torch.tensor([context]))[0, -1]
        new = int(logits.argmax())
        if new == run.tokenizer.eos_id:
            break
        ids, context = [*ids, new], [*context, new]
    assert len(ids) > 64
    given = {"run": str(run.directory), "prompt": "def é", "max_tokens": 70, "temperature": 0}
    assert written(capsys, **given) == run.tokenizer.decode(ids) + "\n"


def test_embeddings_that_no_piece_belongs_to_mean_nothing(config, opened, capsys) -> None:
    run = opened(config("model.tied=false", "model.vocab_size=900"))
    assert run.tokenizer.vocab_size < 800
    [a], [k] = (run.tokenizer.encode(text).tolist() for text in ("a", "k"))
    reciting(run, [a, 800, 899, k, run.tokenizer.eos_id])
    given = {"run": str(run.directory), "prompt": "a", "temperature": 0}
    assert written(capsys, **given) == "ak\n"


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_compiled_decoding_writes_the_same_text(config, trained, capsys) -> None:
    torch.compiler.reset()
    run = str(trained(config("model.K=3")).run.directory)
    given = {"run": run, "prompt": "def é", "max_tokens": 70, "temperature": 0}
    assert written(capsys, **given, compile=True) == written(capsys, **given)


def test_equal_seeds_write_equal_texts_and_others_do_not(config, trained, capsys) -> None:
    run = str(trained(config()).run.directory)
    first, again, other = (
        written(capsys, run=run, prompt="é  </s>", max_tokens=40, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith("é  </s>")
    assert other.startswith("é  </s>")


def reciting(run: Run, tokens: list[int]) -> None:
    """Saves a model that goes from each of the tokens to the next, whatever was before."""
    model = run.engine.model
    with torch.no_grad():
        for parameter in (model.embed.weight, model.head.weight):
            parameter.zero_()
        for block in model.blocks:
            block.attention.o.weight.zero_()
            block.ffn.down.weight.zero_()
        for place, (token, following) in enumerate(pairwise(tokens)):
            model.embed.weight[token, place] = 1
            model.head.weight[following, place] = 1
    state = {"config": run.config.to_dict(), "stream": run.stream.fingerprint}
    run.store.save(1, run.engine.state(), state)
    run.store.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_on_cuda_it_is_the_text_of_the_cpu(config, opened, capsys) -> None:
    run = opened(config("model.tied=false"))
    [a], [k] = (run.tokenizer.encode(text).tolist() for text in ("a", "k"))
    reciting(run, [a, k, run.tokenizer.eos_id])
    for device in ("cpu", "cuda"):
        arguments = GenerateArguments(
            run=str(run.directory), prompt="a", temperature=0, device=device
        )
        assert main(arguments) == 0
        assert capsys.readouterr().out == "ak\n"


def test_a_character_of_several_tokens_is_written_whole_and_the_separator_ends_it(
    config, opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(config("model.tied=false"))
    [a], character, [k] = (run.tokenizer.encode(text).tolist() for text in ("a", "漢", "k"))
    assert len(character) == 3
    reciting(run, [a, *character, k, run.tokenizer.eos_id])
    pieces: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    main(GenerateArguments(run=str(run.directory), prompt="a", temperature=0, device="cpu"))
    assert [piece for piece in pieces if piece] == ["a", "漢", "k", "\n"]


def test_a_character_that_was_not_finished_is_shown_as_such(config, opened, capsys) -> None:
    run = opened(config("model.tied=false"))
    [a], character = (run.tokenizer.encode(text).tolist() for text in ("a", "漢"))
    reciting(run, [a, *character, a])
    text = written(capsys, run=str(run.directory), prompt="a", max_tokens=2, temperature=0)
    assert text.startswith("a\N{REPLACEMENT CHARACTER}")


# What is refused


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("typed", [b"caf\xe9", b"\xff\xfea\x00"])
def test_a_prompt_that_is_not_utf8_is_told_so(
    typed: bytes, errors: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(typed), encoding=encoding, errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(ConfigError, match="the prompt on the standard input is not UTF-8"):
        read_input()


@pytest.mark.parametrize(
    ("encoding", "errors"), [("utf-8", "strict"), ("ascii", "surrogateescape")]
)
def test_a_prompt_in_utf8_is_read_in_every_locale(
    encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.BytesIO("é 😀\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding=encoding, errors=errors))
    assert read_input() == "é 😀\n"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    missing = "no config.yaml there; give the directory of a run"
    assert refusal(tmp_path / "none") == f"run={tmp_path / 'none'}: {missing}"
    assert refusal(tmp_path) == f"run={tmp_path}: {missing}"


def test_a_run_without_a_checkpoint_is_refused(config, opened) -> None:
    directory = opened(config()).directory
    assert refusal(directory) == f"run={directory}: no checkpoint there yet; let it train on"


def test_a_damaged_checkpoint_is_passed_over_and_if_it_is_the_last_refused(
    config, trained, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trained(config("checkpoint.every=3"))
    directory = done.run.directory
    os.truncate(directory / "checkpoints/step_00000006/__0_0.distcp", 100)
    model = load_run(directory, torch.device("cpu")).model
    assert not torch.equal(model.embed.weight, done.run.engine.model.embed.weight)
    told = capsys.readouterr().err
    assert told.startswith("rejected the checkpoint ")
    assert "step_00000006: __0_0.distcp has 100 bytes" in told
    os.truncate(directory / "checkpoints/step_00000003/__0_0.distcp", 100)
    problem = refusal(directory)
    assert "every checkpoint in" in problem
    assert "step_00000006: __0_0.distcp has 100 bytes" in problem


def test_impossible_arguments_are_all_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        parse(GenerateArguments, ["run=x", "max_tokens=0", "temperature=-1", "top_p=2", "top_k=0"])
    assert [str(problem).partition(":")[0] for problem in error.value.problems] == [
        "max_tokens=0",
        "temperature=-1.0",
        "top_k=0",
        "top_p=2.0",
    ]
    with pytest.raises(ConfigError, match=r"\n  device='cuda': this machine has no usable CUDA"):
        parse(GenerateArguments, ["run=x", "device=cuda"])


# Several texts


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_prompts_gives_a_line_of_json_for_each_text(config, trained, capsys) -> None:
    directory = trained(config("model.K=3")).run.directory
    prompts = ["def é", "the cache and", "one", "a b c"]
    plain, records = directory / "prompts.txt", directory / "prompts.jsonl"
    plain.write_text("\n\n".join(prompts) + "\n")
    records.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    given = {"run": str(directory), "n": 2, "max_tokens": 20, "temperature": 1.0}
    found = lines(written(capsys, file=str(plain), batch=3, **given))
    assert [line["prompt"] for line in found] == [p for p in prompts for _ in range(2)]
    assert len({line["text"] for line in found}) == 8
    assert {line["ending"] for line in found} <= {"document", "length"}
    # However many are written at the same time, and wherever the prompts come from.
    assert lines(written(capsys, file=str(records), batch=50, **given)) == found
    first = written(capsys, prompt=prompts[0], **given | {"n": 1})
    assert first == prompts[0] + found[0]["text"] + "\n"
    both = written(capsys, prompt=prompts[0], **given)
    assert both.startswith(f"--- 1 of 2, ended by {found[0]['ending']}\n{prompts[0]}")
    assert both.endswith(prompts[0] + found[1]["text"] + "\n")


class WriterAhead(Writer):
    """One whose generator has fixed rows and runs ahead, as on CUDA."""

    def _generator(self, batch: int) -> Generator:
        generator = super()._generator(batch)
        generator._is_fixed, generator._ahead = True, 1
        return generator


def test_tokens_that_are_launched_after_a_text_has_ended_are_not_part_of_it(
    config, trained
) -> None:
    directory = trained(config("model.K=3")).run.directory
    args = GenerateArguments(
        run=str(directory), device="cpu", n=3, batch=2, max_tokens=20, temperature=2.0, stop=("e",)
    )
    prompts, found = ["def é", "one", "a b c"], []
    for writer in (Writer(args), WriterAhead(args)):
        texts = [(prompt, text.text, text.ending) for prompt, text in writer.write(prompts)]
        found.append((texts, ["".join(writer.stream(prompt)) for prompt in prompts]))
    assert found[0] == found[1]
    assert {ending for _, _, ending in found[0][0]} >= {"stop", "length"}


def test_a_stop_ends_a_text_and_is_not_part_of_it(config, opened, capsys, tmp_path) -> None:
    run = opened(config("model.tied=false"))
    tokens = [run.tokenizer.encode(text).tolist() for text in "akcxyz"]
    reciting(run, [token for [token] in tokens] + [run.tokenizer.eos_id])
    given = {"run": str(run.directory), "prompt": "a", "temperature": 0}
    for stop, text in {
        ("xy",): "akc",
        ("c", "k"): "a",
        ("yx",): "akcxyz",
        ("zz",): "akcxyz",
    }.items():
        assert written(capsys, stop=stop, **given) == text + "\n"
    (tmp_path / "p.txt").write_text("a\nc\n")
    given = {"run": str(run.directory), "file": str(tmp_path / "p.txt"), "temperature": 0}
    assert lines(written(capsys, stop=("c",), **given)) == [
        {"prompt": "a", "text": "k", "ending": "stop"},
        {"prompt": "c", "text": "xyz", "ending": "document"},
    ]


def test_without_a_prompt_the_standard_input_gives_it(
    config, opened, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(config("model.tied=false"))
    tokens = [run.tokenizer.encode(text).tolist() for text in "akc"]
    reciting(run, [token for [token] in tokens] + [run.tokenizer.eos_id])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"xa")))
    assert written(capsys, run=str(run.directory), temperature=0) == "xakc\n"
    terminal = io.StringIO("k\na\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert written(capsys, run=str(run.directory), temperature=0) == "> kc\n> akc\n> \n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", "\n \n", "no prompt in it"),
        ("a.jsonl", '{"text": "a"}\n', "no text named `prompt` in {"),
        ("b.jsonl", "prompt\n", "cannot be read"),
        ("c.jsonl", '{"prompt": "a \\ud83d b"}\n', "surrogates not allowed"),
    ],
)
def test_a_file_without_prompts_is_refused(
    name: str, content: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        main(GenerateArguments(run="unread", file=str(path)))


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".NDJSON"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(
    tmp_path: Path, ending: str, encoding: str
) -> None:
    prompts = ["the", "of é"]
    lines = prompts if ending == ".txt" else [json.dumps({"prompt": text}) for text in prompts]
    (path := tmp_path / f"prompts{ending}").write_text("\r\n".join(lines), encoding=encoding)
    assert read_prompts(path) == prompts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_prompts_in_another_encoding_are_told_so(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the first prompt\nand the second"
    (path := tmp_path / "prompts.txt").write_text(text, encoding=encoding)
    named = f"{encoding[:6].upper()}, not UTF-8: convert it"
    with pytest.raises(ConfigError, match=named):
        read_prompts(path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    with pytest.raises(ConfigError, match=f"the standard input is not UTF-8 .{named}"):
        read_input()


def test_a_prompt_on_the_standard_input_may_have_a_byte_order_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfthe\r\nend")))
    assert read_input() == "the\nend"
