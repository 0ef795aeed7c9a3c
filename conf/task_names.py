"""The names of the downstream tasks whose questions `make eval-data` puts on this machine."""

from typing import Literal, get_args

OlmoTask = Literal[
    "olmo_arc_easy",
    "olmo_arc_challenge",
    "olmo_hellaswag",
    "olmo_piqa",
    "olmo_winogrande",
    "olmo_csqa",
    "olmo_mmlu_var",
    "olmo_mmlu",
]
OLMO = "olmo_"
"""How their names begin; lm-evaluation-harness has none of these."""

OLMO_TASKS: tuple[OlmoTask, ...] = get_args(OlmoTask)

PAPER = "paper"
"""The name of the seven tasks of arXiv 2504.14992, section 3.1."""

PAPER_TASKS = OLMO_TASKS[:7]

MOST_SHOTS = 5
"""Solved examples that there are in front of each question."""


def without_paper(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, each once, with the paper's seven in place of `paper`.

    >>> without_paper(("olmo_piqa", "paper"))[:3]
    ('olmo_piqa', 'olmo_arc_easy', 'olmo_arc_challenge')
    """
    named = (PAPER_TASKS if name == PAPER else (name,) for name in names)
    return tuple(dict.fromkeys(name for names in named for name in names))
