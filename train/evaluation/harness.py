"""lm-evaluation-harness, asking this project's models through their KV cache.

Only what runs the harness imports this module: the package `lm-eval` is optional.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.task import Task, TaskConfig
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from conf.errors import ConfigError, Problem, TransientError, reason_of
from conf.validation import did_you_mean, nearest
from data.detokenizer import IncrementalDetokenizer
from data.prefetch import never
from data.tokenizer import Tokenizer
from phd.config import SamplingConfig
from phd.device import as_current
from phd.inference.generator import Generator, NewToken, Request
from phd.model import Transformer
from train.distributed.process_groups import ProcessGroups
from train.evaluation.loglikelihood import StoppedError, loglikelihoods
from train.evaluation.questions import Question, Questions
from train.experiments.result import Estimate, TaskScore
from train.experiments.task_scores import asked_of, score_name

SHOTS_SEED = 1234
"""By which the harness draws the examples of tasks that have many, as its own command does."""

GENERATED_AT_ONCE = 16
MOST_NEW_TOKENS = 256
"""Tokens that a text gets where the task does not say how many."""


class CachedLM(TemplateLM):
    """A model as the harness sees it. Each text begins with the separator, as in training.

    Contexts are divided among the ranks, and all ranks get all results. So the harness runs on all
    of them, and takes each for a lone process.

    Args:
        model: on the device where it computes; it runs under the autocast of the caller.
        groups: the ranks that share the work; None: this process alone.
        stop_requested: asked between batches, by all ranks at once; a `StoppedError` follows.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        groups: ProcessGroups | None = None,
        stop_requested: Callable[[], bool] = never,
    ) -> None:
        super().__init__()
        self.model, self.text_tokenizer = model, tokenizer
        self.groups, self.stop_requested = groups or ProcessGroups(), stop_requested
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.fingerprint

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> list[int]:
        """The tokens of a text, after the separator unless `add_special_tokens` is false."""
        tokens = self.text_tokenizer.encode(string).tolist()
        return tokens if add_special_tokens is False else [self.eot_token_id, *tokens]

    def loglikelihood(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        return self._likelihoods([(context, after) for _, context, after in requests])

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002
    ) -> list[float]:
        """The log-likelihood of each whole text in nats; of a long one in windows."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, cut):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._likelihoods(windows), strict=True):
            totals[owner] += nats
        return totals

    def _likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        groups = self.groups
        found: dict[int, tuple[float, bool]] = {}
        own = loglikelihoods(
            self.model,
            pairs,
            rank=groups.rank,
            world_size=groups.world_size,
            stop_requested=self.stop_requested,
        )
        for part in groups.gather(own):
            found |= part
        return [found[place] for place in range(len(pairs))]

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002
    ) -> list[str]:
        """A text after each context, until one of its stop texts; every rank writes all of them."""
        generator = Generator(self.model, batch=GENERATED_AT_ONCE)
        texts: dict[int, IncrementalDetokenizer] = {}
        for number, request in enumerate(requests):
            context, settings = request.args
            text, asked = self._request(context, settings, number)
            texts[generator.submit(asked)] = text
        while any(text.ending is None for text in texts.values()):
            if self.stop_requested():
                raise StoppedError
            with torch.inference_mode(), as_current(generator.device):
                for new in generator.step():
                    if _is_ended(texts[new.request], new):
                        generator.cancel(new.request)
        return [text.text for text in texts.values()]

    def _request(
        self, context: str, settings: Mapping[str, Any], seed: int
    ) -> tuple[IncrementalDetokenizer, Request]:
        wanted: Any = normalize_gen_kwargs(dict(settings), MOST_NEW_TOKENS)
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            problem = f"a task asks for {wanted['max_gen_toks']} new tokens"
            raise ConfigError([f"{problem}, and the model has room for {self.max_length} in all"])
        text = IncrementalDetokenizer(self.text_tokenizer, context, tuple(wanted["until"]))
        request = Request(
            text.ids[-room:],
            max_tokens=wanted["max_gen_toks"],
            sampling=SamplingConfig(
                temperature=wanted.get("temperature", 0.0),
                top_k=wanted.get("top_k"),
                top_p=wanted.get("top_p"),
            ),
            seed=seed,
            stop_ids=(self.eot_token_id,),
        )
        return text, request


def _is_ended(text: IncrementalDetokenizer, new: NewToken) -> bool:
    """Take a token, unless the text has ended; whether it has."""
    if text.ending is None:
        text.add(new.token)
        if new.finish_reason:
            text.finish()
    return text.ending is not None


class OlmoTask(Task):
    """A task whose questions and prompts are on this machine.

    `acc` is how often the right choice has the greatest log-likelihood, and `acc_norm` the same of
    log-likelihoods per character of the choice, its leading space included, as OLMES counts. Of a
    question with several prompts both are means over them, so that standard errors are over
    questions.
    """

    VERSION = 0
    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, questions: Questions) -> None:
        self.asked = questions
        logger = logging.getLogger(TaskConfig.__module__)
        logger.disabled = True  # it warns of the settings that are replaced below
        try:
            super().__init__()
        finally:
            logger.disabled = False
        kind = self.OUTPUT_TYPE
        # Not as an argument: the harness would take it for the name of the task.
        self._config = TaskConfig(
            task=questions.name, num_fewshot=questions.shots, output_type=kind
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the questions are here."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return True

    def has_test_docs(self) -> bool:
        return False

    def validation_docs(self) -> Sequence[Question]:
        return self.asked.questions

    def doc_to_text(self, doc: Question) -> str:
        return doc.prompts[0][0].context

    def doc_to_target(self, doc: Question) -> str:
        return doc.prompts[0][doc.answer].continuation

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """All choices of all prompts of all questions, without the harness's progress bar."""
        documents = self.doc_iterator(
            limit=limit, samples=samples, rank=rank, world_size=world_size
        )
        self._instances = [
            instance
            for number, doc in documents
            for instance in self.construct_requests(doc, "", metadata=(self.asked.name, number, 1))
        ]

    def construct_requests(self, doc: Question, ctx: str, **kwargs: Any) -> list[Instance]:  # noqa: ARG002
        choices = [choice for prompt in doc.prompts for choice in prompt]
        return [
            Instance("loglikelihood", doc=doc, arguments=tuple(choice), idx=i, **kwargs)
            for i, choice in enumerate(choices)
        ]

    def process_results(
        self, doc: Question, results: Iterable[tuple[float, bool]]
    ) -> dict[str, float]:
        nats = iter([nats for nats, _ in results])
        right, right_norm = [], []
        for prompt in doc.prompts:
            of_prompt = torch.tensor([next(nats) for _ in prompt], dtype=torch.float64)
            lengths = torch.tensor([len(choice.continuation) for choice in prompt])
            right.append(_is_right(of_prompt, doc.answer))
            right_norm.append(_is_right(of_prompt / lengths, doc.answer))
        found = {"acc": sum(right) / len(right)}
        if self.asked.normalised:
            found["acc_norm"] = sum(right_norm) / len(right_norm)
        return found

    def aggregation(self) -> dict[str, Any]:
        return dict.fromkeys(self.higher_is_better(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        return dict.fromkeys(["acc", *["acc_norm"] * self.asked.normalised], True)


def _is_right(scores: torch.Tensor, answer: int) -> float:
    """1 if the answer has the greatest score, else 0; NaN if a score is not a number."""
    return float("nan") if scores.isnan().any() else float(scores.argmax().item() == answer)


class Measured(NamedTuple):
    """What a model has scored in a task.

    Attributes:
        metrics: by the harness's names, such as `acc` and `acc_norm`.
        shots: solved examples in front of each question.
        questions: how many were asked.
        chance: the accuracy of guessing; None where it is not known.
        all_questions: how many the task has; None where it is not known.
    """

    metrics: dict[str, Estimate]
    shots: int
    questions: int
    chance: float | None = None
    all_questions: int | None = None

    @property
    def score(self) -> TaskScore | None:
        """What is kept of it in a run's result; None of a task without an accuracy."""
        if "acc" not in self.metrics:
            return None
        return TaskScore(
            accuracy=self.metrics["acc"],
            accuracy_norm=self.metrics.get("acc_norm"),
            shots=self.shots,
            questions=self.questions,
            chance=self.chance,
            all_questions=self.all_questions,
        )

    def logged(self, name: str) -> dict[str, float | str]:
        """The metrics of a task of this name as they are logged; see `score_name`."""
        found: dict[str, float | str] = {}
        for metric, (value, error) in ((m, _parts(e)) for m, e in self.metrics.items()):
            found[metric] = value
            if error is not None:
                found[f"{metric}_stderr"] = error
        found |= asked_of(self.score) if self.score else {}
        return {f"eval/{score_name(name, self.shots)}/{what}": x for what, x in found.items()}


def _parts(estimate: Estimate) -> tuple[float, float | None]:
    return estimate.value, estimate.standard_error


def measure(lm: LM, tasks: Iterable[Questions]) -> dict[str, Measured]:
    """The scores of a model in tasks whose questions are here, by the tasks' names.

    Args:
        lm: `CachedLM`, or any model of the harness.

    Raises:
        StoppedError: a stop was requested.
    """
    loaded = {asked.name: OlmoTask(asked) for asked in tasks}
    found = evaluate(lm, {"tasks": loaded, "groups": {}}, log_samples=False)
    return {
        name: _measured(found, name)._replace(
            chance=task.asked.chance, all_questions=task.asked.all_questions
        )
        for name, task in loaded.items()
    }


def measure_of_harness(
    lm: LM,
    names: Sequence[str],
    *,
    shots: int | None,
    limit: int | None,
    manager: TaskManager | None = None,
) -> dict[str, Measured]:
    """The scores of a model in tasks of the harness's own, whose questions are on the Hub.

    Args:
        names: of tasks or groups of tasks.
        shots: solved examples in front of each question; None: as each task has it.
        limit: how many questions of each task are asked, the first ones; None: all.
        manager: knows the tasks; None: those that the harness comes with.

    Raises:
        ConfigError: the harness knows no such task.
        TransientError: its questions cannot be fetched.
    """
    loaded = load_tasks(names, manager)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # As the harness's own command has it: what is 0 in a task's file cannot be changed.
        task.set_config("num_fewshot", own or 0 if shots is None or own == 0 else shots)
        task.set_fewshot_seed(SHOTS_SEED)
    found = evaluate(lm, loaded, limit=limit, log_samples=False)
    return {name: _measured(found, name) for name in found["results"]}


def load_tasks(names: Sequence[str], manager: TaskManager | None = None) -> Any:
    """Load tasks of the harness's own, by name; see `measure_of_harness`."""
    manager = manager or TaskManager()  # this reads thousands of files
    known = [*manager.all_tasks]
    if unknown := [name for name in names if name not in known]:
        problems: list[Problem | str] = [
            Problem(
                "tasks",
                name,
                "lm-evaluation-harness has no such task",
                did_you_mean(nearest(name, known)),
            )
            for name in unknown
        ]
        raise ConfigError(problems, "the arguments")
    try:
        return manager.load(list(names))
    except OSError as error:  # so are the errors of the Hub, of which the files are
        problem = f"tasks={','.join(names)}: their questions cannot be fetched"
        hint = "tasks=paper needs no network once make eval-data has been run"
        raise TransientError(f"{problem} ({reason_of(error)}); {hint}") from error


def _measured(found: Mapping[str, Any], name: str) -> Measured:
    """A task's part of what the harness returns: `<metric>,<filter>` and `<metric>_stderr,...`."""
    result = found["results"][name]
    metrics: dict[str, Estimate] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = result.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric}_{kind}"
        metrics[label] = Estimate(
            value=float(value),
            standard_error=float(error) if isinstance(error, float | int) else None,
        )
    samples = found["n-samples"].get(name, {})
    count = samples.get("effective") or result.get("sample_len", 0)
    shots = found["n-shot"].get(name, 0)
    return Measured(metrics, shots, count, all_questions=samples.get("original"))
