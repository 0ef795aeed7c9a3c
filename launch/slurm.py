"""The batch job of a run under SLURM: one agent on each machine, requeued after exit code 75."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from conf import checkout
from conf.exit_codes import ExitCode
from launch.config import Check, Slurm, passed_on

UNITS = {"s": "0:00:{}", "m": "{}", "h": "{}:00:00", "d": "{}-00"}

# `srun` passes signals on to the agents, and they pass them on to the processes.
BODY = """\
# Texts of the user's stand in quotes, so that the shell leaves a dollar in them alone.
# shellcheck disable=SC2016
set -euo pipefail

# SLURM does not create the directory of a job's output. `bash THIS_FILE` does, and submits the job.
mkdir -p {log_dir}
if [[ -z ${{SLURM_JOB_ID:-}} ]]; then
  exec sbatch "$0"
fi
{setup}{checkout}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${{machines[0]}}:$((20000 + SLURM_JOB_ID % 10000))"
rank_log={rank_log}
rank_log=${{rank_log//%x/$SLURM_JOB_NAME}}
rank_log=${{rank_log//%j/$SLURM_JOB_ID}}
mkdir -p "$(dirname "$rank_log")"

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

# Runs a command on every machine, and sets `code` to how it ended.
# A signal ends `wait`, but not the step. So it is passed on, and the step is waited for again.
run_step() {{
  srun "${{step[@]}}" "$@" &
  running=$!
  trap 'signalled=yes; kill -s TERM "$running" || true' TERM
  trap 'signalled=yes; kill -s USR1 "$running" || true' USR1
  trap 'signalled=yes; kill -s USR2 "$running" || true' USR2
  signalled=yes
  while [[ $signalled ]]; do
    signalled=
    code=0
    wait "$running" || code=$?
  done
}}

before=$(progress)
code=0
{preflight}if ((code == 0)); then
  run_step "${{command[@]}}"
fi

# Saved and ended early, or a server or disk failed for now: the job goes back into the queue,
# unless it was cancelled or makes no progress.
stalls_file={log_dir}/$SLURM_JOB_ID.stalls
if ((code != {saved})); then
  rm -f "$stalls_file"
  exit "$code"
fi
stalls=0
if [[ $(progress) == "$before" ]]; then
  # A loss of power may have left the file empty, or with anything in it.
  [[ ! -e $stalls_file ]] || stalls=$(tr -cd 0-9 <"$stalls_file" | head -c 6)
  stalls=$((10#0$stalls + 1))
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

# What each machine runs before the agent. It names the machine on which it fails.
NODE_SETUP = """\
failed() {{
  code=$?
  echo "launch: node_setup, venv or conda failed on $(hostname)" >&2
  exit $((code ? code : 1))
}}
trap failed EXIT
set -e
{lines}
set +e
trap - EXIT
exec "$@"\
"""

PREFLIGHT = """\
preflight=(
{command}
)
run_step "${{preflight[@]}}"
if ((code != 0 && code != {saved})); then
  echo "launch: the pre-flight check failed; options=--exclude=HOST leaves a machine out" >&2
fi
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
    preflight = PREFLIGHT.format(
        command=_lines(_check(config, arguments)), saved=int(ExitCode.REQUEUE)
    )
    body = BODY.format(
        checkout=_checkout(),
        setup="".join(f"\n{part}\n" for part in _setup(config)),
        command=_lines(_train(config, arguments)),
        step=_lines(_step(config)),
        checkpoints=_lines(directories or [str(run / "checkpoints") for run in run_dirs]),
        log_dir=shlex.quote(str(config.log_dir)),
        rank_log=shlex.quote(config.rank_log or f"{config.logs}/%x-%j/rank_%t.log"),
        saved=int(ExitCode.REQUEUE),
        stalls=config.stalls,
        preflight=preflight if config.preflight else "",
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
    for name in ("mem", "partition", "account", "qos", "chdir"):
        if value := getattr(config, name):
            yield f"--{name}={value}"
    if config.exclusive:
        yield "--exclusive"
    if config.time:
        yield f"--time={_limit(config.time)}"
    yield f"--signal=USR1@{config.signal_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={config.logs}/%x-%j.log"
    if config.is_elastic:
        yield "--no-kill"  # a dead machine does not end the job
    yield from filter(None, map(str.strip, config.options.splitlines()))


def _setup(config: Slurm) -> Iterator[str]:
    """What the script does before anything starts."""
    if config.env:
        yield "\n".join(f"export {name}={_quoted(value)}" for name, value in config.env.items())
    if config.setup.strip():
        yield config.setup.strip()


def _step(config: Slurm) -> Iterator[str]:
    """The options of srun."""
    yield from ("--ntasks-per-node=1", "--kill-on-bad-exit=0", "--cpu-bind=none")
    # Some clusters are set up so that a step gets no variables of the job.
    yield "--export=ALL"
    if config.cpus:
        yield f"--cpus-per-task={config.cpus * (config.processes or 1)}"
    if config.is_elastic:
        yield "--no-kill"
    if config.container and config.runtime == "pyxis":
        yield f"--container-image={config.container}"
        yield Shell('"--container-workdir=$PWD"')
        mounts = f",{config.mounts}" if config.mounts else ""
        yield Shell(f'"--container-mounts=$PWD:$PWD{mounts}"')
        if config.env:  # else the image's own values of these variables would win
            yield f"--container-env={','.join(config.env)}"


def _train(config: Slurm, arguments: Sequence[str]) -> Iterator[str]:
    """The command of each machine: an agent with the training processes."""
    yield from _python(config)
    yield from ("-m", "launch", "nodes")
    yield from (Shell('"address=$address"'), Shell('"id=$SLURM_JOB_ID"'))
    yield Shell('"rank_log=$rank_log"')
    yield from passed_on(replace(config, rank_log=None))
    yield from arguments


def _check(config: Slurm, arguments: Sequence[str]) -> Iterator[str]:
    """The command of each machine that checks them all before the training starts."""
    yield from _python(config)
    yield from ("-m", "launch", "check")
    # A port of its own: the training may start before this one is free again.
    port = "$((10000 + SLURM_JOB_ID % 10000))"
    yield from (Shell(f'"address=${{machines[0]}}:{port}"'), Shell('"id=$SLURM_JOB_ID"'))
    yield from passed_on(config, to=Check)
    yield from arguments


def _python(config: Slurm) -> Iterator[str]:
    """What each machine runs, up to the Python interpreter."""
    if config.container and config.runtime == "apptainer":
        yield from ("apptainer", "exec")
        if config.gres:
            yield "--nv"
        yield from ("--pwd", Shell('"$PWD"'), "--bind")
        mounts = f",{config.mounts}" if config.mounts else ""
        yield Shell(f'"$PWD:$PWD{mounts}"')
        yield config.container
    if lines := "\n".join(_node_setup(config)):
        yield from ("bash", "-c", NODE_SETUP.format(lines=lines), "launch")
    own = config.container or config.venv or config.conda
    yield config.python or ("python" if own else sys.executable)


def _node_setup(config: Slurm) -> Iterator[str]:
    """The lines that every machine runs first."""
    if config.node_setup.strip():
        yield config.node_setup.strip()
    if config.venv:
        yield f"source {shlex.quote(f'{config.venv}/bin/activate')}"
    if config.conda:  # a shell that is not interactive does not know `conda activate`
        yield 'eval "$("${CONDA_EXE:-conda}" shell.bash hook)"'
        yield f"conda activate {shlex.quote(config.conda)}"


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
