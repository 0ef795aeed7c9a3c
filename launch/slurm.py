"""The batch job of a run under SLURM: one agent on each machine, requeued after exit code 75."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from conf import checkout
from conf.exit_codes import ExitCode
from launch.config import Slurm, passed_on

UNITS = {"s": "0:00:{}", "m": "{}", "h": "{}:00:00", "d": "{}-00"}

# `srun` passes signals on to the agents, and they pass them on to the processes.
BODY = """\
set -euo pipefail
{setup}{checkout}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${{machines[0]}}:$((20000 + SLURM_JOB_ID % 10000))"

command=(
{command}
)
step=(
{step}
)
checkpoints=(
{checkpoints}
)

progress() {{
  find "${{checkpoints[@]}}" -mindepth 1 -maxdepth 1 -name 'step_*' 2>/dev/null | sort || true
}}

before=$(progress)
srun "${{step[@]}}" "${{command[@]}}" &
running=$!
# A signal ends `wait`, but not the step. So it is passed on, and the step is waited for again.
trap 'signalled=yes; kill -s TERM "$running" || true' TERM
trap 'signalled=yes; kill -s USR1 "$running" || true' USR1
trap 'signalled=yes; kill -s USR2 "$running" || true' USR2
signalled=yes
while [[ $signalled ]]; do
  signalled=
  code=0
  wait "$running" || code=$?
done

# Saved and ended early, or a server or disk failed for now: the job goes back into the queue,
# unless it was cancelled or makes no progress.
stalls_file={logs}/$SLURM_JOB_ID.stalls
if ((code != {saved})); then
  rm -f "$stalls_file"
  exit "$code"
fi
stalls=0
if [[ $(progress) == "$before" ]]; then
  [[ ! -e $stalls_file ]] || stalls=$(<"$stalls_file")
  stalls=$((stalls + 1))
fi
echo "$stalls" >"$stalls_file"
if ((stalls >= {stalls})); then
  echo "launch: $stalls starts in a row ended early without a new checkpoint; not queued again" >&2
elif [[ $(scontrol show job -o "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then
  echo "launch: the job was cancelled or is queued again by SLURM; not queued again" >&2
else
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class Shell(str):
    """A word with shell variables, which only the running script knows; it is not quoted."""


def render(config: Slurm, arguments: Sequence[str], run_dirs: Sequence[Path]) -> str:
    """The script for `sbatch`; running it is running the job.

    Args:
        config: the job.
        arguments: of the training command.
        run_dirs: the directories of its runs; a new checkpoint in them is progress.
    """
    directories = config.checkpoints.split("\n") if config.checkpoints else []
    body = BODY.format(
        checkout=_checkout(),
        setup=f"\n{config.setup.strip()}\n" if config.setup.strip() else "",
        command=_lines(_command(config, arguments)),
        step=_lines(_step(config)),
        checkpoints=_lines(directories or [str(run / "checkpoints") for run in run_dirs]),
        logs=shlex.quote(config.logs),
        saved=int(ExitCode.REQUEUE),
        stalls=config.stalls,
    )
    header = "".join(f"#SBATCH {option}\n" for option in _options(config))
    return f"#!/bin/bash\n{header}\n{body}"


def _checkout() -> str:
    """Has the job import the modules of this checkout, wherever it is started."""
    if not checkout.checkout_of(checkout.ROOT):
        return ""
    return f"\nexport PYTHONPATH={shlex.quote(str(checkout.ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}\n"


def _options(config: Slurm) -> Iterator[str]:
    """The options of sbatch."""
    yield f"--job-name={config.name}"
    yield f"--nodes={config.most_nodes}"
    yield "--ntasks-per-node=1"
    if config.gres:
        yield f"--gres={config.gres}:{config.processes}"
    if config.cpus:
        yield f"--cpus-per-task={config.cpus * (config.processes or 1)}"
    for name in ("partition", "account", "qos"):
        if value := getattr(config, name):
            yield f"--{name}={value}"
    if config.time:
        yield f"--time={_limit(config.time)}"
    yield f"--signal=USR1@{config.signal_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={config.logs}/%x-%j.log"
    if config.least_nodes < config.most_nodes:
        yield "--no-kill"  # a dead machine does not end the job
    yield from filter(None, map(str.strip, config.options.splitlines()))


def _step(config: Slurm) -> Iterator[str]:
    """The options of srun."""
    yield from ("--ntasks-per-node=1", "--kill-on-bad-exit=0", "--cpu-bind=none")
    if config.cpus:
        yield f"--cpus-per-task={config.cpus * (config.processes or 1)}"
    if config.least_nodes < config.most_nodes:
        yield "--no-kill"
    if config.container:
        yield f"--container-image={config.container}"
        yield Shell('"--container-workdir=$PWD"')
        mounts = f",{config.mounts}" if config.mounts else ""
        yield Shell(f'"--container-mounts=$PWD:$PWD{mounts}"')


def _command(config: Slurm, arguments: Sequence[str]) -> Iterator[str]:
    python = config.python or ("python" if config.container else sys.executable)
    yield from (python, "-m", "launch", "nodes")
    yield from (Shell('"address=$address"'), Shell('"id=$SLURM_JOB_ID"'))
    yield from passed_on(config)
    yield from arguments


def _lines(words: Iterator[str] | Sequence[str]) -> str:
    """The words of an array, one a line."""
    return "\n".join(f"  {w if isinstance(w, Shell) else _quoted(w)}" for w in words)


def _quoted(word: str) -> str:
    """A word in quotes, where it needs them or (for shellcheck) has a comma in it."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted


def _limit(time: str) -> str:
    """A time in SLURM's form.

    >>> _limit("90m"), _limit("12h"), _limit("2d"), _limit("1-12:00:00")
    ('90', '12:00:00', '2-00', '1-12:00:00')
    """
    return UNITS[time[-1]].format(time[:-1]) if time[-1] in UNITS else time
