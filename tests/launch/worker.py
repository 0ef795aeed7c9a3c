"""A stand-in for a training process: it logs what happens to it, and ends as a test says.

    worker.py DIRECTORY [save=SECONDS] [save_RANK=SECONDS] [deaf] [stuck] [tell=VARIABLE] [talk]

It runs until one of these happens:

- DIRECTORY holds the file `exit` or `exit_RANK`, which contains the exit code;
- a signal comes: all ranks save, which takes SECONDS, and end with 75, or 130 after Ctrl-C. With
  `deaf`, signals are ignored, and each turn of waiting is a byte of DIRECTORY/deaf_turns;
- another rank has died, which is a crash: exit code 1 and a traceback that says so. With `stuck`,
  it does not notice, like one that waits in a collective for ever;
- DIRECTORY holds the file `raise_RANK`: a traceback with what it contains.

Everything that it does is a line of DIRECTORY/log. With `tell`, so is the value of a variable. With
`talk`, it also writes to stdout and stderr.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main(directory: Path, options: list[str]) -> None:
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    keys = ("save", f"save_{rank}")
    seconds = [float(o.partition("=")[2]) for o in options if o.partition("=")[0] in keys]
    received: list[signal.Signals] = []

    def log_line(text: str) -> None:
        with (directory / "log").open("a") as log:
            log.write(f"{rank}/{world_size} {text}\n")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda n, _: received.append(signal.Signals(n)))
    log_line(f"started {os.getpid()}")
    for name in (o.removeprefix("tell=") for o in options if o.startswith("tell=")):
        log_line(f"{name}={os.environ.get(name)}")
    if "talk" in options:
        print(f"rank {rank} on stdout", flush=True)
        print(f"rank {rank} on stderr", file=sys.stderr, flush=True)
    # Every start has a port of its own, so the processes of an earlier start are not seen.
    start = directory / f"start_{os.environ['MASTER_PORT']}"
    start.mkdir(exist_ok=True)
    started = start / f"{rank}_{os.getpid()}"
    started.touch()

    def leave(code: int) -> None:
        started.unlink()  # so that it does not count as dead
        sys.exit(code)

    while True:
        # By their state, and not by signs of life: a busy machine may keep a process from running.
        ranks = list(start.glob("*_*"))
        if "stuck" not in options and len(ranks) == world_size and any(map(is_dead, ranks)):
            raise RuntimeError("Connection closed by peer")
        if (fault := directory / f"raise_{rank}").exists():
            raise ValueError(fault.read_text())
        for file in (directory / "exit", directory / f"exit_{rank}"):
            if file.exists() and (code := file.read_text()):
                leave(int(code))
        if "deaf" not in options and (received or (start / "stop").exists()):
            (start / "stop").mkdir(exist_ok=True)
            log_line(f"received {' '.join(each.name for each in received)}".strip())
            time.sleep(sum(seconds))
            log_line(f"saved {' '.join(each.name for each in received)}".strip())
            leave(130 if signal.SIGINT in received else 75)
        if "deaf" in options:
            with (directory / "deaf_turns").open("ab") as turns:
                turns.write(b".")
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_dead(started: Path) -> bool:
    """Whether the rank with this file has ended without leaving: one that leaves removes it."""
    return not runs(int(started.name.partition("_")[2])) and started.exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
