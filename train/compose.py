"""The front of the commands that take a configuration: Hydra overrides in, a checked `Config` out.

Hydra composes the files, sweeps and prints, but it stops at the first thing that is wrong. So
`run` composes and validates every job of a command line first, and says everything at once.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.arguments import USAGE_ERROR, parse, refuse, usage
from conf.errors import ConfigError
from conf.validation import defaults, did_you_mean, keys, nearest
from train.config import Config
from train.distributed.dist_env import DistEnv
from train.engines.config import DeepSpeedConfig, FsdpConfig

T = TypeVar("T")
CONF = Path(__file__).resolve().parent.parent / "conf"

QUOTING = "a text with special characters has quotes within quotes:"
SECTIONS = {setting.name for setting in fields(Config)}

SUBMITIT = "Could not find 'hydra/launcher/submitit"

# What a run's name tells anyway; other settings that differ within a sweep are added to it.
NAMED = {"model", "size", "model.size", "model.variant", "model.K", "model.window", "model.chunk"}


class Command(NamedTuple):
    """A command line that is known to be good."""

    overrides: list[str]  # as Hydra takes them
    swept: set[str]  # the keys that differ between the jobs
    jobs: list[Config]


def run(task: Callable[[Config], int]) -> NoReturn:
    """Runs `task` for every job of this process's command line; its result is the exit code.

    A wrong configuration ends the process with code 2 and one screen that names every problem,
    before the first job starts. A job whose result is not 0 ends a sweep.
    """
    arguments = get_args_parser().parse_intermixed_args()
    flags = [argument for argument in sys.argv[1:] if argument not in arguments.overrides]
    try:
        command = check(arguments.overrides, multirun=arguments.multirun)
    except ConfigError as error:
        _refuse(error)

    def job(tree: DictConfig) -> None:
        config = _named(_read(tree), HydraConfig.get().overrides.task, command.swept)
        try:
            code = task(config)
        except ConfigError as error:
            _refuse(error)
        if code:
            sys.exit(code)

    sys.argv[1:] = [*flags, *command.overrides]
    if DistEnv.from_environment().rank:  # the first rank alone writes Hydra's multirun.yaml
        sys.argv.append(f"hydra.sweep.dir={mkdtemp()}")
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    sys.exit(0)


def _refuse(error: ConfigError) -> NoReturn:
    """Ends the process; of several ranks, which all refuse the same, the first one says why."""
    if DistEnv.from_environment().rank:
        sys.exit(USAGE_ERROR)
    refuse(error)


def run_with(cls: type[T], task: Callable[[T, Config], int]) -> NoReturn:
    """Runs `task` with a `cls` of this process's arguments and the config of all others.

    Its result is the exit code; wrong arguments end the process as those of `run` do. There are no
    sweeps. `--help` prints the docstring of `cls` and its defaults.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(cls))
        sys.exit(0)
    try:
        code = task(*split(cls, sys.argv[1:]))
    except ConfigError as error:
        refuse(error)
    sys.exit(code)


def split(cls: type[T], texts: Iterable[str]) -> tuple[T, Config]:
    """What the arguments of a `cls`, by their keys, and the others, as overrides, describe.

    Raises:
        ConfigError: with the problems of both.
    """
    names = set(keys(cls))
    assert not names & SECTIONS
    own: list[str] = []
    others: list[str] = []
    for text in texts:
        (own if text.partition("=")[0] in names else others).append(text)
    problems: list[str] = []
    with collecting(problems):
        given = parse(cls, own)
    with collecting(problems):
        config = load(others)
    if problems:
        raise ConfigError(problems)
    return given, config


def load(overrides: Iterable[str] = ()) -> Config:
    """The config that `python train/main.py *overrides` runs.

    Raises:
        ConfigError: with every problem of the overrides and of the config.
    """
    [config] = check(overrides).jobs
    return config


def check(overrides: Iterable[str], *, multirun: bool = False) -> Command:
    """Composes and validates every job of a command line; `multirun` is Hydra's `-m`.

    Raises:
        ConfigError: with the problems of all jobs, each once.
    """
    parsed, problems = _parse(overrides)
    jobs: list[Config] = []
    swept: set[str] = set()
    with _composing(), collecting(problems):
        one = [text for text, o in parsed.items() if not o.is_sweep_override()]
        whole = hydra.compose("config", one, return_hydra_config=True)
        if multirun or whole.hydra.mode == RunMode.MULTIRUN:
            points, swept = _points(parsed.values(), whole.hydra.sweeper.params)
            for point in points:
                with collecting(problems):
                    jobs.append(_named(_read(hydra.compose("config", point)), point, swept))
        else:
            problems += [
                f"{text.lstrip('+')}: several values make a sweep, which needs -m; a list is [...]"
                for text in parsed
                if text not in one
            ]
            jobs.append(_read(whole))
    problems += _shared_directories(jobs)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Command(list(parsed), swept, jobs)


@contextmanager
def _composing() -> Iterator[None]:
    """Makes `hydra.compose` work within, with every default as the config `schema`."""
    store = ConfigStore.instance()
    store.store("schema", defaults(Config))
    for engine in (FsdpConfig, DeepSpeedConfig):
        store.store(engine.kind, defaults(engine), group="engine/defaults")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Ends the block at a refusal, ours or Hydra's, and adds it to `problems`."""
    try:
        yield
    except ConfigError as error:
        problems += map(str, error.problems)
    except (HydraException, OmegaConfBaseException) as error:
        problem = str(error).strip().partition("\n")[0]
        hint = ". It comes with: pip install hydra-submitit-launcher" if SUBMITIT in problem else ""
        problems.append(problem + hint)


def _parse(texts: Iterable[str]) -> tuple[dict[str, Override], list[str]]:
    """The overrides that Hydra is to get, by their spelling, and what is wrong with the others."""
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    problems: list[str] = []
    for text in texts:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).partition("\n")[0]
            key, _, value = text.partition("=")
            problems.append(
                f"{text!r}: not key=value as Hydra reads it ({reason}); {QUOTING} "
                f"'{key}=\"{value}\"'"
            )
            continue
        if found := _name_problems(override):
            problems += found
        else:
            spelled = _spelling(text, override)
            parsed.pop(spelled, None)  # the last one counts, also of equal ones
            parsed[spelled] = parser.parse_override(spelled)
    return parsed, problems


def _name_problems(override: Override) -> list[str]:
    """What is wrong with a group or its choice; keys of a section are left to `Config`."""
    key = override.key_or_group
    if _is_hydras(override) or "." in key:
        return []
    groups = sorted(folder.name for folder in CONF.iterdir() if _choices(folder.name))
    if key not in groups:
        guess = did_you_mean(nearest(key, [*groups, *keys(Config)]))
        hint = guess or f"; the groups are {', '.join(groups)}"
        return [] if key in SECTIONS else [f"{key}: unknown group or key{hint}"]
    choices = _choices(key)
    return [
        f"{key}={name}: expected one of {', '.join(choices)}{did_you_mean(nearest(name, choices))}"
        for name in _chosen(override)
        if name not in choices
    ]


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _chosen(override: Override) -> list[str]:
    """The files of a group that an override names; none if it sets the group's keys instead."""
    sweep = override.is_sweep_override()
    values = override.sweep_iterator(Transformer.identity) if sweep else [override.value()]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return ["null" if name is None else str(name) for name in names if not isinstance(name, dict)]


def _is_hydras(override: Override) -> bool:
    """Whether Hydra alone deals with an override: `hydra.verbose=true`, `~model.K`."""
    return override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/"))


def _spelling(text: str, override: Override) -> str:
    """Groups without a plus, keys with two: then Hydra passes on even keys it does not know."""
    if _is_hydras(override):
        return text
    plain, key = text.lstrip("+"), override.key_or_group
    return plain if _choices(key) and _chosen(override) else f"++{plain}"


def _points(
    parsed: Iterable[Override], params: Mapping[str, str] | None
) -> tuple[list[list[str]], set[str]]:
    """The overrides of each job, as Hydra's sweeper makes them, and the keys that differ."""
    parser = OverridesParser.create()
    both = parser.parse_overrides([f"{k}={v}" for k, v in (params or {}).items()])
    both += parsed
    [points] = BasicSweeper.split_arguments(both, max_batch_size=None)
    return points, {o.key_or_group for o in both if o.is_sweep_override()}


def _read(tree: DictConfig) -> Config:
    """The config in what Hydra composed, with or without Hydra's own settings."""
    own = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    return Config.from_dict(cast(dict[str, Any], OmegaConf.to_container(own, resolve=True)))


def _named(config: Config, point: Iterable[str], swept: set[str]) -> Config:
    """Adds to the run's name what it does not tell of a job, so that no two share a directory."""
    untold = swept if config.run.name else swept - NAMED
    overrides = OverridesParser.create().parse_overrides(list(point))
    labels = [_label(override) for override in overrides if override.key_or_group in untold]
    name = "-".join([config.name, *labels])
    return replace(config, run=replace(config.run, name=name)) if labels else config


def _label(override: Override) -> str:
    """An override as a part of a directory's name: `lr_0.001`."""
    setting = override.key_or_group.rpartition(".")[2]
    label = f"{setting}_{override.get_value_element_as_str()}"
    return re.sub(r"([^\w.+-]|_)+", "_", label).strip("_")


def _shared_directories(jobs: Iterable[Config]) -> list[str]:
    return [
        f"run.dir={place}: {count} jobs of this sweep would share it; leave run.dir out, and sweep "
        "settings that make a difference"
        for place, count in Counter(job.run_dir for job in jobs).items()
        if count > 1
    ]
