"""The default name of a run, which says all that makes it another run than its size's default one.

    phd_cswa-2-16-32-tiny                         the default run
    phd_cswa-2-16-32-tiny-dim_128-lr_0.001        two settings differ
    phd_cswa-3-16-32-550m-fineweb_edu             another text
    phd_cswa-2-16-32-tiny-files-paths_b.jsonl-4f2a90c1

A value that is too long, or has characters that a directory should not have, is shown in part, and
a hash of all differences follows. So two commands have one name only if they mean one run. Settings
that a run may change when it goes on, such as its length or its device, are no part of the name.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from xxhash import xxh3_64_hexdigest

from conf.redaction import redacted_tree
from conf.validation import as_dict, defaults, flatten_keys, keys
from train.conf_files import choices, load_yaml, recipe_of
from train.config import Config
from train.settings.run import decay_name

MAY_CHANGE = (
    *("run.name", "run.dir", "run.resume", "run.decay", "schedule.decays"),
    *("engine.", "checkpoint.", "faults.", "eval.", "hooks."),
    *("model.attention", "train.max_", "train.micro_batch", "train.profile", "tokenizer.cache_dir"),
    *("data.workers", "data.prefetch", "data.max_quarantined", "data.remote.", "data.cache."),
)
"""How the settings begin that do not make another run; and those that end with `.epochs`."""

IN_THE_VARIANT = ("size", "variant", "K", "window", "chunk", "span_unit", "passes", "loop_keys")
"""What the name of the variant and the size tell already."""

LONGEST = 90
"""Characters of a name; a file system takes 255, of which `.old-1` and the like need some."""

LONGEST_VALUE = 24
"""Characters that are shown of a value."""

NAMED_GROUPS = {"model", "size", "recipe", "data", "tokenizer", "optim", "schedule", "experiment"}
"""Groups whose settings are all part of a run's name, as far as they differ from the usual ones."""

NAMED_EARLIER = {
    *("model", "size", "model.size", "model.variant", "model.K", "model.window", "model.chunk")
}
"""What the names of earlier versions told of a sweep without being asked."""


def identity(config: Config) -> dict[str, Any]:
    """The settings that make a run this one and no other, by full names; without secrets.

    A checkpoint has none either, and the signature of a link differs each time. Settings that
    change nothing in this run, such as the chunk of `phd_swa`, are left out.
    """
    tree = redacted_tree(config.to_dict())
    if (copies := tree["schedule"]["copies"]) is not None:
        # One setting, which a name spells `copies_0_1_0.75_2`.
        tree["schedule"]["copies"] = "_".join(
            f"{str(float(start)).removesuffix('.0')}_{K}" for start, K in copies.items()
        )
    settings = flatten_keys(tree)
    unused = {problem.key for problem in config.unused()}
    if config.train.flops_of is None:  # as where it names the run's own model
        unused.add("train.flops_of")
    return {key: x for key, x in settings.items() if is_fixed(key) and key not in unused}


def is_fixed(key: str) -> bool:
    """Whether a setting, or all settings of a section such as `model`, belong to the identity."""
    return not f"{key}.".startswith(MAY_CHANGE) and not key.endswith(".epochs")


def default_name(config: Config, usual: Mapping[str, Any], text: str = "") -> str:
    """The variant, the size, and what differs.

    Args:
        config: of the run.
        usual: the settings of the default run of this size and text, by full names.
        text: names the text; empty for the default one.
    """
    size = readable(config.model.size)
    told = {f"model.{name}" for name in IN_THE_VARIANT}
    others = {
        key: value
        for key, value in identity(config).items()
        if key not in told and (key not in usual or value != usual[key])
    }
    one_source = len(config.data.sources) == 1
    labels = [_label(key, value, one_source=one_source) for key, value in others.items()]
    parts, whole = [config.model.name, size], size == config.model.size
    for label, exact in [(text, True)] * bool(text) + labels:
        fits = len("-".join([*parts, label])) <= LONGEST - 9
        parts += [label] * fits
        whole = whole and exact and fits
    if not whole:
        parts.append(short_hash({**others, "size": config.model.size, "text": text}))
    return "-".join(parts)


def short_hash(settings: Mapping[str, Any]) -> str:
    """Eight characters that are the same for the same settings, in any order."""
    return xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())[:8]


def saved_identity(directory: Path) -> dict[str, Any] | None:
    """The identity of the run in a directory; None if there is none that could be gone on with.

    That of the newest checkpoint counts. `config.yaml` is of a run that has none yet.
    """
    states = sorted(directory.glob("checkpoints/step_*/state.json"), reverse=True)
    for path in [*states, directory / "config.yaml"]:
        try:
            text = path.read_text(encoding="utf-8")
            settings = json.loads(text)["config"] if path in states else yaml.safe_load(text)
            if isinstance(settings, dict):
                return identity(Config.from_dict(settings))
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            continue  # not written yet, damaged, or of a version with other settings
    return None


def holds(directory: Path, config: Config) -> bool | None:
    """Whether a directory holds this very run; None if it holds none."""
    saved = saved_identity(directory)
    if saved is None:
        return False if any(directory.glob("checkpoints/step_*")) else None
    return saved == identity(config)


def _label(key: str, value: Any, *, one_source: bool) -> tuple[str, bool]:
    """A difference as a part of a directory's name, and whether it says all.

    >>> _label("optim.lr", 1e-3, one_source=True), _label("schedule.kind", "wsd", one_source=True)
    (('lr_0.001', True), ('schedule.kind_wsd', True))
    >>> _label("data.sources.files.paths", "/texts/b.jsonl", one_source=True)
    ('paths_b.jsonl', False)
    """
    *sections, name = key.split(".")
    if _counted_names()[name] > 1 or (sections[:2] == ["data", "sources"] and not one_source):
        name = f"{sections[-1]}.{name}"
    text = spelled(value)
    shown = readable(text.rstrip("/").rpartition("/")[2])[:LONGEST_VALUE]
    return f"{name}_{shown}", shown == text


def spelled(value: Any) -> str:
    """A value as YAML spells it, without spaces."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def readable(text: str) -> str:
    """A text with `_` for all that a directory's name should not have."""
    return re.sub(r"([^\w.+-]|_)+", "_", text).strip("_")


@cache
def _counted_names() -> Counter[str]:
    """How many settings have the same last name, such as `kind`."""
    return Counter(
        key.rpartition(".")[2] for key in keys(Config) if "*" not in key and is_fixed(key)
    )


def named(config: Config, swept: Mapping[str, str]) -> Config:
    """The config with the name of its run, so that no two runs share a directory.

    A name that is given stays. In a sweep, what is swept is added to it, and a run whose directory
    holds another run gets a directory beside it.

    Args:
        swept: what differs between the runs of a sweep, such as `optim.lr`, with what a name says
            of this run's value: `lr_0.001`.
    """
    if config.run.name and not swept:
        return config
    if config.run.name:
        name, *earlier = ["-".join([config.run.name, *swept.values()])]
    else:
        name, *earlier = _default_names(config, swept)
    run, found = replace(config.run, name=name), None
    if run.dir is None:
        found = holds(Path("runs", name), config)
        if not found and (old := [n for n in earlier if holds(Path("runs", n), config)]):
            run = replace(run, dir=f"runs/{old[0]}")
        elif found is False and swept:
            run = replace(run, name=f"{name}-{short_hash(identity(config))}")
    same = run.name == config.name and run.dir == config.run.dir
    return config if same else replace(config, run=run)


def _default_names(config: Config, swept: Mapping[str, str]) -> list[str]:
    """The names of a run that was given none: today's, and that of earlier versions."""
    if config.run.decay_of is not None and config.total_steps is not None:
        # As the trunk's own command names it; what else may differ between decays is told.
        others = [label for key, label in swept.items() if not key.startswith("train.max_")]
        trunk = Path(config.run.decay_of).resolve().name
        return ["-".join([decay_name(trunk, config.total_steps), *others])]
    silent = [
        label for key, label in swept.items() if key not in NAMED_GROUPS and not is_fixed(key)
    ]
    earlier = [label for key, label in swept.items() if key not in NAMED_EARLIER]
    name = default_name(config, *usual_settings(config))
    names = ("-".join([base, *ls]) for base, ls in ((name, silent), (config.name, earlier)))
    return list(dict.fromkeys(names))


def usual_settings(config: Config) -> tuple[dict[str, Any], str]:
    """The usual settings of a run of this size and text, and the text's name.

    Sources that no file of conf/data/ names have the defaults of their kind.
    """
    usual = dict(_size_defaults(config.model.size))
    own, text = config.data.sources, []
    for name, source in own.items():
        usual |= {
            f"data.sources.{name}.{setting.name}": as_dict(setting.default)
            for setting in fields(source)
            if setting.default is not MISSING
        }
    for preset in choices("data"):
        sources, settings = _preset(preset)
        if sources <= own.keys():
            usual |= settings
            text.append(preset)
            own = {name: own[name] for name in own if name not in sources}
    text += own
    return usual, "" if text == ["python"] else "+".join(text)


@cache
def _preset(data: str) -> tuple[frozenset[str], dict[str, Any]]:
    """The names of the sources of a file of conf/data/, and the settings that it makes."""
    settings = load_yaml(f"data/{data}.yaml")
    return frozenset(settings["sources"]), flatten_keys(settings, "data.")


@cache
def _size_defaults(size: str) -> dict[str, Any]:
    """The settings of `size=<size>`, or of the experiment that makes a size of this name."""
    usual = flatten_keys(defaults(Config))
    for group in ("experiment", "size"):
        if size in choices(group):
            own = flatten_keys(load_yaml(f"{group}/{size}.yaml"))
            usual |= {key: value for key, value in own.items() if key in usual}
    if recipe := recipe_of(size):
        usual |= recipe.settings
    return usual
