"""Write text with a trained model.

python train/generate.py run=runs/phd_cswa-2-16-32-tiny prompt="def main("
"""

import train  # noqa: F401  # first: how threads wait is settled before torch is loaded

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.tokenizer import Tokenizer
from phd.model import Transformer
from phd.sampling import Sampling, generate
from train import arguments
from train.checkpoint import CheckpointStore
from train.config import Config
from train.device import choose_device, device_problems
from train.engine_config import EngineConfig
from train.validation import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of `python train/generate.py`, each as key=value.

    Attributes:
        run: the directory of a run; its newest whole checkpoint is taken.
        prompt: what the text goes on from.
        max_tokens: how many tokens are written at most.
        temperature: 0 always takes the most likely token.
        top_k: only the k most likely tokens; null: all.
        top_p: only the most likely tokens that together have this probability; null: all.
        seed: equal seeds write equal texts.
        device: auto, cpu or cuda.
    """

    run: str
    prompt: str = "def "
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    device: str = "auto"

    def problems(self) -> list[str]:
        """Every impossible setting, one sentence each."""
        found = []
        if self.max_tokens < 1:
            found.append(f"max_tokens={self.max_tokens}: expected an integer of at least 1")
        found += device_problems(self.device)
        try:
            self.sampling()
        except ValueError as error:
            found += str(error).split("; ")
        return found

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def load_run(directory: Path, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model of a run's newest whole checkpoint, and its tokenizer.

    Raises:
        ConfigError: there is no such run, or it has no whole checkpoint.
    """
    for name in ("config.yaml", "tokenizer.model"):
        if not (directory / name).is_file():
            problem = f"run={directory}: no {name} there; give the directory of a run"
            raise ConfigError([problem], "the arguments")
    try:
        checkpoint = CheckpointStore(directory / "checkpoints", keep=1).newest()
    except ValueError as error:
        raise ConfigError([f"run={directory}: {error}"], "the arguments") from error
    if checkpoint is None:
        problem = f"run={directory}: no checkpoint there yet; let it train on"
        raise ConfigError([problem], "the arguments")
    for path, reason in checkpoint.passed_over:
        print(f"passed over the checkpoint {path}: {reason}", file=sys.stderr)
    settings = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    config = Config.from_dict(settings)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device).load(checkpoint.load_weights())
    return model.eval(), Tokenizer.load(directory / "tokenizer.model")


def main(given: GenerateArguments) -> int:
    """Print the prompt and what follows it, as it comes."""
    device = choose_device(EngineConfig(device=given.device))  # type: ignore[arg-type]
    model, tokenizer = load_run(Path(given.run), device)
    ids = [tokenizer.eos_id, *tokenizer.encode(given.prompt).tolist()]
    dice = torch.Generator().manual_seed(given.seed)
    prompt = torch.tensor([ids], device=device)
    shown = ""
    for token in generate(model, prompt, given.sampling(), dice, given.max_tokens):
        if token.item() == tokenizer.eos_id:
            break
        ids.append(int(token.item()))
        text = tokenizer.decode(ids)
        # A character of several byte tokens shows as U+FFFD until its last byte is there.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(ids)[len(shown) :])
    return 0


if __name__ == "__main__":
    arguments.run(GenerateArguments, main)
