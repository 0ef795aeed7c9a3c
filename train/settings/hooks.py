"""`hooks.`: what the run reports."""

from dataclasses import dataclass, field
from typing import Literal

from conf.errors import Problem
from conf.settings import Settings, at_least
from phd.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Settings):
    """Weights & Biases.

    Attributes:
        mode: `online` sends the metrics to the server, `offline` writes them to the run's
            directory, and `disabled` does not use it. `auto` is `online` if you have logged in
            with `wandb login`, and `offline` otherwise.
        project: the project there.
        group: the group that the run belongs to; null: in a sweep its name, such as `k+seeds`, and
            otherwise none.
        tags: what else to find the run by; the names of its variant and its size are tags, too.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "phd"
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Text that the model writes during the run. It also writes one at the end.

    Attributes:
        every: the steps between two samples; 0: only at the end.
        prompt: the text that the model continues; null: the first words of a held-out document, so
            that it fits the corpus.
        tokens: how many tokens it adds.
    """

    every: int = 0
    prompt: str | None = None
    tokens: int = 100

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks.sample", 0, "every") + at_least(
            self, "hooks.sample", 1, "tokens"
        )

    def problems_with(self, model: ModelConfig) -> list[Problem]:
        """Why a model cannot write so much."""
        longest = model.max_seq_len
        if self.tokens < longest:
            return []
        reason = f"leaves no room for the prompt in model.max_seq_len={longest}"
        others = ("model.max_seq_len",)
        return [Problem("hooks.sample.tokens", self.tokens, reason, "choose less", others)]


@dataclass(frozen=True, kw_only=True)
class KVConfig(Settings):
    """The report of the KV cache's size.

    Attributes:
        context: the tokens in the cache whose bytes are reported.
    """

    context: int = 4096

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks.kv", 1, "context")


@dataclass(frozen=True, kw_only=True)
class HooksConfig(Settings):
    """What the run reports. Its `metrics.jsonl` is always written.

    Attributes:
        log_every: the steps between two reports. Steps 1, 2, 5 and 10 are reported, too.
        console: print a line for each report.
        wandb: Weights & Biases.
        sample: text that the model writes.
        kv: the size of the KV cache.
    """

    log_every: int = 20
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    kv: KVConfig = field(default_factory=KVConfig)

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks", 1, "log_every")
