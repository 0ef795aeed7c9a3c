"""A stand-in for a training process: it tells what happens to it, and ends as it is told.

    worker.py DIRECTORY [save=SECONDS] [save_RANK=SECONDS] [deaf]

It runs until DIRECTORY holds `exit` (the exit code is in it) or `exit_RANK`, until a signal comes,
after which all ranks save and end with 75, or until another rank has gone without ending.
Everything it does is a line of DIRECTORY/log. With `deaf` it ignores signals.
"""

import os
import signal
import sys
import time
from pathlib import Path

DEAD_S = 1.0  # a rank that has given no sign of life for so long fails the others' collectives


def main(place: Path, options: list[str]) -> None:
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    keys = ("save", f"save_{rank}")
    seconds = [float(o.partition("=")[2]) for o in options if o.partition("=")[0] in keys]
    is_set: list[signal.Signals] = []

    def tell(text: str) -> None:
        with (place / "log").open("a") as log:
            log.write(f"{rank}/{world_size} {text}\n")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda n, _: is_set.append(signal.Signals(n)))
    tell(f"started {os.getpid()}")
    life = place / f"life_{os.environ['MASTER_PORT']}"  # of one round of processes
    life.mkdir(exist_ok=True)

    def leave(code: int) -> None:
        (life / rank).unlink()  # nobody takes it for dead
        sys.exit(code)

    while True:
        (life / rank).touch()
        now = time.time()
        alive = [file for file in life.iterdir() if file.name != "stop"]
        if len(alive) == world_size and any(now - f.stat().st_mtime > DEAD_S for f in alive):
            sys.exit(1)
        for order in (place / "exit", place / f"exit_{rank}"):
            if order.exists() and (code := order.read_text()):
                leave(int(code))
        if "deaf" not in options and (is_set or (life / "stop").exists()):
            (life / "stop").mkdir(exist_ok=True)
            tell(f"asked {' '.join(each.name for each in is_set)}".strip())
            time.sleep(sum(seconds))
            tell(f"saved {' '.join(each.name for each in is_set)}".strip())
            leave(130 if signal.SIGINT in is_set else 75)
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
