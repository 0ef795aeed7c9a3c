"""Start the processes of a run: on this machine, on several, or in a cluster's queue.

    python -m launch local      processes=4 model=phd_cswa ...
    python -m launch nodes      nodes=2 address=node1:29500 processes=8 model=phd_cswa ...
    python -m launch slurm      nodes=2 processes=8 partition=gpu time=12h model=phd_cswa ...
    python -m launch kubernetes nodes=2 processes=8 image=phd:1 volume=runs model=phd_cswa ...
    python -m launch check      nodes=2 address=node1:29500 processes=8 model=phd_cswa ...

Settings that are not the launcher's are those of the training, as `python train/main.py` takes
them. All settings are checked before anything starts or is queued.

    --dry             print what would run (command, script or manifest), and run nothing
    -m                the training settings are a sweep, whose runs follow each other
    site=FILE         settings from a YAML file, such as the partition and account of a cluster;
                      settings on the command line replace them
    LAUNCHER --help   all settings of local, nodes, slurm, kubernetes or check
    LAUNCHER --explain KEY    meaning, type and default of one of them, or of one of the training

`check` starts no training: in about a minute it looks at the machines on which the training is to
run, and names those that are not like the others.

Exit codes:

    0     the run is finished
    1     it crashed, and no restarts are left
    2     the configuration or the data is wrong
    75    it was saved and ended early, or a server, disk or network failed for now: the same
          command continues it (slurm and kubernetes start it again themselves)
    130   Ctrl-C
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, get_origin

import yaml

from conf import checkout
from conf.arguments import help_page, own_arguments, parse, refuse, to_explain, usage
from conf.cache_dirs import use_writable_caches
from conf.errors import ConfigError, Problem, reason_of
from conf.redaction import redacted_argument
from conf.standard_streams import guard_standard_streams
from conf.text import NotUtf8Error, read_text
from conf.validation import did_you_mean, keys, nearest, settings_of
from launch import kubernetes, slurm
from launch.config import LAUNCHERS, Check, Kubernetes, Local, MultiNode, Nodes, Slurm
from train.compose import check, collecting, explain_setting
from train.config import SECTIONS, Config

SWEEP = ("-m", "--multirun")


@dataclass(frozen=True)
class LaunchCommand:
    """A command line that has been checked.

    Attributes:
        config: the settings of the launcher.
        arguments: those of the training command.
        run_dirs: the directories of the runs; empty if another script is started.
        caches: the directories of their copies of files; None for the usual one.
    """

    config: Local
    arguments: list[str]
    run_dirs: list[Path]
    caches: list[str | None] = field(default_factory=list)


def read_command(texts: Sequence[str]) -> LaunchCommand:
    """What `LAUNCHER SETTING...` describes.

    Raises:
        ConfigError: with every problem of the settings of launcher and training.
    """
    launcher = texts[0] if texts else ""
    if launcher not in LAUNCHERS:
        expected = f"expected one of {', '.join(LAUNCHERS)}"
        hint = did_you_mean(nearest(launcher, LAUNCHERS))
        raise ConfigError([Problem(repr(launcher), expected=expected, hint=hint)], "the command")
    names = keys(LAUNCHERS[launcher])
    own: list[str] = []
    others: list[str] = []
    problems: list[Problem | str] = []
    config: Local | None = None
    jobs: list[Config] = []
    with collecting(problems):
        own, others = _split(LAUNCHERS[launcher], texts[1:])
        for path in [text.partition("=")[2] for text in others if text.startswith("site=")]:
            site = _read_site(path)
            if launcher == "check":  # the site's file is that of a scheduler
                site = [text for text in site if _name(text) in names]
            own = [*site, *own]  # before the command line's, which replace them
        others = [text for text in others if not text.startswith("site=")]
        config = parse(LAUNCHERS[launcher], own)
    if isinstance(config, Slurm | Kubernetes):
        problems += _secret_problems(others, config)
    if not any(text.startswith("script=") for text in own):
        wrong = {text: meant for text in others if (meant := _misspelt(text, LAUNCHERS[launcher]))}
        problems += [
            Problem(text.partition("=")[0], expected="unknown key", hint=did_you_mean(meant))
            for text, meant in wrong.items()
        ]
        others = [text for text in others if text not in wrong]
        with collecting(problems):
            jobs = _check_jobs(others, config, names)
    if problems or config is None:
        raise ConfigError(problems)
    run_dirs = [job.run_dir for job in jobs]
    return LaunchCommand(config, others, run_dirs, [job.data.cache.dir for job in jobs])


def _split(cls: type[Local], texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the launcher, and those of the training command."""
    if not any(text.startswith("script=") for text in texts):
        return own_arguments(cls, texts)
    # Another script may have options of the same names: `--nodes 3`.
    own = [text for text in texts if "=" in text and _name(text) in keys(cls)]
    return own, [text for text in texts if text not in own]


def _secret_problems(arguments: Sequence[str], config: Local) -> list[Problem]:
    """Settings of the training that a job's script or manifest would show to others."""
    return [
        Problem(
            text.partition("=")[0].lstrip("+"),
            redacted_argument(text).partition("=")[2],
            "holds a password, a signature or a token, which scripts and manifests must not hold",
            f"write '${{oc.env:NAME}}' in its place, and for NAME: {config.secret_hint}",
        )
        for text in arguments
        if redacted_argument(text) != text
    ]


def start(command: LaunchCommand) -> int:
    """Starts the processes, or puts the job into the queue; returns the exit code.

    Raises:
        ConfigError: this machine lacks the script, or the scheduler's command.
    """
    config = command.config
    match config:
        case Slurm():
            config.log_dir.mkdir(parents=True, exist_ok=True)
            return _submit(["sbatch"], slurm.render(config, command.arguments, command.run_dirs))
        case Kubernetes() as config:
            return _submit(
                ["kubectl", "apply", "-f", "-"], kubernetes.render(config, command.arguments)
            )
    if config.script and not Path(config.script).is_file():
        hint = f"correct it (relative paths start at {Path.cwd()})"
        raise ConfigError([Problem("script", config.script, "no such file", hint)])
    from launch import agent  # needs PyTorch, which a machine that only queues jobs may not have

    if isinstance(config, Check):
        return agent.check(config, _directories(command))
    if config.script and (other := checkout.checkout_of(Path(config.script))):
        os.environ["PYTHONPATH"] = checkout.lead(other, os.environ.get("PYTHONPATH", ""))
    return agent.run(config, _process_command(command))


def describe(command: LaunchCommand) -> str:
    """What `start` would run."""
    config = command.config
    match config:
        case Slurm():
            return slurm.render(config, command.arguments, command.run_dirs)
        case Kubernetes():
            return kubernetes.render(config, command.arguments)
    count = "one for each CUDA device" if config.processes is None else str(config.processes)
    lines = [f"# processes on this machine: {count}; restarts: {config.max_restarts}"]
    if isinstance(config, Nodes):
        lines.append(f"# machines: {config.nodes}, {config.rendezvous} at {config.address}")
    words = _process_command(command)
    if isinstance(config, Check):
        words = [sys.executable, "-m", "launch.preflight", "..."]
    return "\n".join([*lines, shlex.join(words), ""])


def _check_jobs(
    arguments: Sequence[str], config: Local | None, names: Sequence[str]
) -> list[Config]:
    """The runs that `train/main.py` would do with these arguments.

    Args:
        arguments: of the training command.
        config: the settings of the launcher; None if they are wrong.
        names: the names of these settings, of which an unknown argument may be a misspelling.

    Raises:
        ConfigError: with every problem of the arguments, also with those that depend on the number
            of processes, as far as it is known.
    """
    overrides = [text for text in arguments if text not in SWEEP]
    multirun = len(overrides) < len(arguments)
    jobs = check(overrides, multirun=multirun, other_keys=names).jobs
    elastic = isinstance(config, MultiNode) and config.is_elastic
    problems = [
        replace(problem, expected=f"with {nodes} machines {problem.expected}")
        if elastic
        else problem
        for nodes, world_size in _world_sizes(config).items()
        for job in jobs
        for problem in job.problems_on(world_size)
    ]
    restarted = elastic or isinstance(config, Slurm | Kubernetes)
    if restarted and any(job.run.resume == "never" for job in jobs):
        reason = "machines that are started later, or again, would start the run from step 0"
        hint = "choose another run.name, or move the earlier run away yourself"
        problems.append(Problem("run.resume", "never", reason, hint))
    if problems:
        raise ConfigError(problems)
    return jobs


def _world_sizes(config: Local | None) -> dict[int, int]:
    """The possible numbers of ranks, by the number of machines; empty if they are not known."""
    if config is None or config.processes is None:
        return {}
    nodes = range(1, 2)
    if isinstance(config, MultiNode):
        nodes = range(config.least_nodes, config.most_nodes + 1)
    return {count: count * config.processes for count in nodes}


def _read_site(path: str) -> list[str]:
    """The settings in a site's file, as arguments.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        found: Any = yaml.safe_load(read_text(Path(path)))
    except (OSError, NotUtf8Error, yaml.YAMLError) as error:
        raise ConfigError(
            [Problem("site", path, f"cannot be read ({reason_of(error)})")]
        ) from error
    if not isinstance(found, dict):
        expected = "expected settings, one on each line, such as partition: gpu"
        raise ConfigError([Problem("site", path, expected)])
    flat: dict[str, Any] = {}
    for key, value in found.items():
        entries = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": entry for name, entry in entries} or {key: value}
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in flat.items()
    ]


def _name(text: str) -> str:
    """The setting that an argument is for: `env` of env.NCCL_DEBUG=WARN."""
    return text.partition("=")[0].partition(".")[0]


def _misspelt(text: str, launcher: type[Local]) -> str | None:
    """The key that was probably meant by one with a name in it, such as nodeSelector.gpu=h100."""
    named = [s.name for s in settings_of(launcher) if get_origin(s.hint) is dict]
    head, dot, entry = text.partition("=")[0].lstrip("+~").partition(".")
    if not dot or head in named or head in SECTIONS:
        return None
    meant = nearest(head, [*named, *SECTIONS, "hydra"])
    return f"{meant}.{entry}" if meant in named else None


def _directories(command: LaunchCommand) -> list[str]:
    """Where the runs write: their own directories, the caches, and temporary files."""
    cache = os.environ.get("PHD_CACHE", "~/.cache/phd")
    runs = [str(directory.absolute()) for directory in command.run_dirs] or [os.getcwd()]
    caches = [job_cache or cache for job_cache in command.caches] or [cache]
    found = [*runs, *caches, tempfile.gettempdir()]
    return list(dict.fromkeys(os.path.abspath(os.path.expanduser(path)) for path in found))


def _process_command(command: LaunchCommand) -> list[str]:
    """The command of each process."""
    script = command.config.script or str(Path(__file__).parent.parent / "train" / "main.py")
    return [sys.executable, "-u", script, *command.arguments]


def _submit(tool: Sequence[str], text: str) -> int:
    """Gives a job to a scheduler's command line tool; returns its exit code."""
    try:
        return subprocess.run(tool, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        hint = "--dry prints what it would be given"
        problem = Problem(tool[0], expected="not found on this machine", hint=hint)
        raise ConfigError([problem], "the machine") from None


def main(texts: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    if {"-h", "--help"} & set(texts):
        print(usage(LAUNCHERS[texts[0]]) if texts[0] in LAUNCHERS else (__doc__ or "").strip())
        return 0
    if (key := to_explain(texts)) is not None:
        own = texts[0] in LAUNCHERS and key in keys(LAUNCHERS[texts[0]])
        print(help_page(LAUNCHERS[texts[0]], texts) if own else explain_setting(key))
        return 0
    command = read_command([text for text in texts if text != "--dry"])
    if "--dry" in texts:
        print(describe(command), end="")
        return 0
    return start(command)


def _run() -> NoReturn:
    guard_standard_streams()
    use_writable_caches()
    try:
        checkout.claim()
        code = main(sys.argv[1:])
    except ConfigError as error:
        refuse(error)
    sys.exit(code)


if __name__ == "__main__":
    _run()
