"""The front end of the commands that take a configuration: from Hydra overrides to a `Config`.

Hydra composes the files, sweeps and prints, but it stops at the first thing that is wrong. So
`run` composes and validates every job of a command line first, and reports all problems at once.
"""

import pickle
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from conf import checkout
from conf.arguments import help_page, own_arguments, parse, refuse, resolve, to_explain
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
    defaults,
    flatten_keys,
    keys,
)
from train.conf_files import CONF, choices, groups
from train.config import SECTIONS, Config
from train.distributed.dist_env import DistEnv
from train.explain import Composed, explain, overview
from train.overrides import (
    DEEPENED,
    TOGETHER,
    Typed,
    as_list,
    chosen,
    given_twice,
    labels,
    one_by_one,
    parse_overrides,
    parsed_override,
    points_of,
    sweep_name,
)
from train.run_dir.name import named
from train.settings.engine import DeepSpeedConfig, FsdpConfig
from train.shorthands import config_of
from train.sweeps.jobs import Job, in_group, jobs_problems, tell_of_no_chunk
from train.sweeps.sweep import Launcher, Sweep

T = TypeVar("T")

NO_SWEEP = "several values make a sweep, which needs -m"
EXTRAS = {
    "Could not find 'hydra/launcher/submitit": "phd-transformer[slurm]",
    "Could not find 'hydra/launcher/joblib": "phd-transformer[joblib]",
}
"""What Hydra says where a launcher is not installed, and with what it comes."""

OF_PHD = (
    *("variant", "K", "window", "chunk", "span_unit", "originals_see_hidden"),
    *("copy_positions", "copy_input", "copy_embedding", DEEPENED),
)
"""The model's settings that a vanilla model does not have."""


class Command(NamedTuple):
    """A command line that has been checked."""

    overrides: list[str]  # as Hydra takes them
    swept: set[str]  # the keys that differ between the jobs
    jobs: list[Config]
    launcher: Launcher = Launcher.NONE
    sweep_dir: Path | None = None  # None if this is no sweep
    group: str | None = None  # of the runs of a sweep


def run(
    task: Callable[[Config], int] | str,
    before: Callable[[Config], None] | None = None,
    *,
    finished: Callable[[Config], str | None] | None = None,
    compare: Callable[[Sequence[Config]], None] | None = None,
    other_keys: Iterable[str] = (),
    problems: Iterable[Problem | str] = (),
) -> NoReturn:
    """Runs `task` for every job of this process's command line; its result is the exit code.

    A wrong configuration ends the process with code 2 and one screen that names every problem,
    before the first job starts. A run of a sweep that fails, by a crash or a refusal, is told at
    once; the others go on, and at the end all that failed are listed. A run that was told to end
    ends its sweep; the same command goes on with it.

    Args:
        task: or the name of the module whose `main` it is; see `conf.arguments.resolve`.
        before: further checks, made before this module is imported. Where there are several ranks
            they are left to the task: ranks have to agree about what only some of them miss.
        finished: tells that a run of a sweep has finished already; it is passed over.
        compare: prints what the runs of a sweep have come to, at its end.
        other_keys: as of `check`.
        problems: found already, and reported with those of the configuration.
    """
    command = _checked_or_answered(other_keys, problems)
    names = [job.name for job in command.jobs]
    sweep = Sweep(names, command.launcher, command.sweep_dir, finished=finished)
    crashes: list[Exception] = []

    def attempt(config: Config) -> int:
        if before and DistEnv.from_environment().world_size == 1:
            before(config)
        return resolve(task)(config)

    def job(tree: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        config = named(_read(deepcopy(tree)), labels(hydra_config.overrides.task, command.swept))
        config = in_group(config, command.group)
        _hide_secrets(config)
        if hydra_config.mode == RunMode.MULTIRUN:
            sweep.run(config, lambda: attempt(config))
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

    if DistEnv.from_environment().rank:  # only rank 0 writes Hydra's multirun.yaml
        sys.argv.append(f"hydra.sweep.dir={mkdtemp()}")
    try:
        with sweep.launching():
            main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
            sweep.launch(main(job))
        rank = DistEnv.from_environment().rank
        several = command.sweep_dir or any(job.branches and job.run.decays for job in command.jobs)
        if compare and several and not sweep.ended and rank == 0:
            compare(command.jobs)
    finally:
        sweep.tell_failures()
    if crashes:
        raise crashes[0]
    sys.exit(sweep.code)


def _checked_or_answered(other_keys: Iterable[str], problems: Iterable[Problem | str]) -> Command:
    """This process's command line, for Hydra in `sys.argv`; the arguments are those of `run`.

    A question such as `--help`, and a wrong configuration, end the process here.
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
    sys.argv[1:] = [*flags, *command.overrides]
    return command


def own_overrides() -> list[str]:
    """The overrides of the run at hand, as a user types them; of a sweep, those of this one run."""
    if HydraConfig.initialized():
        texts = list(HydraConfig.get().overrides.task)
    else:
        texts = [text for text in sys.argv[1:] if "=" in text or text.startswith("~")]
    return one_by_one(text.lstrip("+") for text in texts)


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
    parsed, problems = parse_overrides(overrides, [])
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
        return flatten_keys(_read(deepcopy(tree)).to_dict())
    except ConfigError:
        own = OmegaConf.masked_copy(tree, [str(key) for key in tree if key in SECTIONS])
        return flatten_keys(cast(dict[str, Any], OmegaConf.to_container(own)))


def _all_chosen(tree: DictConfig, overrides: Iterable[Override]) -> dict[str, Any]:
    """The choice of each group, or its choices, which Hydra tells of single ones only."""
    single = cast(dict[str, Any], OmegaConf.to_container(tree.hydra.runtime.choices))
    several = {o.key_or_group: chosen(o) for o in overrides if choices(o.key_or_group)}
    return single | {group: names for group, names in several.items() if names}


def other_runs(config: Config) -> list[list[str]]:
    """The arguments of runs to compare the run at hand with: its own, with another model."""
    if config.run.decay_of is not None:
        return []  # the trunk is of this model
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
    if any("k" in chosen(o) for o in _parsed(overrides) if o.key_or_group == "sweep"):
        del candidates[1]  # this run is one of that sweep's
    possible = (filter(_is_possible, versions) for versions in candidates)
    return [found for found in (next(versions, None) for versions in possible) if found]


def _parsed(overrides: Iterable[str]) -> list[Override]:
    return [parsed_override(text) for text in overrides]


def _is_possible(arguments: Sequence[str]) -> bool:
    """Whether these arguments of main.py are accepted."""
    try:
        check([text for text in arguments if text != "-m"], multirun="-m" in arguments)
    except ConfigError:
        return False
    return True


def overrides_of_another_model(
    overrides: Sequence[str], changed: Collection[str], suffix: str = ""
) -> list[str]:
    """The overrides of a run that differs in its model, and in where it is, and in nothing else.

    Args:
        overrides: of the run at hand; see `own_overrides`.
        changed: the model's settings that are left to the other run, such as `K`.
        suffix: is added to a name or directory that the run at hand was given.
    """
    found = []
    for text, override in zip(overrides, _parsed(overrides), strict=True):
        section, _, name = override.key_or_group.rpartition(".")
        value = None if override.is_delete() else override.value()
        match override.key_or_group:
            # The other has another K, and a length of its own.
            case "run.resume" | "sweep" | "train.flops_of" | "schedule.copies":
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
    parsed, problems = parse_overrides(overrides, list(other_keys))
    jobs: list[Job] = []
    swept: set[str] = set()
    launcher, folder, group = Launcher.NONE, None, None
    with _composing(), collecting(problems):
        one = [text for text, o in parsed.items() if not o.is_sweep_override()]
        whole = compose_tree(one)
        if multirun or whole.hydra.mode == RunMode.MULTIRUN:
            points, swept = points_of(parsed.values(), whole.hydra.sweeper.params)
            group = sweep_name(parsed.values())
            jobs = _members(points, swept, group, problems)
            launcher, folder = Launcher.of(whole.hydra.launcher), Path(whole.hydra.sweep.dir)
            problems += launcher.problems(DistEnv.from_environment().world_size)
        else:
            problems += [
                Problem(text, expected=NO_SWEEP, hint=f"a list is {as_list(text)}")
                for text in (text.lstrip("+") for text in parsed if text not in one)
            ]
            jobs = [Job(named(_read(whole), {}), Typed.of(one, swept))]
    read = {o.key_or_group for o in parsed.values() if multirun or not o.is_sweep_override()}
    problems = _without_unread(problems, overrides, read)
    problems += jobs_problems(jobs)
    if problems:
        raise ConfigError(problems)
    if not DistEnv.from_environment().rank:
        tell_of_no_chunk(jobs)
    return Command(list(parsed), swept, [job.config for job in jobs], launcher, folder, group)


def _members(
    points: Iterable[list[str]],
    swept: set[str],
    group: str | None,
    problems: list[Problem | str],
) -> list[Job]:
    """The jobs of a sweep that can be composed; adds the problems of the others."""
    jobs = []
    for point in points:
        with collecting(problems):
            problems += given_twice(point)
            config = named(_read(compose_tree(point)), labels(point, swept))
            jobs.append(Job(in_group(config, group), Typed.of(point, swept)))
    return jobs


def _without_unread(
    problems: Iterable[Problem | str], overrides: Iterable[str], read: Collection[str]
) -> list[Problem | str]:
    """The problems, without those of settings that seem to be missing.

    A setting that was given, and could not be read, is not told again as one that is missing.

    Args:
        overrides: as they were given.
        read: the keys of those that could be read.
    """
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    missing = {(key, HAS_TO_BE_GIVEN) for key in given - set(read)}
    return [
        problem
        for problem in problems
        if not isinstance(problem, Problem) or (problem.key, problem.expected) not in missing
    ]


def compose_tree(texts: Sequence[str]) -> DictConfig:
    """What Hydra composes of overrides, with its own settings; to be called while `_composing`.

    Hydra takes 0.1 to 0.2 s for the files of conf/. So it composes each choice of them once, and
    settings are set in a copy, as Hydra sets them when it has read all files.
    """
    parsed = [parsed_override(text) for text in texts]
    choosing = [o for o in parsed if _chooses_file(o)]
    # What changes Hydra itself is left to it, and so is what it appends to its list of files.
    whole: DictConfig | None = None
    if not any("hydra" in text for text in texts) and not any(o.is_add() for o in choosing):
        # The order of groups makes no difference, except to which error comes first.
        chosen = [str(o.input_line) for o in sorted(choosing, key=lambda o: o.key_or_group)]
        with suppress(HydraException):
            whole = pickle.loads(_of_choices(tuple(chosen), _files()))
    if whole is None or whole.hydra.searchpath:  # the files of further folders may change
        return hydra.compose("config", list(texts), return_hydra_config=True)
    settings = [o for o in parsed if not _chooses_file(o)]
    ConfigLoaderImpl._apply_overrides_to_config(settings, whole)
    whole.hydra.overrides.task = [o.input_line for o in parsed]
    names = whole.hydra.job.config.override_dirname
    whole.hydra.job.override_dirname = get_overrides_dirname(
        overrides=parsed,
        kv_sep=names.kv_sep,
        item_sep=names.item_sep,
        exclude_keys=names.exclude_keys,
    )
    whole.hydra.runtime.cwd = str(Path.cwd())
    return whole


def _files() -> tuple[tuple[str, int, int], ...]:
    """The files of conf/, with what changes if they do."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        with suppress(OSError):  # an editor's lock is a link to nowhere beside the file
            stat = path.stat()
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def _chooses_file(override: Override) -> bool:
    """Whether it is of a group, as Hydra tells them; all others it sets in what the files hold."""
    key = override.key_or_group
    return ("/" in key or bool(choices(key))) and not isinstance(override.value(), dict)


@lru_cache(maxsize=64)
def _of_choices(texts: tuple[str, ...], files: Any) -> bytes:  # noqa: ARG001
    """What Hydra composes of overrides and files, pickled: a deep copy would take six times as long
    as reading it."""
    return pickle.dumps(hydra.compose("config", list(texts), return_hydra_config=True))


@cache
def _store_defaults() -> None:
    """Give Hydra every default of the dataclasses, as the config `schema`."""
    store = ConfigStore.instance()
    store.store("schema", defaults(Config))
    for engine in (FsdpConfig, DeepSpeedConfig):
        store.store(engine.kind, defaults(engine), group="engine/defaults")


@contextmanager
def _composing() -> Iterator[None]:
    """Prepares `hydra.compose`."""
    _store_defaults()
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
        for missing, extra in EXTRAS.items():
            if missing in problem:
                problem += f". It comes with: {pip_command(extra)}"
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


def _read(tree: DictConfig) -> Config:
    """The config that Hydra has composed; the tree loses what is no part of it.

    Hydra's own settings are one thing in a command and another in its jobs.
    """
    with open_dict(tree):
        tree.pop("hydra", None)
        together = tree.pop(TOGETHER, None) or {}
    for key, value in together.items():
        OmegaConf.update(tree, str(key), value, force_add=True)
    return config_of(cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True)))
