"""Start the processes of a run: on this machine, on several, or in a cluster's queue.

    python -m launch local      processes=4 model=phd_cswa ...
    python -m launch nodes      nodes=2 address=node1:29500 processes=8 model=phd_cswa ...
    python -m launch slurm      nodes=2 processes=8 partition=gpu time=12h model=phd_cswa ...
    python -m launch kubernetes nodes=2 processes=8 image=phd:1 volume=runs model=phd_cswa ...

What is no setting of the way of starting is one of the training, as `python train/main.py` takes
it. All of it is checked before anything starts or is queued.

    --dry          print what would run (command, script, manifest) and end
    -m             the training settings are a sweep; its runs follow each other
    site=FILE      settings from a YAML file, such as a cluster's partition and account
    WAY --help     all settings of one way
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from conf.arguments import parse, refuse, usage
from conf.errors import ConfigError
from conf.validation import did_you_mean, keys, nearest
from launch import kubernetes, slurm
from launch.config import LAUNCHERS, Group, Kubernetes, Local, Nodes, Slurm
from train.compose import check, collecting
from train.config import Config

SWEEP = ("-m", "--multirun")


@dataclass(frozen=True)
class Request:
    """A command line that is known to be good."""

    config: Local
    arguments: list[str]  # of the training command
    run_dirs: list[Path]


def read(texts: Sequence[str]) -> Request:
    """What `WAY SETTING...` asks for.

    Raises:
        ConfigError: with every problem of the settings of both, start and training.
    """
    way = texts[0] if texts else ""
    if way not in LAUNCHERS:
        guess = did_you_mean(nearest(way, LAUNCHERS))
        raise ConfigError(
            [f"{way!r}: expected one of {', '.join(LAUNCHERS)}{guess}"], "the command"
        )
    names = keys(LAUNCHERS[way])
    own: list[str] = []
    others: list[str] = []
    problems: list[str] = []
    config: Local | None = None
    run_dirs: list[Path] = []
    with collecting(problems):
        for text in texts[1:]:
            key, _, value = text.partition("=")
            if key == "site":
                own = [*_site(value), *own]  # the command line comes after
            else:
                (own if key in names else others).append(text)
        config = parse(LAUNCHERS[way], own)
    if not any(text.startswith("script=") for text in own):
        with collecting(problems):
            jobs = _jobs(others, config)
            run_dirs = [job.run_dir for job in jobs]
    if problems or config is None:
        raise ConfigError(_meant(problem, names) for problem in problems)
    return Request(config, others, run_dirs)


def start(request: Request) -> int:
    """Starts, or puts into the queue; returns the exit code."""
    config = request.config
    match config:
        case Slurm():
            Path(config.logs).mkdir(parents=True, exist_ok=True)
            return _submit(["sbatch"], slurm.render(config, request.arguments, request.run_dirs))
        case Kubernetes() as config:
            return _submit(
                ["kubectl", "apply", "-f", "-"], kubernetes.render(config, request.arguments)
            )
    from launch import agent  # brings PyTorch, which a machine that only queues jobs can do without

    return agent.run(config, _command(request))


def describe(request: Request) -> str:
    """What `start` would run."""
    config = request.config
    match config:
        case Slurm():
            return slurm.render(config, request.arguments, request.run_dirs)
        case Kubernetes():
            return kubernetes.render(config, request.arguments)
    count = "one for each CUDA device" if config.processes is None else str(config.processes)
    lines = [f"# processes on this machine: {count}; restarts: {config.max_restarts}"]
    if isinstance(config, Nodes):
        lines.append(f"# machines: {config.nodes}, {config.rendezvous} at {config.address}")
    return "\n".join([*lines, shlex.join(_command(request)), ""])


def _jobs(arguments: Sequence[str], config: Local | None) -> list[Config]:
    """The runs that `train/main.py` would do.

    Raises:
        ConfigError: with every problem of the arguments, also those that the number of processes
            makes, as far as it is known.
    """
    overrides = [text for text in arguments if text not in SWEEP]
    if flags := [text for text in overrides if text.startswith("-")]:
        raise ConfigError(
            f"{flag}: unknown option; there is --dry, -m and --help" for flag in flags
        )
    jobs = check(overrides, multirun=len(overrides) < len(arguments)).jobs
    elastic = isinstance(config, Group) and config.least_nodes < config.most_nodes
    problems = [
        f"with {nodes} machines, {text}" if elastic else text
        for nodes, world_size in _worlds(config).items()
        for job in jobs
        for text in job.problems_on(world_size)
    ]
    changing = elastic or isinstance(config, Slurm | Kubernetes)
    if changing and any(job.run.resume == "never" for job in jobs):
        problems.append(
            "run.resume=never: machines that come later, or come again, would begin the run anew; "
            "choose another run.name, or move the earlier run away yourself"
        )
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return jobs


def _worlds(config: Local | None) -> dict[int, int]:
    """The numbers of ranks that a run may have, by that of machines; empty if not known here."""
    if config is None or config.processes is None:
        return {}
    nodes = range(1, 2)
    if isinstance(config, Group):
        nodes = range(config.least_nodes, config.most_nodes + 1)
    return {count: count * config.processes for count in nodes}


def _meant(problem: str, names: Sequence[str]) -> str:
    """A problem of the training settings, if it looks like one of those of the start, as such."""
    key, unknown, _ = problem.partition(": unknown group or key")
    guess = nearest(key, names) if unknown else None
    return f"{key}: unknown setting{did_you_mean(guess)}" if guess else problem


def _site(path: str) -> list[str]:
    """The settings in a site's file, as arguments.

    Raises:
        ConfigError: it is not there, or not what it should be.
    """
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"site={path}: cannot be read ({error})"]) from error
    if not isinstance(found, dict):
        raise ConfigError([f"site={path}: expected settings, one a line, such as partition: gpu"])
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in found.items()
    ]


def _command(request: Request) -> list[str]:
    script = request.config.script or str(Path(__file__).parent.parent / "train" / "main.py")
    return [sys.executable, "-u", script, *request.arguments]


def _submit(command: Sequence[str], text: str) -> int:
    try:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        problem = f"{command[0]}: not found on this machine; --dry prints what it would be given"
        raise ConfigError([problem], "the machine") from None


def main(texts: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    if {"-h", "--help"} & set(texts):
        print(usage(LAUNCHERS[texts[0]]) if texts[0] in LAUNCHERS else (__doc__ or "").strip())
        return 0
    request = read([text for text in texts if text != "--dry"])
    if "--dry" in texts:
        print(describe(request), end="")
        return 0
    return start(request)


def _run() -> NoReturn:
    try:
        code = main(sys.argv[1:])
    except ConfigError as error:
        refuse(error)
    sys.exit(code)


if __name__ == "__main__":
    _run()
