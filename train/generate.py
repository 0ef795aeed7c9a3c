"""Write text with a trained model.

python train/generate.py run=runs/phd_cswa-2-16-32-tiny prompt="def main("
python train/generate.py run=runs/phd_cswa-2-16-32-tiny prompt="class " n=4 temperature=1 top_p=0.9
python train/generate.py run=runs/phd_cswa-2-16-32-tiny file=prompts.txt stop="def " >texts.jsonl
python train/generate.py run=runs/phd_cswa-2-16-32-tiny
"""

import train  # noqa: F401  # first: how threads wait is settled before torch is loaded

# isort: split
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conf import arguments
from conf.errors import ConfigError, Problem
from conf.settings import at_least
from data.detokenizer import IncrementalDetokenizer
from phd.inference.sampling import Sampling, generate
from train.checkpoint.load_run import load_run
from train.engine_config import EngineConfig
from train.engines.device import autocast, choose_device, device_problems, precision


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
        compile: compile the computation of a token with `torch.compile`, which takes about a minute
            at first. A token then takes about three quarters of the time, if a text fills most of
            the room that its prompt and `max_tokens` ask for.
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
    seed: int = 0
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
            self.sampling()
        except ConfigError as error:
            found += [problem for problem in error.problems if isinstance(problem, Problem)]
        return found

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Writer:
    """A loaded model, and what it writes."""

    def __init__(self, given: GenerateArguments) -> None:
        self.given = given
        config = EngineConfig(device=given.device)  # type: ignore[arg-type]
        self.device = choose_device(config)
        self.dtype = precision(config, self.device)
        self.model, self.tokenizer, *_ = load_run(Path(given.run), self.device)
        for part in self.model.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.to(self.dtype)  # else autocast would convert them for every token
        self.model.fuse_projections()

    def stream(self, prompt: str) -> Iterator[str]:
        """The prompt and what follows it, as it comes."""
        yield prompt
        text = self._begun(prompt)
        for token in self._tokens([text], [(0, 0)]):
            yield text.add(int(token[0]))
            if text.ending:
                break
        yield text.finish()

    def write(self, prompts: Sequence[str]) -> Iterator[tuple[str, IncrementalDetokenizer]]:
        """`n` texts for each prompt, in this order, a batch of them at a time."""
        jobs = list(product(enumerate(prompts), range(self.given.n)))
        for begin in range(0, len(jobs), self.given.batch):
            some = jobs[begin : begin + self.given.batch]
            texts = [
                IncrementalDetokenizer(self.tokenizer, prompt, self.given.stop)
                for (_, prompt), _ in some
            ]
            for tokens in self._tokens(texts, [(place, sample) for (place, _), sample in some]):
                for text, token in zip(texts, tokens.tolist(), strict=True):
                    if not text.ending:
                        text.add(token)
                if all(text.ending for text in texts):
                    break
            for ((_, prompt), _), text in zip(some, texts, strict=True):
                text.finish()
                yield prompt, text

    def _begun(self, prompt: str) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.tokenizer, prompt, self.given.stop)

    @torch.inference_mode()  # less work than no_grad for each operation
    def _tokens(
        self, texts: Sequence[IncrementalDetokenizer], places: Sequence[tuple[int, int]]
    ) -> Iterator[torch.Tensor]:
        """The texts' next tokens; each text's randomness is its place's alone."""
        prompts = [torch.tensor(text.ids, device=self.device) for text in texts]
        seeds = [np.random.SeedSequence([self.given.seed, *place]) for place in places]
        dice = [torch.Generator().manual_seed(int(s.generate_state(1)[0])) for s in seeds]
        with autocast(self.device, self.dtype):
            yield from generate(
                self.model,
                prompts,
                self.given.sampling(),
                dice,
                self.given.max_tokens,
                compiled=self.given.compile,
            )


def main(given: GenerateArguments) -> int:
    """Write what the arguments ask for to the standard output."""
    prompts = read_prompts(Path(given.file)) if given.file else []
    writer = Writer(given)
    if given.file:
        for prompt, text in writer.write(prompts):
            line = {"prompt": prompt, "text": text.text, "ending": text.ending}
            print(json.dumps(line, ensure_ascii=False), flush=True)
    elif given.prompt is not None:
        show(writer, given.prompt)
    elif sys.stdin.isatty():
        _converse(writer)
    else:
        show(writer, sys.stdin.read())
    return 0


def show(writer: Writer, prompt: str) -> None:
    """Print one text as it comes, or several one after the other."""
    if writer.given.n == 1:
        for piece in writer.stream(prompt):
            print(piece, end="", flush=True)
        print()
        return
    for number, (_, text) in enumerate(writer.write([prompt]), 1):
        print(f"--- {number} of {writer.given.n}, ended by {text.ending}")
        print(prompt + text.text, flush=True)


def _converse(writer: Writer) -> None:
    """Go on from each line that is typed, until the input ends."""
    print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        show(writer, prompt)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: its lines that are not empty, or the `prompt` of each in `.jsonl`.

    Raises:
        ConfigError: it cannot be read, or has a line without a prompt, or none at all.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        prompts = [_prompt(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError, ValueError) as error:
        problem = f"file={path}: cannot be read ({error}); give a file of prompts, one a line"
        raise ConfigError([problem], "the arguments") from error
    if not prompts:
        raise ConfigError([f"file={path}: no prompt in it; write one a line"], "the arguments")
    return prompts


def _prompt(line: str) -> str:
    """The prompt of a line of JSON."""
    record = json.loads(line)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, str):
        prompt.encode()  # half a character is no text: UnicodeEncodeError
    else:
        raise ValueError(f"no text named `prompt` in {line[:80]}")
    return prompt


if __name__ == "__main__":
    arguments.run(GenerateArguments, main)
