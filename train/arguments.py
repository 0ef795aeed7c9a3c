"""The arguments of the commands that take some of their own: one small frozen dataclass for each.

Like every configuration, they need no torch: a wrong argument is told before it is imported.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from conf.errors import ConfigError, Problem
from conf.seed import Seed
from conf.settings import above, at_least
from conf.task_names import MOST_SHOTS, OLMO, OLMO_TASKS, without_paper
from conf.validation import closest, did_you_mean
from phd.config import SamplingConfig, SpanUnit, Variant
from train.costs.cluster import cluster_problems
from train.engines.accelerators import ACCELERATORS, accelerator
from train.settings.engine import device_problems

Benchmark = Literal[
    "attention",
    "head",
    "step",
    "data",
    "resume",
    "checkpoint",
    "inference",
    "throughput",
    "decode",
    "coordinates",
    "scale",
    "cluster",
    "overlap",
]
REPORT_PAGE = "report.html"
WeightDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of `python train/generate.py`, each as key=value.

    Attributes:
        run: the directory of a run; its newest complete checkpoint is loaded.
        prompt: the text to continue; null: the standard input is, as a whole, or line by line if
            it is a terminal.
        file: a file of prompts, one on each line, or `.jsonl` with a `prompt` on each line; null:
            none. For each prompt a line of JSON is written, with the reason why its text ended:
            `document`, `stop` or `length`.
        n: how many texts are written for each prompt.
        batch: how many texts are written at the same time.
        max_tokens: the most tokens that a text gets.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: choose among the k most likely tokens; null: among all.
        top_p: choose among the most likely tokens that together have this probability; null: among
            all.
        stop: a text, or a JSON list of texts, at which writing ends; it is not part of the result.
        seed: the same seed writes the same text for a prompt, whatever else is in the batch.
        compile: compile the computation of a token with `torch.compile`, which takes up to a minute
            of a core at first and seconds once the cache (`TORCHINDUCTOR_CACHE_DIR`) is filled.
            A token then takes about three quarters of the time, if a text fills most of the room
            that its prompt and `max_tokens` ask for.
        device: `auto`, `cpu` or `cuda`.
    """

    run: str
    prompt: str | None = None
    file: str | None = None
    n: int = 1
    batch: int = 16
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: Seed = 0
    compile: bool = False
    device: str = "auto"

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "n", "batch", "max_tokens") + at_least(self, "", 0, "seed")
        if "" in self.stop:
            expected = "an empty text would end every text at once"
            found.append(Problem("stop", self.stop, expected, "give a text that may be written"))
        if self.file is not None and self.prompt is not None:
            found.append(Problem("file", self.file, "gives the prompts", "leave out prompt"))
        found += device_problems(self.device)
        try:
            SamplingConfig(**self.sampling)
        except ConfigError as error:
            found += [problem for problem in error.problems if isinstance(problem, Problem)]
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are drawn: the settings of `phd.config.SamplingConfig`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Arguments of `python train/export.py`, each as key=value.

    Attributes:
        run: the directory of a run; its newest complete checkpoint is exported.
        out: the directory to write. It must not exist, or must be empty.
        dtype: the data type of the weights: `float32` or `bfloat16`.
    """

    run: str
    out: str
    dtype: str = "float32"

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = []
        if self.dtype not in get_args(WeightDtype):
            names = ", ".join(get_args(WeightDtype))
            found.append(Problem("dtype", self.dtype, f"expected one of {names}"))
        out = Path(self.out).expanduser().resolve()
        if out == Path.cwd() or any(parent.is_file() for parent in out.parents):
            expected = "expected a directory to make"
            found.append(Problem("out", self.out, expected, "choose another one"))
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            expected = "not an empty directory"
            found.append(Problem("out", str(out), expected, "choose another one, or empty it"))
        return found


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Arguments of `python train/report.py`, each as key=value.

    Attributes:
        runs: patterns such as `'runs/*'` of directories of runs, or of files `result.json` that
            were kept of them; several as a JSON list. In a directory, `**` stands for all below it.
        out: the directory for the page and the files beside it. An earlier report in it is
            replaced.
        title: of the page; null: one that says how many runs it compares.
    """

    runs: tuple[str, ...]
    out: str = "report"
    title: str | None = None

    @property
    def directory(self) -> Path:
        """`out`, as a path."""
        return Path(self.out).expanduser()

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = []
        if not self.runs:
            found.append(Problem("runs", list(self.runs), "expected a pattern such as 'runs/*'"))
        out = self.directory
        if out.exists() and not out.is_dir():
            found.append(Problem("out", self.out, "is a file", "choose another directory"))
        elif out.is_dir() and any(out.iterdir()) and not (out / REPORT_PAGE).is_file():
            expected = "holds other files than a report"
            found.append(Problem("out", self.out, expected, "choose another directory"))
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Arguments of `python train/evaluate.py`, each as key=value.

    Without `text` and `tasks`, the run's held-out documents are measured.

    Attributes:
        run: the directory of a run; its newest complete checkpoint is evaluated. null: `model` is.
        model: a directory that `train/export.py` has written, which transformers computes; null:
            `run` is evaluated.
        text: files, directories, globs or URLs, as `data=files` reads them, such as `my.jsonl`; for
            each the bits per byte are measured. A JSON list for several.
        text_field: the key or column that holds a document's text in `.jsonl` and `.parquet`.
        heldout: measure the run's held-out documents as well where `text` or `tasks` is given.
        rows: how many rows of tokens are measured; null: of held-out documents as many as in
            training, `eval.rows`, and of `text` all of them. Held-out documents that are measured
            otherwise than in training (`rows`, `seq_len`, `precision`) are printed and not kept.
        seq_len: the tokens of a row; null: as in training, and for `model` its longest context, at
            most 1024.
        tasks: downstream tasks, separated by commas: `paper` for the seven of the paper, one of
            them such as `olmo_hellaswag`, or a name of lm-evaluation-harness's own such as
            `hellaswag`, whose questions come from the Hugging Face Hub.
        shots: solved examples in front of each question, at most 5 in the paper's tasks; null: as
            each task has it, in the paper's none. `olmo_mmlu_var` asks in seven ways, with up to 5.
        limit: how many questions of each task are asked; null: all.
        save: keep what is found of a run in its `result.json`, `metrics.jsonl` and its run on
            Weights & Biases.
        device: `auto`, `cpu` or `cuda`.
        precision: of the matrix products: `fp32` or `bf16`; `auto` is bf16 on CUDA and fp32 on the
            CPU.
    """

    run: str | None = None
    model: str | None = None
    text: tuple[str, ...] = ()
    text_field: str = "text"
    heldout: bool = False
    rows: int | None = None
    seq_len: int | None = None
    tasks: str = ""
    shots: int | None = None
    limit: int | None = None
    save: bool = True
    device: str = "auto"
    precision: str = "auto"

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, each once, with the paper's in place of `paper`."""
        return without_paper(tuple(name for name in re.split(r"[,\s]+", self.tasks) if name))

    @property
    def texts(self) -> dict[str, str]:
        """The patterns of `text` by the names under which their results are kept."""
        names = [pattern.rstrip("/").rpartition("/")[2] for pattern in self.text]
        return {
            name if names.count(name) == 1 else pattern: pattern
            for name, pattern in zip(names, self.text, strict=True)
        }

    @property
    def measures_heldout(self) -> bool:
        """Whether the run's own held-out documents are measured."""
        return self.run is not None and (self.heldout or not (self.text or self.task_names))

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "rows", "seq_len", "limit") + at_least(self, "", 0, "shots")
        if self.run is not None and self.model is not None:
            found.append(Problem("run", self.run, "model is given, too", "leave one out"))
        if self.run is None and self.model is None:
            hint = "give the directory of a run, or model= with that of an export"
            found.append(Problem("run", expected="nothing to evaluate", hint=hint))
        if self.model is not None and not (self.text or self.task_names):
            found.append(
                Problem("text", expected="nothing to measure", hint="give text= or tasks=")
            )
        if self.model is not None and self.heldout:
            reason = "an export has no held-out documents"
            found.append(Problem("heldout", True, reason, "give text= with files"))
        here = [name for name in self.task_names if name.startswith(OLMO)]
        found += [
            Problem("tasks", name, "no such task", did_you_mean(closest(name, OLMO_TASKS)))
            for name in here
            if name not in OLMO_TASKS
        ]
        if here and (self.shots or 0) > MOST_SHOTS:
            expected = f"expected at most {MOST_SHOTS}: {here[0]} has no more examples"
            found.append(Problem("shots", self.shots, expected))
        if self.precision not in ("auto", "fp32", "bf16"):
            found.append(Problem("precision", self.precision, "expected auto, fp32 or bf16"))
        return found + device_problems(self.device)


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Arguments of `python train/tokenizer.py`, each as key=value.

    All others are those of `python train/main.py`, of which `data` and `tokenizer` matter.

    Attributes:
        out: the path of the SentencePiece model that is written; it must not exist yet.
    """

    out: str

    @property
    def path(self) -> Path:
        """`out`, as a path."""
        return Path(self.out).expanduser()

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        if not self.out:
            return [Problem("out", "", "expected the path of the .model that is written")]
        if self.path.exists():
            hint = "give another path, or remove it"
            return [Problem("out", self.out, "is there already", hint)]
        return []


@dataclass(frozen=True, kw_only=True)
class PretokenizeArguments:
    """Arguments of `python train/pretokenize.py`, each as key=value.

    All others are those of `python train/main.py`, of which `data`, `tokenizer` and
    `run.start_from` matter.

    Attributes:
        out: the directory in which a directory for each source is written.
        parts: how many shards a source is cut into; each shard is the work of one process.
        processes: how many processes work at the same time; null: one for each core. The files do
            not depend on it.
    """

    out: str
    parts: int = 16
    processes: int | None = None

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        return at_least(self, "", 1, "parts", "processes")

    @property
    def workers(self) -> int:
        """How many processes that is."""
        return self.processes or len(os.sched_getaffinity(0))

    def directory(self, name: str) -> Path:
        """Where the source of this name is written."""
        return Path(self.out).expanduser() / name


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Arguments of `python train/plan.py`, each as key=value; all others are the run's settings.

    Attributes:
        device: the GPU to plan for, such as `H100`, `H200` or `A100`, whose memory and peak are
            taken, wherever the plan is made; null: the device of this machine.
        cluster: the machines to plan for: a file of conf/cluster/ such as `h100_64`, or the path of
            a YAML file like them. Every mesh that fits is told, with its memory and the time of a
            step by part, and one is recommended; null: no mesh is looked for.
        meshes: how many of the fastest meshes of a cluster are shown; beside them the fastest of
            each kind is. JSON has all.
        processes: how many ranks share the run, one device each.
        mfu: the part of the device's bf16 peak that training reaches, from which the time follows;
            null: it is measured or assumed, and the plan says which.
        measured: the directory of an earlier run whose speed is taken; null: what this run has
            logged so far, if there is such a run.
        json: write the plan as JSON; `--json` is the same.
    """

    device: str | None = None
    cluster: str | None = None
    meshes: int = 8
    processes: int = 1
    mfu: float | None = None
    measured: str | None = None
    json: bool = False

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "processes", "meshes")
        if self.cluster is not None:
            found += self._cluster_problems(self.cluster)
        if self.device is not None and accelerator(self.device) is None:
            expected = f"expected one of {', '.join(ACCELERATORS)}"
            hint = "leave it out to plan for this machine"
            found.append(Problem("device", self.device, expected, hint))
        if self.mfu is not None and not 0 < self.mfu <= 1:
            found.append(Problem("mfu", self.mfu, "expected a number above 0, at most 1"))
        if self.mfu is not None and self.measured is not None:
            reason = "mfu is given, too"
            found.append(Problem("measured", self.measured, reason, "leave one out", ("mfu",)))
        return found

    def _cluster_problems(self, cluster: str) -> list[Problem]:
        """Why there is no such cluster, and what it says itself."""
        told = {"device": None, "processes": 1, "mfu": None, "measured": None}
        return cluster_problems(cluster) + [
            Problem(key, value, f"cluster={cluster} says it", "leave it out", ("cluster",))
            for key, default in told.items()
            if (value := getattr(self, key)) != default
        ]


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Arguments of `python train/bench.py NAME key=value ...`.

    Attributes:
        name: what is measured. `attention`: the forward and backward pass of one layer's attention.
            `head`: those of the LM head and the loss, beside torch's and Liger's where installed.
            `step`: a whole training step, also of transformers' Olmo2. `data`: how fast the loader
            reads text and tokens. `resume`: how long it takes to continue at 1 %, 50 % and 99 % of
            a corpus. `checkpoint`: how long a save takes, and for how much of it the training
            stands still. `inference`: prefill, decode and KV bytes of every variant, with charts.
            `throughput`: tokens per second of batches of PHD-CSWA, vanilla and transformers.
            `decode`: the kernels of a decoded token on CUDA, each beside torch's. `coordinates`:
            what a few steps change in activations, over the width, with muP and without, with a
            chart. `scale`: what a rank does besides computing, for up to thousands of ranks, of
            which a few are real and the others stand-ins. `cluster`: what the model of costs
            predicts of steps on 1, 2 and 4 ranks of this machine, calibrated on two of them, beside
            what they take; it writes a `cluster.yaml`, from which `train/plan.py` plans. `overlap`:
            what a slow link costs context parallelism on two ranks of this machine, with its
            collectives overlapped and waited for at once.
        out: the directory for `<name>.json` and `<name>.csv`; `checkpoint` measures its disk.
        run: the directory of a run whose model `inference` measures, instead of many models; the
            results lie there, and are part of the run's `result.json`. null: no run.
        short: the short form, of seconds: fewer and smaller pieces of work, at most 3 turns.
        repeat: how often everything is measured. A ratio is the median of those of the turns, and
            a time is that of the base, multiplied by the ratio.
        size: the model of `step`, `checkpoint`, `inference`, `throughput` and `decode`, a file of
            conf/size/; null: `tiny`, which `inference` and `throughput` make wider, and on CUDA
            `151m`, `550m` and `1b2` for a `step`, `550m` and `1b2` for `decode`.
        span_unit: whether W = 16 and C = 32 count `token`s or `hidden` copies in `inference` and
            `throughput`; null: hidden copies, and in `inference` tokens as well from K = 16 on.
        variants: what is measured beside vanilla in `inference`; an empty list: all variants.
        copies: the values of K in `inference`, `throughput` and `decode`; an empty list: a few.
        batches: how many rows are decoded at a time in `throughput`; an empty list: one and more.
        prompts: the lengths in tokens of the prompts in `inference`; an empty list: a short and a
            long one.
        contexts: the lengths in tokens up to which `inference` decodes; an empty list: a short and
            a long one. `throughput` decodes rows from half the longest to all of it, and in
            `decode` they are the lengths of the caches.
        compile: decode with `torch.compile` in `inference`; compiling takes up to a minute for each
            model.
        tune: try the products of `decode` in many blocks, and its attention in many splits, which
            takes minutes to compile.
        rows: the rows of a `step`; null: 4096 tokens on the CPU, 16384 on CUDA. Of `coordinates`,
            4 rows.
        seq_len: T, the tokens of a row of a `step`; null: 1024 on the CPU, 4096 on CUDA. Of
            `coordinates`, 64. Of `overlap`, 4096.
        widths: the values of D in `coordinates`, each a multiple of the smallest, which is muP's
            base; an empty list: 64 to 512.
        ranks: the numbers of ranks in `scale`; an empty list: 8, 64, 512 and 4096.
        local: how many of them are real in `scale`, each a process.
        link_mb_per_s: the speed of the link in `overlap`, MB/s.
        steps: of training in `coordinates`.
        optim: the optimizer of `coordinates`, `adamw` or `muon`, with the learning rate of `size`.
        gigabytes: the size of the corpus that is written for `resume`.
        device: `auto`, `cpu` or `cuda`.
    """

    name: str
    out: str = "bench"
    run: str | None = None
    short: bool = False
    repeat: int = 11
    size: str | None = None
    span_unit: SpanUnit | None = None
    variants: tuple[Variant, ...] = ()
    copies: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    compile: bool = False
    tune: bool = False
    rows: int | None = None
    seq_len: int | None = None
    widths: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    local: int = 2
    link_mb_per_s: float = 4.0
    steps: int = 8
    optim: Literal["adamw", "muon"] = "adamw"
    gigabytes: float = 1.0
    device: str = "auto"

    @property
    def turns(self) -> int:
        """How often everything is measured."""
        return min(self.repeat, 3) if self.short else self.repeat

    @property
    def directory(self) -> Path:
        """The directory of the results."""
        return Path(self.run or self.out).expanduser()

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "repeat", "rows", "seq_len", "steps")
        for key, least in (("copies", 2), ("batches", 1), ("prompts", 1), ("contexts", 1)):
            found += [
                Problem(key, value, f"expected integers of at least {least}")
                for value in getattr(self, key)
                if value < least
            ]
        found += above(self, "", 0, "gigabytes", "link_mb_per_s")
        found += self._width_problems()
        found += at_least(self, "", 2, "local")
        found += [
            Problem("ranks", ranks, f"expected integers of at least local={self.local}")
            for ranks in self.ranks
            if ranks < self.local
        ]
        if self.name not in get_args(Benchmark):
            names = ", ".join(get_args(Benchmark))
            found.append(Problem("name", self.name, f"expected one of {names}"))
        elif self.run is not None:
            found += self._run_problems(self.run)
        return found + device_problems(self.device)

    def _width_problems(self) -> list[Problem]:
        widths, least = set(self.widths), min(self.widths, default=4)
        few = len(widths) == 1
        if few or least < 4 or least % 4 or any(width % least for width in widths):
            expected = (
                "expected at least two numbers, each a multiple of the smallest, and that one of 4"
            )
            return [Problem("widths", list(self.widths), expected)]
        return []

    def _run_problems(self, run: str) -> list[Problem]:
        if self.name != "inference":
            return [Problem("run", run, "only name=inference measures a run", "leave it out")]
        chosen = ("size", "variants", "copies", "span_unit")
        why = "the run decides what is measured"
        return [
            Problem(key, value, why, "leave it out", ("run",))
            for key in chosen
            if (value := getattr(self, key))
        ]
