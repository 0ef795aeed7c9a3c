"""Whether two runs were evaluated on the same text, so that their losses can be compared."""

from collections.abc import Mapping
from typing import Any

from train.experiments.result import Heldout, Result

LOADING = (
    "data.workers",
    "data.prefetch",
    "data.remote.",
    "data.cache.",
    "data.max_quarantined",
    "tokenizer.cache_dir",
)
"""How the settings of data begin that change no text."""


def same_text(one: Result, other: Result, source: str | None) -> bool:
    """Whether the losses of two runs on a source are of the same text.

    The fingerprints of their held-out rows tell it. Where a run of an earlier version has none,
    all must be equal that the rows depend on, as far as it is known.

    Args:
        source: the name of the held-out text; None: the training loss.
    """
    mine, theirs = (run.heldout.get(source) if source else None for run in (one, other))
    if mine and theirs and mine.fingerprint and theirs.fingerprint:
        return mine.fingerprint == theirs.fingerprint
    if mine and theirs and not _as_much(mine, theirs):
        return False
    return _origin(one, heldout=bool(source)) == _origin(other, heldout=bool(source))


def same_texts(one: Result, other: Result) -> bool:
    """Whether two runs were evaluated on the same text of each source that both have."""
    return all(same_text(one, other, source) for source in one.heldout.keys() & other.heldout)


def _as_much(one: Heldout, other: Heldout) -> bool:
    """Whether as much text was read, where both tell it."""
    counts = ((getattr(found, name) for found in (one, other)) for name in ("bytes", "documents"))
    return all(a == b for a, b in counts if a is not None and b is not None)


def _origin(run: Result, *, heldout: bool) -> Mapping[str, Any]:
    """The settings that the text and its tokens come from."""
    rows = ("eval.rows", "train.seq_len") if heldout else ()
    found = {
        key: value
        for key, value in run.settings.items()
        if key in rows or (key.startswith(("data.", "tokenizer.")) and not key.startswith(LOADING))
    }
    if any(key.endswith(".kind") and value == "python" for key, value in found.items()):
        found["python"] = run.versions.get("python")  # its standard library is the text
    return found
