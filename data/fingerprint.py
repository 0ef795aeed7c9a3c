"""What two descriptions of the same data differ in."""

from collections.abc import Mapping
from math import inf
from typing import Any

from conf.errors import ConfigError, Problem, spelled
from conf.redaction import redacted_tree

MIXTURE = "data.sources.*.weight and data.phases"
"""The key of the weights in a fingerprint: [[token from which they apply, weight by source]]."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each setting that has changed, by the setting.

    >>> changed_settings({"seed": 0, "data.lanes": 8}, {"seed": 0, "data.lanes": 4})
    {'data.lanes': 'data.lanes was 8 and is now 4'}
    """
    return {
        key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    }


def check_fingerprint(
    saved: Mapping[str, Any], now: Mapping[str, Any], tokens_read: float = inf
) -> list[str]:
    """Make sure that cursors which were saved with one fingerprint are valid with another.

    Args:
        tokens_read: the token of the run up to which text was read. Weights that apply from a
            later token on may change, and sources that have had no weight so far.

    Returns:
        a sentence for each of those changes.

    Raises:
        ConfigError: they differ otherwise; each problem is a setting.
    """
    # Versions before the first wrote URLs with their passwords and signatures.
    saved = redacted_tree(saved)
    forbidden = changed_settings(_used(saved, tokens_read), _used(now, tokens_read))
    problems = [
        Problem(key, now.get(key), f"was {spelled(saved.get(key))} when this run began", hint)
        for key in forbidden
        for hint in [_remedy(key, tokens_read)]
    ]
    if problems:
        raise ConfigError(problems, "the data of a run that goes on")
    return [line for key, line in changed_settings(saved, now).items() if key not in forbidden]


def _remedy(key: str, tokens_read: float) -> str:
    later = f" (what applies after token {tokens_read:,} may change)"
    restore = "restore it" + (later if key == MIXTURE and tokens_read < inf else "")
    return f"{restore}, or start a new run with another run.name"


def _used(fingerprint: Mapping[str, Any], tokens_read: float) -> dict[str, Any]:
    """The part of a fingerprint that has decided something about the first `tokens_read` tokens.

    >>> mixture = [[0, {"web": 1, "books": 0}], [900, {"web": 1, "books": 3}]]
    >>> _used({"data.sources.web": "a", "data.sources.books": "b", MIXTURE: mixture}, 500)
    {'data.sources.web': 'a', 'data.sources.*.weight and data.phases': [[0, {'web': 1}]]}
    """
    if tokens_read == inf or MIXTURE not in fingerprint:
        return dict(fingerprint)
    mixture = [
        [start, {name: weight for name, weight in weights.items() if weight}]
        for start, weights in fingerprint[MIXTURE]
        if start <= tokens_read
    ]
    unused = {name for _, weights in fingerprint[MIXTURE] for name in weights}
    unused -= {name for _, weights in mixture for name in weights}
    return {
        key: mixture if key == MIXTURE else value
        for key, value in fingerprint.items()
        # `data.sources.<name>`, and for some kinds of sources `data.sources.<name>.<setting>`
        if not (key.startswith("data.sources.") and key.split(".")[2] in unused)
    }
