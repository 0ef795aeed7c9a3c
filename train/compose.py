"""The front end of the commands that take a configuration: from Hydra overrides to a `Config`.

Hydra composes the files, sweeps and prints, but it stops at the first thing that is wrong. So
`run` composes and validates every job of a command line first, and reports all problems at once.
"""

import re
import shlex
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import checkout
from conf.arguments import help_page, misread, own_arguments, parse, refuse, resolve, to_explain
from conf.cache_dirs import use_writable_caches
from conf.completion import completion
from conf.descriptions import entries
from conf.errors import USER_ERRORS, ConfigError, Problem, reason_of, report
from conf.extras import pip_command
from conf.redaction import hide_secrets_of, holds_secret, redacted_argument, redacted_tree
from conf.standard_streams import guard_standard_streams
from conf.text import NotUtf8Error, read_text
from conf.validation import (
    HAS_TO_BE_GIVEN,
    as_dict,
    defaults,
    did_you_mean,
    flatten_keys,
    keys,
    nearest,
)
from phd.config import ModelConfig
from train.conf_files import CONF, choices, groups
from train.config import Config
from train.distributed.dist_env import DistEnv
from train.engine_config import DeepSpeedConfig, FsdpConfig
from train.explain import Composed, explain, overview
from train.run_dir.name import default_name, holds, identity, is_fixed, readable, short_hash
from train.sweep import Sweep

T = TypeVar("T")

QUOTING = "a text with special characters needs quotes within quotes:"
SECTIONS = {setting.name for setting in fields(Config)}

NO_SWEEP = "several values make a sweep, which needs -m"
SUBMITIT = "Could not find 'hydra/launcher/submitit"

# Groups whose settings are all part of a run's name, as far as they differ from the usual ones.
NAMED_GROUPS = {"model", "size", "recipe", "data", "tokenizer", "optim", "schedule", "experiment"}


NAMED_EARLIER = {
    *("model", "size", "model.size", "model.variant", "model.K", "model.window", "model.chunk")
}
"""What the names of earlier versions told of a sweep without being asked."""


OF_PHD = (
    *("variant", "K", "window", "chunk", "span_unit"),
    *("copy_positions", "copy_embedding"),
)
"""The model's settings that a vanilla model does not have."""


class Command(NamedTuple):
    """A command line that has been checked."""

    overrides: list[str]  # as Hydra takes them
    swept: set[str]  # the keys that differ between the jobs
    jobs: list[Config]


def run(
    task: Callable[[Config], int] | str,
    before: Callable[[Config], None] | None = None,
    *,
    other_keys: Iterable[str] = (),
    problems: Iterable[Problem | str] = (),
) -> NoReturn:
    """Runs `task` for every job of this process's command line; its result is the exit code.

    A wrong configuration ends the process with code 2 and one screen that names every problem,
    before the first job starts. A run of a sweep that fails, by a crash or a refusal, is told at
    once; the others go on, and at the end all that failed are listed. A run that was told to end
    ends its sweep.

    Args:
        task: or the name of the module whose `main` it is; see `conf.arguments.resolve`.
        before: further checks, made before this module is imported. Where there are several ranks
            they are left to the task: ranks have to agree about what only some of them miss.
        other_keys: as of `check`.
        problems: found already, and reported with those of the configuration.
    """
    guard_standard_streams()
    use_writable_caches()
    arguments = _arguments()
    flags = [argument for argument in sys.argv[1:] if argument not in arguments.overrides]
    try:
        checkout.claim()
        if (answer := _completion(sys.argv[1:])) is not None:
            print(answer)
            sys.exit(0)
        if arguments.help or arguments.explain is not None:
            print(_page(arguments))
            sys.exit(0)
        found = list(problems)
        with collecting(found):
            command = check(arguments.overrides, multirun=arguments.multirun, other_keys=other_keys)
        if found:
            raise ConfigError(found)
    except ConfigError as error:
        _refuse(error)

    sweep = Sweep(len(command.jobs))
    crashes: list[Exception] = []

    def attempt(config: Config) -> int:
        if before and DistEnv.from_environment().world_size == 1:
            before(config)
        return resolve(task)(config)

    def job(tree: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        config = _named(_read(tree), hydra_config.overrides.task, command.swept)
        _hide_secrets(config)
        if hydra_config.mode == RunMode.MULTIRUN:
            sweep.run(config.name, lambda: attempt(config))
            return
        try:
            code = attempt(config)
        except USER_ERRORS as error:
            _refuse(error)
        except Exception as error:
            # Hydra would put a line with all settings in front of the traceback, also of secrets.
            crashes.append(error)
            return
        if code:
            sys.exit(code)

    sys.argv[1:] = [*flags, *command.overrides]
    if DistEnv.from_environment().rank:  # only rank 0 writes Hydra's multirun.yaml
        sys.argv.append(f"hydra.sweep.dir={mkdtemp()}")
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    finally:
        sweep.tell_failures()
    if crashes:
        raise crashes[0]
    sys.exit(sweep.code)


def own_overrides() -> list[str]:
    """The overrides of the run at hand, as a user types them; of a sweep, those of this one run."""
    if HydraConfig.initialized():
        texts = list(HydraConfig.get().overrides.task)
    else:
        texts = [text for text in sys.argv[1:] if "=" in text or text.startswith("~")]
    return [text.lstrip("+") for text in texts]


def _hide_secrets(config: Config) -> None:
    """Hide the secrets of a job's settings, which may come from files and the environment."""
    tree = config.to_dict()
    hide_secrets_of(tree)
    # Libraries read the command line, too: W&B uploads it.
    sys.argv[1:] = map(redacted_argument, sys.argv[1:])
    written = Path(HydraConfig.get().sweep.dir, "multirun.yaml")
    if HydraConfig.get().mode == RunMode.MULTIRUN and holds_secret(tree) and written.exists():
        written.chmod(0o600)


def _arguments() -> Namespace:
    """This process's arguments: Hydra's and `--explain`; all others are the overrides."""
    parser = get_args_parser()
    parser.add_argument("--explain", metavar="KEY", nargs="?", const="")
    arguments, unknown = parser.parse_known_intermixed_args()
    # What looks like an option and is none stays where it was typed: its value may come after it.
    typed = {*arguments.overrides, *unknown}
    arguments.overrides = [text for text in sys.argv[1:] if text in typed]
    return arguments


def _completion(texts: Sequence[str], cls: Any = None) -> str | None:
    """The answer to `-sc`; None if it is not asked for. `cls` has the command's own arguments."""
    own = list(entries(cls)) if cls else []
    known = {group: choices(group) for group in groups()}
    return completion(texts, [*own, *entries(Config)], known)


def _page(arguments: Namespace) -> str:
    """What `--help` or `--explain` prints.

    Raises:
        ConfigError: there is nothing of the name that is to be explained.
    """
    try:
        now = compose_now(arguments.overrides)
    except ConfigError:
        now = compose_now([])  # whoever asks for help may have got the settings wrong
    if arguments.help:
        return overview(sys.modules["__main__"].__doc__ or "", now)
    return explain(arguments.explain, now)


def explain_setting(key: str) -> str:
    """What `--explain KEY` prints for a command line without other arguments.

    Raises:
        ConfigError: there is nothing of this name.
    """
    return explain(key, compose_now([]))


def _page_with(cls: Any, texts: Sequence[str]) -> str:
    """The page of `--help` or `--explain KEY` of a command with arguments of its own; else empty.

    Raises:
        ConfigError: there is nothing of the name that is to be explained.
    """
    if (answer := _completion(texts, cls)) is not None:
        return answer or " "
    key = to_explain(texts)
    if key is None or key in keys(cls):
        return help_page(cls, texts)
    now = [text for text in texts if "=" in text and text.partition("=")[0] not in keys(cls)]
    return explain(key, compose_now(now))


def compose_now(overrides: Iterable[str]) -> Composed:
    """What a command line sets, and where that comes from; of a sweep, what is not varied.

    Raises:
        ConfigError: with every problem of the overrides and of the config.
    """
    parsed, problems = _parse(overrides, [])
    fixed = {text: o for text, o in parsed.items() if not o.is_sweep_override()}
    with _composing(), collecting(problems):
        tree = hydra.compose("config", list(fixed), return_hydra_config=True)
        typed = frozenset(o.key_or_group for text, o in fixed.items() if text.startswith("++"))
        varied = {o.key_or_group for o in parsed.values() if o.is_sweep_override()}
        varied |= {str(key).lstrip("+") for key in tree.hydra.sweeper.params or ()}
        chosen = _all_chosen(tree, fixed.values())
        return Composed(redacted_tree(_values(tree)), chosen, typed, frozenset(varied))
    raise ConfigError(problems)


def _values(tree: DictConfig) -> dict[str, Any]:
    """All settings by their full names; as composed, if they are no configuration yet."""
    try:
        return flatten_keys(_read(tree).to_dict())
    except ConfigError:
        own = OmegaConf.masked_copy(tree, [str(key) for key in tree if key in SECTIONS])
        return flatten_keys(cast(dict[str, Any], OmegaConf.to_container(own)))


def _all_chosen(tree: DictConfig, overrides: Iterable[Override]) -> dict[str, Any]:
    """The choice of each group, or its choices, which Hydra tells of single ones only."""
    chosen = cast(dict[str, Any], OmegaConf.to_container(tree.hydra.runtime.choices))
    named = {o.key_or_group: _chosen(o) for o in overrides if choices(o.key_or_group)}
    return chosen | {group: names for group, names in named.items() if names}


def other_runs(config: Config) -> list[list[str]]:
    """The arguments of runs to compare the run at hand with: its own, with another model."""
    overrides = own_overrides()
    other = "phd_cswa" if config.model.variant == "vanilla" else "vanilla"
    candidates = [
        [[f"model={other}", *overrides_of_another_model(overrides, OF_PHD, other)]],
        # W and C stay, unless the vanilla run of the sweep refuses them.
        [
            ["-m", "+sweep=k", *overrides_of_another_model(overrides, changed)]
            for changed in (("variant", "K"), OF_PHD)
        ],
    ]
    if "sweep=k" in overrides:
        del candidates[1]  # this run is one of that sweep's
    possible = (filter(_is_possible, versions) for versions in candidates)
    return [found for found in (next(versions, None) for versions in possible) if found]


def _is_possible(arguments: Sequence[str]) -> bool:
    """Whether these arguments of main.py are accepted."""
    try:
        check([text for text in arguments if text != "-m"], multirun="-m" in arguments)
    except ConfigError:
        return False
    return True


def overrides_of_another_model(
    overrides: Iterable[str], changed: Collection[str], suffix: str = ""
) -> list[str]:
    """The overrides of a run that differs in its model, and in where it is, and in nothing else.

    Args:
        overrides: of the run at hand; see `own_overrides`.
        changed: the model's settings that are left to the other run, such as `K`.
        suffix: is added to a name or directory that the run at hand was given.
    """
    found = []
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        section, _, name = override.key_or_group.rpartition(".")
        value = None if override.is_delete() else override.value()
        match override.key_or_group:
            case "run.resume" | "sweep":
                continue
            case "model" if isinstance(value, dict):
                found += [f"model.{k}={v}" for k, v in value.items() if str(k) not in changed]
            case "model":
                continue
            case "run.name" | "run.dir" if suffix:
                found.append(f"{text}-{suffix}")
            case "run.dir":
                continue
            case _ if section != "model" or name not in changed:
                found.append(text)
    return found


def _refuse(error: Exception) -> NoReturn:
    """Ends the process. All ranks raise alike, so only rank 0 says why."""
    if DistEnv.from_environment().rank:
        sys.exit(report(error)[1])
    refuse(error)


def run_with(
    cls: type[T], task: Callable[[T, Config], int] | str, *, sweeps: bool = False
) -> NoReturn:
    """Runs `task` with a `cls` of this process's arguments and the config of all others.

    Its result is the exit code; wrong arguments end the process as in `run`. `--help` prints what
    `cls` is for and its settings, and `--explain KEY` all about a setting, also of the config.

    Args:
        sweeps: whether `-m` and Hydra's other flags are understood, as by `run`.
    """
    guard_standard_streams()
    use_writable_caches()
    try:
        checkout.claim()
        if page := _page_with(cls, sys.argv[1:]):
            print(page)
            sys.exit(0)
    except ConfigError as error:
        refuse(error)
    if sweeps:
        own, sys.argv[1:] = own_arguments(cls, sys.argv[1:])
        problems: list[Problem | str] = []
        with collecting(problems):
            plain = parse(cls, own)
        run(lambda config: resolve(task)(plain, config), other_keys=keys(cls), problems=problems)
    try:
        given = split(cls, sys.argv[1:])
        code = resolve(task)(*given)
    except USER_ERRORS as error:
        refuse(error)
    sys.exit(code)


def split(cls: type[T], texts: Iterable[str]) -> tuple[T, Config]:
    """The `cls` and the config that arguments describe: those with a key of `cls`, and the others.

    Raises:
        ConfigError: with the problems of both.
    """
    own, others = own_arguments(cls, texts)
    problems: list[Problem | str] = []
    with collecting(problems):
        given = parse(cls, own)
    with collecting(problems):
        config = load(others, keys(cls))
    if problems:
        raise ConfigError(problems)
    return given, config


def load(overrides: Iterable[str] = (), other_keys: Iterable[str] = ()) -> Config:
    """The config that `python train/main.py *overrides` runs; `other_keys` are those of `check`.

    Raises:
        ConfigError: with every problem of the overrides and of the config.
    """
    [config] = check(overrides, other_keys=other_keys).jobs
    return config


def check(
    overrides: Iterable[str], *, multirun: bool = False, other_keys: Iterable[str] = ()
) -> Command:
    """Composes and validates every job of a command line.

    Args:
        overrides: as Hydra takes them.
        multirun: Hydra's `-m`.
        other_keys: settings of the same command line that are not part of the configuration; an
            unknown key may be a misspelling of one of them.

    Raises:
        ConfigError: with the problems of all jobs, each once.
    """
    overrides = list(overrides)
    parsed, problems = _parse(overrides, list(other_keys))
    jobs: list[Config] = []
    typed: list[Typed] = []
    swept: set[str] = set()
    with _composing(), collecting(problems):
        one = [text for text, o in parsed.items() if not o.is_sweep_override()]
        whole = hydra.compose("config", one, return_hydra_config=True)
        if multirun or whole.hydra.mode == RunMode.MULTIRUN:
            points, swept = _points(parsed.values(), whole.hydra.sweeper.params)
            for point in points:
                with collecting(problems):
                    jobs.append(_named(_read(hydra.compose("config", point)), point, swept))
                    typed.append(Typed.of(point, swept))
        else:
            swept_texts = [text.lstrip("+") for text in parsed if text not in one]
            problems += [
                Problem(text, expected=NO_SWEEP, hint=f"a list is {_as_list(text)}")
                for text in swept_texts
            ]
            jobs.append(_named(_read(whole), [], set()))
            typed.append(Typed.of(one, swept))
    # A setting that was given, and could not be read, is not told again as one that is missing.
    read = {o.key_or_group for o in parsed.values() if multirun or not o.is_sweep_override()}
    unread = {text.lstrip("+").partition("=")[0] for text in overrides} - read
    problems = [
        problem
        for problem in problems
        if not isinstance(problem, Problem)
        or (problem.key, problem.expected) not in product(unread, [HAS_TO_BE_GIVEN])
    ]
    # What is varied to no effect also makes equal names, which is no problem of its own then.
    problems += _unused(jobs, typed) or _shared_directories(jobs)
    if problems:
        raise ConfigError(problems)
    _tell_of_no_chunk(jobs, typed)
    return Command(list(parsed), swept, jobs)


@contextmanager
def _composing() -> Iterator[None]:
    """Prepares `hydra.compose`, with every default of the dataclasses as the config `schema`."""
    store = ConfigStore.instance()
    store.store("schema", defaults(Config))
    for engine in (FsdpConfig, DeepSpeedConfig):
        store.store(engine.kind, defaults(engine), group="engine/defaults")
    # Within a job Hydra is in use already; it allows one use at a time.
    state = GlobalHydra.instance()
    in_use, state.hydra = state.hydra, None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        state.hydra = in_use


@contextmanager
def collecting(problems: list[Problem | str]) -> Iterator[None]:
    """Adds the problems of a `ConfigError`, or of an error of Hydra, that ends its block."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except (HydraException, OmegaConfBaseException) as error:
        problem = str(error).strip().partition("\n")[0]
        if SUBMITIT in problem:
            problem += f". It comes with: {pip_command('phd-transformer[slurm]')}"
        problems.append(problem)
    except UnicodeDecodeError:
        problems += _not_in_utf8()


def _not_in_utf8() -> Iterator[str]:
    """A problem for each file of conf/ in another encoding; Hydra does not say which one it is."""
    for path in sorted(CONF.rglob("*.yaml")):
        try:
            read_text(path)
        except NotUtf8Error as error:
            yield f"{path}: {reason_of(error)}"


def _parse(
    texts: Iterable[str], other_keys: Sequence[str]
) -> tuple[dict[str, Override], list[Problem | str]]:
    """The overrides to give to Hydra, by their spelling, and what is wrong with the others."""
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    words = Counter(choice for group in groups() for choice in choices(group))
    alone = {c: group for group in groups() for c in choices(group) if words[c] == 1}
    typed, problems = misread(texts, [*groups(), *other_keys, *keys(Config)], alone)
    for text in typed:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).partition("\n")[0]
            expected = f"not key=value as Hydra reads it ({reason})"
            problems.append(
                Problem(repr(text), expected=expected, hint=f"{QUOTING} {_with_quotes(text)}")
            )
            continue
        if found := _name_problems(override, other_keys):
            problems += found
        else:
            spelling = _spelling(text, override)
            parsed.pop(spelling, None)  # of equal overrides, too, the last one counts
            parsed[spelling] = parser.parse_override(spelling)
    # Of the choices of a group the last one counts, and a sweep would be left out without a word.
    sweeps = [name for o in parsed.values() if o.key_or_group == "sweep" for name in _chosen(o)]
    if len(sweeps) > 1:
        hint = "name one, and vary other settings by their values, as in optim.lr=1e-3,3e-3"
        problems.append(Problem("sweep", ",".join(sweeps), "expected one sweep", hint))
    return parsed, problems


def _with_quotes(text: str) -> str:
    """An override as it is typed in a shell, with its text, or each text of its list, in quotes.

    >>> print(_with_quotes("data.sources.books.paths=[a (1).txt,b=2.txt]"))
    'data.sources.books.paths=["a (1).txt","b=2.txt"]'
    """
    key, _, value = text.partition("=")
    listed = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
    if listed is None:
        return shlex.quote(f"{key}={_hydra_quoted(value)}")
    return shlex.quote(f"{key}=[{','.join(map(_hydra_quoted, listed[1].split(',')))}]")


def _as_list(text: str) -> str:
    """An override with several values as one whose value is a list, as it is typed in a shell."""
    key, _, value = text.partition("=")
    return shlex.quote(f"{key}=[{value}]")


def _hydra_quoted(text: str) -> str:
    """A text in Hydra's quotes; one that has them already stays as it is."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text
    # Backslashes mean themselves, but not in front of a quote, nor of the closing one.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped}"'


def _name_problems(override: Override, other_keys: Sequence[str]) -> list[Problem]:
    """What is wrong with a group or its choice; keys of a section are left to `Config`."""
    key = override.key_or_group
    if _is_hydras(override) or "." in key:
        return []
    names = groups()
    if key not in names:
        guess = did_you_mean(nearest(key, [*names, *other_keys, *keys(Config)]))
        hint = guess or f"the groups are {', '.join(names)}"
        unknown = Problem(key, expected="unknown group or key", hint=hint)
        return [] if key in SECTIONS else [unknown]
    options = choices(key)
    expected = f"expected one of {', '.join(options)}"
    # The choices are words that nobody quotes, so they are part of the key here.
    return [
        Problem(f"{key}={name}", expected=expected, hint=did_you_mean(nearest(name, options)))
        for name in _chosen(override)
        if name not in options
    ]


class SizeRecipe(NamedTuple):
    """What a size sets besides the model.

    Attributes:
        name: the file of conf/recipe/ that the size chooses.
        settings: what this file and that of the size set, by full names.
    """

    name: str
    settings: dict[str, Any]


def recipe_of(size: str) -> SizeRecipe | None:
    """The recipe that a file of conf/size/ chooses; None if there is no such file or recipe."""
    if size not in choices("size"):
        return None
    own = _yaml(f"size/{size}.yaml")
    names = [default.get("override /recipe") for default in own.pop("defaults", [])]
    name = next(filter(None, names), None)
    if name is None:
        return None
    both = {**flatten_keys(_yaml(f"recipe/{name}.yaml")), **flatten_keys(own)}
    settings = {key: value for key, value in both.items() if not key.startswith("model.")}
    return SizeRecipe(name, settings)


def _yaml(file: str) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / file)))


def _chosen(override: Override) -> list[str]:
    """The choices that an override names; none if it sets the group's keys instead."""
    sweep = override.is_sweep_override()
    values = override.sweep_iterator(Transformer.identity) if sweep else [override.value()]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return ["null" if name is None else str(name) for name in names if not isinstance(name, dict)]


def _is_hydras(override: Override) -> bool:
    """Whether only Hydra has to understand an override: `hydra.verbose=true`, `~model.K`."""
    return override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/"))


def _spelling(text: str, override: Override) -> str:
    """An override as Hydra gets it: groups without a plus, keys with two.

    With two, Hydra also passes on keys that it does not know, and `Config` can report them all.
    """
    if _is_hydras(override):
        return text
    plain, key = text.lstrip("+"), override.key_or_group
    return plain if choices(key) and _chosen(override) else f"++{plain}"


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
    """The config that Hydra has composed, without Hydra's own settings."""
    own = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    values = cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))
    return Config.from_dict({**values, "model": _without_chunk(values["model"])})


def _without_chunk(model: Any) -> Any:
    """The model's settings; with a chunk of null, which is no chunk, those of `phd_swa`."""
    if not isinstance(model, dict) or model.get("chunk", "") is not None:
        return model
    variant = "phd_swa" if model.get("variant") == "phd_cswa" else model.get("variant")
    return {**model, "variant": variant, "chunk": ModelConfig.chunk}


def _named(config: Config, point: Iterable[str], swept: set[str]) -> Config:
    """The config with the name of its run, so that no two runs share a directory.

    A name that is given stays. In a sweep, what is swept is added to it, and a run whose directory
    holds another run gets a directory beside it.
    """
    if config.run.name and not swept:
        return config
    parsed = OverridesParser.create().parse_overrides(list(point))
    overrides = [override for override in parsed if override.key_or_group in swept]
    if config.run.name:
        name, *earlier = ["-".join([config.run.name, *map(_label, overrides)])]
    else:
        name, *earlier = _default_names(config, overrides)
    run, found = replace(config.run, name=name), None
    if run.dir is None:
        found = holds(Path("runs", name), config)
        if not found and (old := [n for n in earlier if holds(Path("runs", n), config)]):
            run = replace(run, dir=f"runs/{old[0]}")
        elif found is False and swept:
            run = replace(run, name=f"{name}-{short_hash(identity(config))}")
    same = run.name == config.name and run.dir == config.run.dir
    return config if same else replace(config, run=run)


def _default_names(config: Config, swept: Sequence[Override]) -> list[str]:
    """The names of a run that was given none: today's, and that of earlier versions."""
    silent = [
        o for o in swept if o.key_or_group not in NAMED_GROUPS and not is_fixed(o.key_or_group)
    ]
    earlier = [o for o in swept if o.key_or_group not in NAMED_EARLIER]
    name = default_name(config, *_usual(config))
    return list(
        dict.fromkeys(
            "-".join([base, *map(_label, overrides)])
            for base, overrides in ((name, silent), (config.name, earlier))
        )
    )


def _usual(config: Config) -> tuple[dict[str, Any], str]:
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
        settings = _yaml(f"data/{preset}.yaml")
        if settings["sources"].keys() <= own.keys():
            usual |= flatten_keys(settings, "data.")
            text.append(preset)
            own = {name: own[name] for name in own if name not in settings["sources"]}
    text += own
    return usual, "" if text == ["python"] else "+".join(text)


@cache
def _size_defaults(size: str) -> dict[str, Any]:
    """The settings of `size=<size>`, or of the experiment that makes a size of this name."""
    usual = flatten_keys(defaults(Config))
    for group in ("experiment", "size"):
        if size in choices(group):
            own = flatten_keys(_yaml(f"{group}/{size}.yaml"))
            usual |= {key: value for key, value in own.items() if key in usual}
    if recipe := recipe_of(size):
        usual |= recipe.settings
    return usual


def _label(override: Override) -> str:
    """An override as a part of a directory's name: `lr_0.001`."""
    setting = override.key_or_group.rpartition(".")[2]
    return readable(f"{setting}_{override.get_value_element_as_str()}")


class Typed(NamedTuple):
    """The settings that a job's overrides name.

    Attributes:
        varied: for each by its full name, whether the sweep varies it.
        no_chunk: whether `model.chunk=null` is one of them.
    """

    varied: dict[str, bool]
    no_chunk: bool

    @classmethod
    def of(cls, point: Iterable[str], swept: set[str]) -> "Typed":
        """Those of a job's overrides, with the keys that differ between the jobs."""
        varied: dict[str, bool] = {}
        values: dict[str, Any] = {}
        for override in OverridesParser.create().parse_overrides(list(point)):
            if not _is_hydras(override):
                key = override.key_or_group
                named = flatten_keys({key: override.value()})
                values |= named
                varied |= dict.fromkeys(named, key in swept)
        no_chunk = values.get("model.chunk", "") is None
        if no_chunk:
            del varied["model.chunk"]  # every variant may be asked for no chunk
        return cls(varied, no_chunk)


def _unused(jobs: Sequence[Config], typed: Sequence[Typed]) -> list[Problem]:
    """The settings of the command line that change nothing.

    One that all members of a sweep share must change at least one of them. One that is varied must
    change each, or two members would be the same run.
    """
    unused = [{problem.key: problem for problem in job.unused()} for job in jobs]
    everywhere = set.intersection(*map(set, unused)) if unused else set()
    return [
        problem
        for problems, settings in zip(unused, typed, strict=True)
        for key, problem in problems.items()
        if key in settings.varied and (settings.varied[key] or key in everywhere)
    ]


def _tell_of_no_chunk(jobs: Sequence[Config], typed: Sequence[Typed]) -> None:
    """Say what `model.chunk=null` means, once, before anything begins."""
    asked = (
        job.model.variant for job, settings in zip(jobs, typed, strict=True) if settings.no_chunk
    )
    if "phd_swa" in asked and not DistEnv.from_environment().rank:
        print("model.chunk=null: no chunk, which is model=phd_swa", file=sys.stderr)


def _shared_directories(jobs: Iterable[Config]) -> list[Problem]:
    hint = "leave run.dir out, and sweep settings that make a difference"
    return [
        Problem("run.dir", str(path), f"{count} jobs of this sweep would share it", hint)
        for path, count in Counter(job.run_dir for job in jobs).items()
        if count > 1
    ]
