"""Export a trained model as a directory for Hugging Face's transformers.

python train/export.py run=runs/phd_cswa-2-16-32-tiny out=exported dtype=bfloat16

exported/
    config.json, generation_config.json, model.safetensors
    tokenizer.json, tokenizer_config.json    the tokenizer for `AutoTokenizer`
    tokenizer.model                          the SentencePiece model that it was converted from
    README.md                                the model card
    modeling.py, model.py, ...               this project's code, if transformers has no such class
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from conf import arguments
    from train.arguments import ExportArguments

    arguments.run(ExportArguments, "train.export")

import re
from types import ModuleType
from typing import Any

import torch

from conf.errors import ConfigError
from conf.extras import pip_command
from conf.wording import plural
from data.storage.atomic import new_directory
from data.tokenizer import Tokenizer
from phd.config import VARIANTS, ModelConfig
from phd.hf.convert import BY_NORM
from phd.inference.cache import kv_bytes
from phd.model import Transformer, count_parameters
from train.arguments import ExportArguments
from train.checkpoint.load_run import load_run
from train.hf.pretrained import save_pretrained, share_weights
from train.hf.tokenizer_json import not_converted, write_tokenizer
from train.metrics.lines import lines_of
from train.run_dir.snapshot import ROOT

ROOT_MODULE, AUTO_MODEL = "phd.hf.modeling", "AutoModelForCausalLM"
CLASSES = {"AutoConfig": "modeling.PhdConfig", AUTO_MODEL: "modeling.PhdForCausalLM"}
OWN_IMPORT = re.compile(r"^(\s*)from ((?:phd|conf)\.(?:\w+\.)*(\w+)) import", re.MULTILINE)
OPTIONAL_IMPORTS = re.compile(r"^((?:import|from) triton\b.*\n)+", re.MULTILINE)


def main(args: ExportArguments) -> int:
    """Write the directory, and print how to load it; return the exit code."""
    _transformers()  # fails now, and not after the model has been loaded
    out, dtype = Path(args.out).expanduser().resolve(), getattr(torch, args.dtype)
    model, tokenizer, step, config = load_run(Path(args.run).expanduser(), torch.device("cpu"))
    facts = {"trained on": plural(step * config.train.tokens_per_step, "token")}
    facts |= evaluations(Path(args.run).expanduser() / "metrics.jsonl", step)
    notes = not_converted(tokenizer)
    with new_directory(out) as directory:
        write_model(directory, model.to(dtype), tokenizer)
        write_tokenizer(directory, tokenizer, model.config.max_seq_len)
        card = model_card(out.name, model.config, dtype, facts, notes)
        (directory / "README.md").write_text(card, encoding="utf-8")
    for note in notes:
        print(f"no tokenizer.json: {note}; tokenizer.model is there", file=sys.stderr)
    print(f"{out}: {loading(AUTO_MODEL, str(out), model.config)}")
    return 0


# The model


def is_plain(config: ModelConfig) -> bool:
    """Whether a class of transformers computes the same as this model."""
    is_vanilla = config.K == 1 and config.passes == 1 and not config.copy_embedding
    return is_vanilla and config.norm in BY_NORM


def write_model(directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the weights and configs, and this project's code if the model needs it."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
    generation = _transformers().GenerationConfig(**ids)
    if is_plain(model.config):
        save_pretrained(directory, model.config, model.state_dict())
        generation.save_pretrained(directory)
        return
    from phd.hf.modeling import PhdForCausalLM

    hf_model = PhdForCausalLM.of(model)
    hf_model.config.auto_map = CLASSES
    hf_model.generation_config = generation
    hf_model.save_pretrained(directory)
    share_weights(directory)
    # With its modules, an export runs where this project is not installed.
    for name, source in own_modules().items():
        (directory / f"{name}.py").write_text(source, encoding="utf-8")


def own_modules() -> dict[str, str]:
    """The source of `phd.hf.modeling` and of all modules that it imports, by file name.

    transformers loads such code from one flat folder: it follows relative imports, but not into
    subfolders. So absolute imports become relative, and the folders disappear. It also refuses to
    load a model unless every package that is imported outside of a `try` is installed; triton is
    needed on CUDA only, so its import is put into a `try`.
    """
    found: dict[str, str] = {}
    names, seen = [ROOT_MODULE], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        flat = name.rpartition(".")[2]
        assert flat not in found, f"{name}: another module of an export is called {flat}"
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        names += [match[2] for match in OWN_IMPORT.finditer(source)]
        source = OPTIONAL_IMPORTS.sub(_in_try, source)
        found[flat] = OWN_IMPORT.sub(r"\1from .\3 import", source)
    return found


def _in_try(imports: re.Match[str]) -> str:
    lines = "".join(f"    {line}\n" for line in imports[0].splitlines())
    return f"try:\n{lines}except ImportError:\n    raise\n"


def _transformers() -> ModuleType:
    """Import transformers, which is optional: only exports need it."""
    try:
        import transformers
    except ImportError:
        problem = "transformers is not installed; what is exported is for it"
        problem += f": {pip_command('phd-transformer[hf]')}"
        raise ConfigError([problem], "the environment") from None
    return transformers


# The model card


def evaluations(metrics: Path, step: int) -> dict[str, str]:
    """The evaluations of a step in a run's `metrics.jsonl`; `{}` if there were none."""
    if not metrics.is_file():
        return {}
    text = metrics.read_text(encoding="utf-8", errors="replace")
    lines = lines_of(text)
    metrics_of_step = [item for line in lines if line["step"] == step for item in line.items()]
    return {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in metrics_of_step
        if name.startswith("eval/") and value is not None
    }


def loading(auto_class: str, directory: str, config: ModelConfig) -> str:
    """The Python call that loads an exported directory by a class of transformers."""
    trusted = "" if is_plain(config) else ", trust_remote_code=True"
    return f'{auto_class}.from_pretrained("{directory}"{trusted})'


def model_card(
    name: str,
    config: ModelConfig,
    dtype: torch.dtype,
    facts: dict[str, str],
    notes: list[str],
) -> str:
    """The README.md of an exported model."""
    rows = {**_shape(config), **_memory(config, dtype), **facts}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    # Without a tokenizer.json `AutoTokenizer` has nothing to read.
    tokenizer = loading("AutoTokenizer", name, config)
    if notes:
        tokenizer = f'sentencepiece.SentencePieceProcessor(model_file="{name}/tokenizer.model")'
    return CARD.format(
        name=name,
        model=config.name,
        table=table,
        tokenizer=tokenizer,
        loading=loading(AUTO_MODEL, name, config),
    )


def _shape(config: ModelConfig) -> dict[str, Any]:
    rows: dict[str, Any] = {"variant": config.name, "copies of each token, K": config.K}
    traits = VARIANTS[config.variant]
    if traits.window:
        unit = "token" if config.variant == "sps" else config.span_unit
        rows["window, W"] = f"{config.window} ({unit})"
    if config.passes > 1:
        rows["passes through the layers"] = f"{config.passes}, keys of {config.loop_keys}"
    if config.hidden_input != "token":
        rows["input of hidden copies"] = config.hidden_input
    if traits.chunk:
        rows["chunk, C"] = f"{config.chunk} ({config.span_unit})"
    return rows | {
        "parameters": f"{sum(count_parameters(config).values()):,}",
        "layers": config.layers,
        "width": f"{config.dim}, feed-forward {config.ffn_dim}",
        "heads": f"{config.heads} of {config.head_dim}, {config.kv_heads} for keys and values",
        "vocabulary": config.vocab_size,
        "longest context": f"{config.max_seq_len:,} tokens",
        "norms": config.norm,
    }


def _memory(config: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    context = config.max_seq_len
    ours, vanilla = (kv_bytes(c, context, dtype).total for c in (config, config.vanilla_twin))
    key = f"KV cache of {context:,} tokens"
    return {key: f"{ours:,} bytes, {ours / vanilla:.3f} x that of a plain transformer"}


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [phd, parallel-hidden-decoding]
---

# {name}

A language model of the kind `{model}`.

The Parallel Hidden Decoding Transformer (PHD) feeds each token K times through the same weights and
predicts from the last copy. Only the first copy stays in the KV cache, so the model computes more
on each token without remembering more. Where a variant has a window W, the last hidden copies see
each other too, within chunks of C if it has those. With K = 1 it is a plain transformer.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = {tokenizer}
model = {loading}
```

A document begins with the separator, `tokenizer.bos_token`. The tokenizer leaves it to the caller,
as lm-evaluation-harness puts it there itself;
`AutoTokenizer.from_pretrained(..., add_bos_token=True)` puts it before each text.

## Citation

```bibtex
@article{{phd2025,
  title   = {{Efficient Pretraining Length Scaling}},
  journal = {{arXiv preprint arXiv:2504.14992}},
  year    = {{2025}},
}}
```
"""
