"""Generate text with a trained model.

python train/generate.py run=runs/phd_cswa-2-16-32-tiny prompt="def main("
python train/generate.py run=runs/phd_cswa-2-16-32-tiny prompt="class " n=4 temperature=1 top_p=0.9
python train/generate.py run=runs/phd_cswa-2-16-32-tiny file=prompts.txt stop="def " >texts.jsonl
python train/generate.py run=runs/phd_cswa-2-16-32-tiny
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from conf import arguments
    from train.arguments import GenerateArguments

    arguments.run(GenerateArguments, "train.generate")

import json
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, product

import numpy as np
import torch
from torch import nn

from conf.errors import ConfigError, reason_of
from conf.standard_streams import reader_is_gone
from conf.text import BOM, NotUtf8Error, decoded, read_text
from data.detokenizer import IncrementalDetokenizer
from phd.config import SamplingConfig
from phd.inference.generator import Generator, NewToken, Request
from train.arguments import GenerateArguments
from train.checkpoint.load_run import load_run
from train.engines.device import (
    autocast,
    choose_device,
    configure_process,
    precision,
)
from train.settings.engine import EngineConfig


class Writer:
    """Generates text with the model of a run."""

    def __init__(self, args: GenerateArguments) -> None:
        self.args = args
        config = EngineConfig(device=args.device)  # type: ignore[arg-type]
        self.device = choose_device(config)
        configure_process(config, self.device)
        self.dtype = precision(config, self.device)
        self.model, self.tokenizer, *_ = load_run(Path(args.run).expanduser(), self.device)
        for part in self.model.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.to(self.dtype)  # otherwise autocast would convert the weights for each token
        self.model.fuse_projections()

    def stream(self, prompt: str) -> Iterator[str]:
        """Yield the prompt, and then its continuation piece by piece."""
        yield prompt  # shown at once, before the prefill
        text, generator = self._detokenizer(prompt), self._generator(batch=1)
        generator.submit(self._request(text, (0, 0)))
        while not text.ending and generator.unfinished:
            for new in self._step(generator):
                if not text.ending:
                    yield text.add(new.token)
        yield text.finish()

    def write(self, prompts: Sequence[str]) -> Iterator[tuple[str, IncrementalDetokenizer]]:
        """Yield `n` texts for each prompt, in order. As many as `batch` are written at once."""
        jobs = product(enumerate(prompts), range(self.args.n))
        batch = min(self.args.batch, len(prompts) * self.args.n)
        generator = self._generator(batch)
        texts: dict[int, IncrementalDetokenizer] = {}
        unyielded: deque[tuple[str, IncrementalDetokenizer]] = deque()
        while True:
            # So many wait that no row is idle, without tokenizing a long file at once.
            for (index, prompt), sample in islice(jobs, max(0, 2 * batch - generator.unfinished)):
                text = self._detokenizer(prompt)
                texts[generator.submit(self._request(text, (index, sample)))] = text
                unyielded.append((prompt, text))
            if not unyielded:
                return
            for new in self._step(generator):
                if new.request in texts and _is_ended(texts[new.request], new):
                    generator.cancel(new.request)
                    del texts[new.request]
            while unyielded and unyielded[0][1].ending:
                yield unyielded.popleft()

    def _detokenizer(self, prompt: str) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.tokenizer, prompt, self.args.stop)

    def _generator(self, batch: int) -> Generator:
        return Generator(self.model, batch=batch, compiled=self.args.compile)

    def _request(self, text: IncrementalDetokenizer, key: tuple[int, int]) -> Request:
        """The request to continue a prompt.

        Args:
            text: holds the prompt.
            key: (prompt's index, sample's index). With the seed it gives the text its own random
                numbers. So a text does not depend on the texts beside it in the batch.
        """
        seed = np.random.SeedSequence([self.args.seed, *key]).generate_state(1)[0]
        return Request(
            list(text.ids),
            max_tokens=self.args.max_tokens,
            sampling=SamplingConfig(**self.args.sampling),
            seed=int(seed),
            stop_ids=(self.tokenizer.eos_id,),
        )

    @torch.inference_mode()  # less overhead per operation than no_grad
    def _step(self, generator: Generator) -> list[NewToken]:
        with autocast(self.device, self.dtype):
            return generator.step()


def _is_ended(text: IncrementalDetokenizer, new: NewToken) -> bool:
    """Take a token; whether it is the last."""
    text.add(new.token)
    if new.finish_reason:
        text.finish()
    return text.ending is not None


def main(args: GenerateArguments) -> int:
    """Write the texts to the standard output; return the exit code."""
    prompts = read_prompts(Path(args.file).expanduser()) if args.file else []
    writer = Writer(args)
    if args.file:
        for prompt, text in writer.write(prompts):
            line = {"prompt": prompt, "text": text.text, "ending": text.ending}
            # Flushed, so that what is done is in the file if the command is interrupted.
            print(json.dumps(line, ensure_ascii=not _takes_any_text()), flush=True)
            if reader_is_gone(sys.stdout):
                break
    elif args.prompt is not None:
        show(writer, args.prompt.removeprefix(BOM))
    elif sys.stdin.isatty():
        _converse(writer)
    else:
        show(writer, read_input())
    return 0


def show(writer: Writer, prompt: str) -> None:
    """Print a single text piece by piece, or several texts one by one."""
    if writer.args.n == 1:
        for piece in writer.stream(prompt):
            print(piece, end="", flush=True)
            if reader_is_gone(sys.stdout):
                break
        print()
        return
    for number, (_, text) in enumerate(writer.write([prompt]), 1):
        print(f"--- {number} of {writer.args.n}, ended by {text.ending}")
        print(prompt + text.text, flush=True)
        if reader_is_gone(sys.stdout):
            break


def _takes_any_text() -> bool:
    """Whether the standard output's encoding has all characters; JSON can do without."""
    return sys.stdout.encoding.lower().startswith("utf")


def _converse(writer: Writer) -> None:
    """Continue each line that is typed, until the input ends."""
    print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        show(writer, prompt)


def read_input() -> str:
    """The prompt on the standard input, which is UTF-8 whatever the locale says.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        # Where the locale knows no encoding, Python hides each other byte in half a surrogate pair.
        return decoded(_input_bytes())
    except (UnicodeError, NotUtf8Error) as error:
        problem = f"the prompt on the standard input is not UTF-8 ({reason_of(error)})"
        raise ConfigError([problem], "the input") from error


def _input_bytes() -> bytes:
    try:
        return sys.stdin.read().encode(errors="surrogateescape")
    except UnicodeDecodeError as error:
        return error.object  # what could not be read, from which the encoding is told


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: its non-empty lines, or the `prompt` of each line of `.jsonl`.

    Raises:
        ConfigError: the file cannot be read, a line has no prompt, or there is none at all.
    """
    # Not `splitlines`: it also splits at characters such as U+2028, which a prompt may contain.
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        prompts = (
            [_prompt(line) for line in lines]
            if path.suffix.lower() in (".jsonl", ".ndjson")
            else lines
        )
    except (OSError, ValueError) as error:
        problem = (
            f"file={path}: cannot be read ({reason_of(error)}); give a file of prompts, one a line"
        )
        raise ConfigError([problem], "the arguments") from error
    if not prompts:
        raise ConfigError([f"file={path}: no prompt in it; write one a line"], "the arguments")
    return prompts


def _prompt(line: str) -> str:
    """The prompt of a line of JSON."""
    record = json.loads(line)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, str):
        prompt.encode()  # raises at half a surrogate pair, which JSON can hold and UTF-8 cannot
    else:
        raise ValueError(f"no text named `prompt` in {line[:80]}")
    return prompt
