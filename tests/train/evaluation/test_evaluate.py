"""`train/evaluate.py`: what it finds of a run and of its export, and where it keeps it."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from conf.arguments import parse
from conf.errors import ConfigError, DataError
from tests.forked_python import forked_python
from tests.train.evaluation.olmo_wheel import QUESTIONS
from train.arguments import EvaluateArguments, ExportArguments
from train.evaluate import main
from train.experiments.ledger import read_run
from train.experiments.result import read_result

pytest.importorskip("lm_eval", reason="needs lm-eval")
pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.usefixtures("unpacked")

ROOT = Path(__file__).parents[3]


def arguments(*given: str) -> EvaluateArguments:
    return parse(EvaluateArguments, ["device=cpu", *given])


@pytest.fixture(scope="module")
def run(
    small_at: Callable[..., list[str]],
    trained: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    from train.compose import load

    directory = tmp_path_factory.mktemp("evaluated") / "run"
    trained(load(small_at(directory, "train.max_steps=2", "model.max_seq_len=256")))
    return directory


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    from train.export import main as export

    out = run.with_name("exported")
    assert export(ExportArguments(run=str(run), out=str(out))) == 0
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_by_default_it_is_the_evaluation_of_the_run_itself(run: Path) -> None:
    """Equal to what the run has logged after its last step, and kept in its result."""
    before = lines(run)
    assert main(arguments(f"run={run}")) == 0
    *same, added = lines(run)
    assert same == before
    found = {name: x for name, x in added.items() if name.startswith("eval/")}
    fingerprint = found.pop("eval/heldout/fingerprint")
    assert fingerprint == before[-1]["eval/heldout/fingerprint"]
    wanted = {name: before[-1][name] for name in found}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {"eval/heldout/bits_per_byte", "eval/heldout/bits_per_byte_stderr"} <= set(found)
    kept = read_result(run / "result.json").heldout["heldout"]
    assert kept.bits_per_byte.value == found["eval/heldout/bits_per_byte"]
    assert kept.bits_per_byte.standard_error == found["eval/heldout/bits_per_byte_stderr"]
    assert kept.documents == found["eval/heldout/documents"]
    assert (kept.fingerprint, kept.step) == (fingerprint, 2)


@pytest.mark.parametrize("other", ["rows=1", "seq_len=16", "precision=bf16"])
def test_held_out_documents_that_are_measured_otherwise_are_not_kept(
    run: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report would compare them with what other runs have measured of themselves."""
    before, kept = lines(run), read_run(run)
    assert main(arguments(f"run={run}", other)) == 0
    assert "not kept: heldout; the run measures itself with" in capsys.readouterr().out
    assert lines(run) == before
    assert read_run(run) == kept


def test_a_text_does_not_take_the_name_of_the_runs_own(run: Path, tmp_path: Path) -> None:
    (tmp_path / "heldout").write_text("another text")
    with pytest.raises(ConfigError, match="the run's own held-out documents are kept under"):
        main(arguments(f"run={run}", f"text={tmp_path / 'heldout'}"))


TEXTS = ["def keep(only, its): return é 😀", "one", "[original for token in hidden] # 3" * 9]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same three documents in several forms, and the first as a file of its own."""
    records = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    found = {"my.jsonl": records, "my.jsonl.gz": gzip.compress(records)}
    found["my.jsonl.zst"] = zstandard.compress(records)
    found["my.txt"] = TEXTS[0].encode()
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in found}


def test_a_text_of_the_users_counts_every_document_once(run: Path, files: dict[str, Path]) -> None:
    texts = json.dumps([str(path) for path in files.values()])
    assert main(arguments(f"run={run}", f"text={texts}", "text_field=body")) == 0
    kept = read_result(run / "result.json").heldout
    packed = {name: replace(kept[name]) for name in files if name.startswith("my.jsonl")}
    assert len(packed) == 3
    assert len({repr(found) for found in packed.values()}) == 1
    own = [kept[name].fingerprint for name in ("heldout", "my.jsonl", "my.txt")]
    assert len({*own, None}) == 4
    assert kept["my.jsonl"].documents == len(TEXTS)
    assert kept["my.jsonl"].bytes == sum(len(text.encode()) for text in TEXTS)
    assert (kept["my.txt"].documents, kept["my.txt"].bytes) == (1, len(TEXTS[0].encode()))
    assert kept["my.txt"].bits_per_byte.standard_error is None


def measured(*given: str) -> tuple[Any, Any]:
    """What is found, without keeping it."""
    from train.evaluate import measure_tasks, measure_texts
    from train.evaluation.subject import of_export, of_run

    args = arguments(*given)
    cpu = torch.device("cpu")
    subject = of_run(Path(args.run), cpu) if args.run else of_export(Path(args.model), cpu)  # type: ignore[arg-type]
    return measure_texts(args, subject), measure_tasks(args, subject)


def test_a_run_and_its_export_have_equal_numbers(
    run: Path, exported: Path, files: dict[str, Path]
) -> None:
    asked = (f"text={files['my.jsonl']}", "text_field=body", "seq_len=32", "tasks=paper", "shots=2")
    ours, theirs = measured(f"run={run}", *asked), measured(f"model={exported}", *asked)
    assert ours[1] == theirs[1]
    assert len(ours[1]) == 7
    bits = [found[0]["my.jsonl"].bits_per_byte.value for found in (ours, theirs)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


def test_scores_of_tasks_are_kept_beside_earlier_ones(run: Path) -> None:
    for tasks in ("olmo_piqa", "olmo_winogrande,olmo_mmlu"):
        assert main(arguments(f"run={run}", f"tasks={tasks}", "limit=5", "shots=3")) == 0
    kept = read_result(run / "result.json").tasks
    piqa, winogrande, mmlu = (f"olmo_{name}_3shot" for name in ("piqa", "winogrande", "mmlu"))
    assert set(kept) == {piqa, winogrande, mmlu}
    assert (kept[piqa].questions, kept[piqa].all_questions, kept[piqa].shots) == (5, QUESTIONS, 3)
    assert kept[winogrande].accuracy_norm is None
    assert kept[mmlu].chance == pytest.approx(0.25)
    logged = lines(run)[-1]
    assert logged[f"eval/{mmlu}/acc"] == kept[mmlu].accuracy.value
    assert logged[f"eval/{mmlu}/acc_stderr"] == kept[mmlu].accuracy.standard_error


def test_a_score_of_fewer_questions_replaces_none_of_more(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in (4, 6, 3):
        assert main(arguments(f"run={run}", "tasks=olmo_arc_easy", f"limit={limit}")) == 0
        told = "not kept: olmo_arc_easy; the scores there are of more questions"
        assert (told in capsys.readouterr().out) == (limit == 3)
    kept = read_result(run / "result.json").tasks["olmo_arc_easy"]
    assert kept.questions == 6
    assert lines(run)[-1]["eval/olmo_arc_easy/acc"] == kept.accuracy.value
    # With other examples it is another score, which replaces none.
    assert main(arguments(f"run={run}", "tasks=olmo_arc_easy", "limit=3", "shots=1")) == 0
    tasks = read_result(run / "result.json").tasks
    assert tasks["olmo_arc_easy"] == kept
    other = tasks["olmo_arc_easy_1shot"]
    assert (other.questions, other.shots) == (3, 1)
    assert lines(run)[-1]["eval/olmo_arc_easy_1shot/acc"] == other.accuracy.value


def test_nothing_is_kept_if_so_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines(run)
    assert main(arguments(f"run={run}", "tasks=olmo_csqa", "limit=2", "save=false")) == 0
    assert lines(run) == before
    assert "olmo_csqa" in capsys.readouterr().out


def test_what_is_not_finite_is_not_kept(run: Path) -> None:
    from rich.console import Console

    from train.evaluate import save
    from train.evaluation.subject import of_run

    subject = of_run(run, torch.device("cpu"))
    found = read_result(run / "result.json").heldout["heldout"]
    with pytest.raises(DataError, match="not finite"):
        save(subject, {"x": replace(found, loss=float("nan"))}, {}, Console())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "run: .*model="),
        (("run=a", "model=b"), "leave one out"),
        (("model=a",), "text=.*tasks="),
        (("model=a", "tasks=paper", "heldout=true"), "heldout=true: .*no held-out"),
        (("run=a", "tasks=paper", "shots=6"), "shots=6"),
        (("run=a", "tasks=olmo_pica"), "olmo_pica.*Did you mean olmo_piqa"),
        (("run=a", "limit=0"), "limit=0"),
        (("run=a", "precision=fp8"), "precision='fp8'"),
    ],
)
def test_wrong_arguments_are_told(given: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        arguments(*given)


def test_missing_things_are_told_before_a_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        main(arguments(f"model={tmp_path}", "tasks=paper"))
    with pytest.raises(ConfigError, match="seq_len=9999"):
        main(arguments(f"run={run}", "seq_len=9999"))
    monkeypatch.setenv("PHD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="make eval-data"):
        main(arguments("run=nowhere", "tasks=paper"))


@pytest.mark.process
def test_the_command_tells_an_error_without_a_traceback() -> None:
    command = [sys.executable, str(ROOT / "train/evaluate.py"), "run=nowhere", "tasks=olmo_x"]
    with forked_python():
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "olmo_x" in done.stderr
    assert "Traceback" not in done.stderr
