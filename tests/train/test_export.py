"""What is exported loads in transformers, with our package or without, and computes the same."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from conf.arguments import parse
from conf.errors import ConfigError
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import LOSSLESS, train
from phd.config import SamplingConfig
from phd.inference.generator import Generator, Request
from train.checkpoint.load_run import load_run
from train.export import ExportArguments, main, own_modules
from train.hf.tokenizer_json import converted, not_converted, write_tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers")

IDS = [[1, 5, 9, 13, 7, 2, 30, 31, 8]]
ODD = [
    "",
    "a</s>b <s> <unk> <0x41> </s></s>",
    "\u2581x \u2581\u2581 \u2581",
    "\t\n\n  \r\n\tend  ",
    " lead and trail ",
    "é漢😀 e\u0301 \x00 \ufffd \u200b",
    " " * 300 + "\n" * 77 + "\t" * 33 + "-" * 50,
]


@pytest.fixture(scope="session")
def run_of(
    small_at: Callable[..., list[str]],
    trained: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """The directory of a run trained with some settings, once for all that ask for the same."""
    from train.compose import load

    runs: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in runs:
            directory = tmp_path_factory.mktemp("runs") / "run"
            trained(load(small_at(directory, *settings)))
            runs[settings] = directory
        return runs[settings]

    return run


def exported(run: Path, out: Path, **given: Any) -> Path:
    assert main(ExportArguments(run=str(run), out=str(out), **given)) == 0
    return out


def logits(run: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = load_run(run, torch.device("cpu")).model
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model.to(dtype).logits(torch.tensor(IDS))


UNSAID = "ignore:invalid escape sequence"


def elsewhere(script: str, tmp_path: Path, *arguments: str) -> Any:
    """What a process that knows nothing of our package prints, as JSON."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # The second is said of torchao's source, which transformers imports.
        [sys.executable, "-P", "-W", "error", "-W", UNSAID, "-c", script, *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # who is asked whether to trust says no
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ALONE = f"""
import json, sys
sys.modules["phd"] = None  # installed or not, it cannot be imported
sys.modules["triton"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def look(first):
    model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=True)
    second = first + "-second"
    model.save_pretrained(second)
    tokenizer.save_pretrained(second)
    again = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True)
    ids = torch.tensor({IDS})
    batch = tokenizer(["def f(", "x"], return_tensors="pt", padding=True)
    written = model.generate(**batch, max_new_tokens=5, do_sample=False)
    return {{
        "class": type(model).__name__,
        "module": type(model).__module__.partition(".")[0],
        "logits": model(ids).logits.tolist(),
        "cached": model(ids, use_cache=True).logits.tolist(),
        "again": again(ids).logits.tolist(),
        "padding": batch["attention_mask"].tolist(),
        "texts": tokenizer.batch_decode(written),
        "tokens": batch["input_ids"].tolist(),
    }}

print(json.dumps([look(first) for first in sys.argv[1:]]))
"""

OURS, OLMO, LLAMA = ("model.K=3",), ("model=vanilla",), ("model=vanilla", "model.norm=pre")


class Export(NamedTuple):
    """An export, its run, and what a process that knows nothing of our package says of it."""

    run: Path
    out: Path
    found: dict[str, Any]


@pytest.fixture(scope="module")
def alone_of(
    run_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], Export]:
    """By the settings of a run; one process looks at all, for its imports take seconds."""
    folder = tmp_path_factory.mktemp("exports")
    names = {OURS: "my-model.v1", OLMO: "olmo", LLAMA: "llama"}
    outs = [exported(run_of(*settings), folder / name) for settings, name in names.items()]
    found = elsewhere(ALONE, folder, *map(str, outs))
    return {
        settings: Export(run_of(*settings), *told)
        for settings, *told in zip(names, outs, found, strict=True)
    }


# A model of our own


@pytest.mark.process
def test_an_export_needs_nothing_of_ours(alone_of: dict[tuple[str, ...], Export]) -> None:
    run, out, found = alone_of[OURS]
    assert (found["class"], found["module"]) == ("PhdForCausalLM", "transformers_modules")
    for name in ("logits", "cached", "again"):
        torch.testing.assert_close(torch.tensor(found[name]), logits(run), rtol=1e-5, atol=1e-5)
    tokenizer = load_run(run, torch.device("cpu")).tokenizer
    rows = [tokenizer.encode(text).tolist() for text in ("def f(", "x")]
    assert [sum(mask) for mask in found["padding"]] == [len(row) for row in rows]
    assert [ids[-len(row) :] for ids, row in zip(found["tokens"], rows, strict=True)] == rows
    assert found["texts"][0].startswith("def f(")
    # transformers finds imports by their text, also those that only a GPU needs.
    copied = {path.stem for path in (out.parent / "hf").rglob("*.py")}
    assert own_modules().keys() <= copied


def test_with_our_package_no_code_has_to_be_trusted(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    from phd.hf.modeling import PhdForCausalLM

    run = run_of("model.K=3")
    out = exported(run, tmp_path / "out", dtype="bfloat16")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is PhdForCausalLM
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(IDS)).logits, logits(run, torch.bfloat16))
    ids = {model.generation_config.bos_token_id, model.generation_config.eos_token_id}
    assert ids == {model.generation_config.pad_token_id} == {1}


def test_exported_modules_know_each_other_and_no_package_of_ours() -> None:
    modules = own_modules()
    assert {"modeling", "model", "split_kv", "flash", "config"} <= modules.keys()
    assert {"fused_step", "products", "placement", "token_attention", "residual"} <= modules.keys()
    assert not {"hugging_face", "sampling", "flops"} & modules.keys()
    for source in modules.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or node.module in modules
                assert not (node.level == 0 and str(node.module).startswith("phd"))
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("phd") for alias in node.names)


def test_from_the_hub_no_package_is_demanded_that_only_gpus_need(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_imports

    demanded: set[str] = set()
    for name, source in own_modules().items():
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        demanded |= set(get_imports(path)) - sys.stdlib_module_names
    assert demanded == {"torch", "transformers"}


# A model that transformers has


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "name"), [(OLMO, "Olmo2ForCausalLM"), (LLAMA, "LlamaForCausalLM")]
)
def test_a_plain_transformer_becomes_one_of_theirs(
    settings: tuple[str, ...], name: str, alone_of: dict[tuple[str, ...], Export]
) -> None:
    run, out, found = alone_of[settings]
    assert not list(out.glob("*.py"))
    assert (found["class"], found["module"]) == (name, "transformers")
    for part in ("logits", "cached", "again"):
        torch.testing.assert_close(torch.tensor(found[part]), logits(run), rtol=1e-5, atol=1e-5)
    assert 1 not in found["tokens"][0]
    assert found["texts"][0].startswith("def f(")
    assert "trust_remote_code" not in (out / "README.md").read_text()


def test_a_plain_transformer_with_norms_of_its_own_keeps_our_code(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("model=vanilla", "model.norm=hybrid")
    out = exported(run, tmp_path / "out")
    assert (out / "modeling.py").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(torch.tensor(IDS)).logits, logits(run))


# The tokenizer


def sources() -> Iterator[str]:
    """Python files with what is hard in them: tabs, accents, long runs."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in ("ast.py", "heapq.py", "textwrap.py", "encodings/cp1252.py", "locale.py"):
        yield (folder / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    options = {**LOSSLESS, "model_type": request.param, "vocab_size": 900, "num_threads": 1}
    return train(iter([*sources()][:3]), options)


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, tokenizer, max_seq_len=10**6)
    assert Tokenizer.load(directory / "tokenizer.model").fingerprint == tokenizer.fingerprint
    return transformers.AutoTokenizer.from_pretrained(directory)


def score(tokenizer: Tokenizer, ids: list[int]) -> float:
    processor = SentencePieceProcessor(model_proto=tokenizer.model)
    return sum(processor.get_score(i) for i in ids)


def test_tokens_are_the_same_as_ours_without_a_separator(tokenizer: Tokenizer, fast: Any) -> None:
    lines = [line for text in sources() for line in text.splitlines(keepends=True)]
    texts = [*ODD, *lines, *sources()]
    differing = 0
    for text in texts:
        ours, theirs = tokenizer.encode(text).tolist(), fast(text)["input_ids"]
        assert tokenizer.eos_id not in theirs
        if ours != theirs:
            # Of two ways that float32 cannot tell apart, unigram may take either.
            assert len(text) > 40
            assert score(tokenizer, theirs) == pytest.approx(score(tokenizer, ours), rel=1e-6)
            differing += 1
        for asked in (True, False):  # vLLM asks for special tokens
            assert fast.encode(text, add_special_tokens=asked) == theirs
        assert fast.decode(theirs) == text
    bpe = not converted(tokenizer).model.__class__.__name__.startswith("Unigram")
    assert differing <= (0 if bpe else len(texts) // 50)


def test_texts_are_the_same_as_ours(tokenizer: Tokenizer, fast: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    whole = [i for i in range(3, tokenizer.vocab_size) if i > 259]  # no bytes
    for ids in torch.randint(len(whole), (50, 20), generator=rng).tolist():
        ids = [whole[i] for i in ids] + [tokenizer.eos_id, tokenizer.vocab_size + 3]
        assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_tokenizer_that_is_asked_to_puts_one_separator_before_each_text(
    tokenizer: Tokenizer, fast: Any, tmp_path: Path
) -> None:
    fast.save_pretrained(tmp_path)
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    for text in ODD:
        assert asked(text)["input_ids"] == [tokenizer.eos_id, *fast(text)["input_ids"]]
        assert asked.decode(asked(text)["input_ids"], skip_special_tokens=True) == text
    assert (fast.add_bos_token, asked.add_bos_token) == (False, True)


def test_special_tokens_are_known_and_padding_is_on_the_left(
    tokenizer: Tokenizer, fast: Any
) -> None:
    assert {fast.bos_token_id, fast.eos_token_id, fast.pad_token_id} == {tokenizer.eos_id}
    assert len(fast) == tokenizer.vocab_size
    batch = fast(["a", "a longer text"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


def test_a_tokenizer_that_changes_text_is_not_converted_and_that_is_told(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**LOSSLESS, "model_type": "bpe", "vocab_size": 320, "add_dummy_prefix": True}
    foreign = train(iter(["some text of words\n" * 20]), options)
    assert not_converted(foreign) == ["tokenizer.model: it puts a space before each text"]
    foreign.save(tmp_path / "foreign.model")
    run = run_of(f"tokenizer.path={tmp_path / 'foreign.model'}")
    out = exported(run, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == foreign.model
    assert not (out / "tokenizer.json").exists()
    told = "no tokenizer.json: tokenizer.model: it puts a space before each text; tokenizer.model"
    assert told in capsys.readouterr().err
    card = (out / "README.md").read_text()
    assert 'sentencepiece.SentencePieceProcessor(model_file="out/tokenizer.model")' in card


# What measures and what writes


LONG = "def keep(only, its): return [original for token in hidden]\n    # then more of it\n"


@pytest.fixture(scope="session")
def long_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents that are each longer than a row."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    texts = [f"{i} " + LONG * 4 for i in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def harness(out: Path, **given: Any) -> Any:
    """lm-evaluation-harness's model of an exported directory, with its defaults."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval")
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 1, "trust_remote_code": True}
    return models.HFLM(pretrained=str(out), **settings | given)


def rolling(model: Any, text: str) -> float:
    """The log-likelihood of a text in nats, as lm-evaluation-harness measures it."""
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [found] = model.loglikelihood_rolling([request], disable_tqdm=True)
    return float(found)


@pytest.mark.parametrize(
    ("model", "documents"),
    [
        ("model=vanilla", "concatenate"),
        ("model.K=3", "isolate"),
        ("model.norm=hybrid", "concatenate"),
    ],
)
def test_lm_evals_loglikelihood_rolling_is_our_held_out_loss(
    model: str,
    documents: str,
    run_of: Callable[..., Path],
    long_documents: Path,
    tmp_path: Path,
) -> None:
    settings = (f"data.documents={documents}", "eval.rows=1", "model.tied=false")
    run = run_of(model, *settings, f"data.sources.files.paths={long_documents}")
    loaded = load_run(run, torch.device("cpu"))
    T, source = loaded.config.train.seq_len, Documents(loaded.config.data)
    document = next(iter(source.held_out("files", 1000)))
    text = loaded.tokenizer.decode(loaded.tokenizer.document_tokens(document)[:T].tolist())
    assert len(loaded.tokenizer.encode(text)) == T  # the row of the evaluation, and nothing else

    nats = -rolling(harness(exported(run, tmp_path / "out"), max_length=T), text)
    ours = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert nats / T == pytest.approx(ours["eval/heldout/loss"], rel=1e-5)
    bits = nats / log(2) / len(text.encode())
    assert bits == pytest.approx(ours["eval/heldout/bits_per_byte"], rel=1e-5)


def test_lm_eval_measures_a_text_of_many_windows_as_rows_that_overlap_by_a_token(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("model.K=3")
    loaded, T = load_run(run, torch.device("cpu")), 16
    tokens = loaded.tokenizer.encode(LONG).tolist()
    tokens = tokens[: len(tokens) // T * T]
    text = loaded.tokenizer.decode(tokens)
    assert loaded.tokenizer.encode(text).tolist() == tokens
    rows = torch.tensor([loaded.tokenizer.eos_id, *tokens]).unfold(0, T + 1, T)
    assert len(rows) > 2
    with torch.no_grad():
        total = sum(loaded.model.loss(row[None, :-1], row[None, 1:]).total for row in rows)
    model = harness(exported(run, tmp_path / "out"), max_length=T)
    assert -rolling(model, text) == pytest.approx(float(total), rel=1e-5)


def test_a_pipeline_continues_the_text_and_begins_a_document_where_there_is_none(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("model.K=3")
    out = exported(run, tmp_path / "out")
    model, tokenizer, *_ = load_run(run, torch.device("cpu"))

    def ours(prompt: list[int]) -> list[int]:
        request = Request(prompt, max_tokens=9, sampling=SamplingConfig(temperature=0))
        return prompt + Generator(model).generate([request])[0]

    def theirs(prompt: str, **given: Any) -> list[int]:
        loaded = transformers.AutoTokenizer.from_pretrained(out, **given)
        write = transformers.pipeline(
            "text-generation", str(out), tokenizer=loaded, trust_remote_code=True, device="cpu"
        )
        [found] = write(prompt, max_new_tokens=9, do_sample=False, return_tensors=True)
        return found["generated_token_ids"]

    prompt = tokenizer.encode("def keep(").tolist()
    assert theirs("def keep(") == ours(prompt)
    assert theirs("def keep(", add_bos_token=True) == ours([tokenizer.eos_id, *prompt])
    assert theirs("") == ours([tokenizer.eos_id])


# The card and the directory


def test_the_card_tells_the_shape_the_cache_and_the_training(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("model.K=3", "eval.every=6")
    out = exported(run, tmp_path / "out")
    call = 'AutoModelForCausalLM.from_pretrained("{0}", trust_remote_code=True)'
    assert call.format(out) in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for line in (
        "| variant | phd_cswa-3-3-4 |",
        "| copies of each token, K | 3 |",
        "| window, W | 3 (hidden) |",
        "| chunk, C | 4 (hidden) |",
        "| trained on | 768 tokens |",  # 6 steps of 4 rows of 32
        # 2 layers, keys and values, 1 head of 8, 4 bytes: 128 for each of 64 tokens and 3 copies
        "| KV cache of 64 tokens | 8,576 bytes, 1.047 x that of a plain transformer |",
    ):
        assert line in card, card
    assert call.format("out") in card
    assert call.format("out").replace("ModelForCausalLM", "Tokenizer") in card
    assert "arXiv:2504.14992" in card
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    [name] = {key for line in metrics for key in line if key.endswith("/loss") and "eval" in key}
    assert f"| {name} | {metrics[-1][name]:.4f} |" in card
    # A later evaluation than the checkpoint is not this model's.
    later = dict(metrics[-1], step=metrics[-1]["step"] + 1)
    lines = [json.dumps(line) + "\n" for line in (*metrics, dict(later, **{name: 99.0}))]
    (run / "metrics.jsonl").write_text("".join(lines))
    again = (exported(run, tmp_path / "again") / "README.md").read_text()
    assert f"| {name} | {metrics[-1][name]:.4f} |" in again


def test_what_is_there_is_not_written_over_and_arguments_are_checked(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(ConfigError) as error:
        parse(ExportArguments, ["run=x", f"out={tmp_path / 'full'}", "dtype=int8"])
    assert tuple(map(str, error.value.problems)) == (
        "dtype='int8': expected one of float32, bfloat16",
        f"out='{tmp_path / 'full'}': not an empty directory; choose another one, or empty it",
    )
    assert (tmp_path / "full/file").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("model", ["model=vanilla", "model.K=3"])
def test_every_file_of_an_export_may_be_read_by_those_whom_the_umask_lets(
    model: str, umask: int, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of(model)
    before = os.umask(umask)
    try:
        out = exported(run, tmp_path / "out")
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert "model.safetensors" in files
    assert files == dict.fromkeys(files, 0o666 & ~umask)


def test_an_export_into_an_empty_directory_is_there_whole_or_not_at_all(
    run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of("model.K=3"), tmp_path / "new/out"
    with monkeypatch.context() as patch:
        patch.setattr("train.export.CARD", "{missing}")
        with pytest.raises(KeyError):
            main(ExportArguments(run=str(run), out=str(out)))
    assert list((tmp_path / "new").iterdir()) == []
    out.mkdir()
    exported(run, out)
    assert list((tmp_path / "new").iterdir()) == [out]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(out))


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "phd-transformer\[hf\]"'):
        main(ExportArguments(run="x", out=str(tmp_path / "out")))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the directory of a run"):
        main(ExportArguments(run=str(tmp_path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
