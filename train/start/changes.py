"""What differs between the settings of a checkpoint and those of the run that goes on from it."""

from typing import Any

from conf.validation import defaults, flatten_keys
from data.fingerprint import changed_settings
from train.config import Config


def changes(saved: dict[str, Any], config: Config) -> dict[str, str]:
    """What differs from a saved configuration, by key, of what may change the training.

    A setting that is newer than the saved configuration had its default then. One that changes
    nothing in this run, such as the chunk of `phd_swa`, may have had any value.
    """
    unused = {problem.key for problem in config.unused()}
    before = {**flatten_keys(defaults(Config)), **flatten_keys(saved)}
    ignored = (
        *("run.", "data.", "tokenizer.", "hooks.", "eval.", "checkpoint."),
        *("model.attention", "train.profile"),
    )
    changed = changed_settings(before, flatten_keys(config.to_dict()))
    return {
        key: line
        for key, line in changed.items()
        if (not key.startswith(ignored) or key.endswith(".epochs")) and key not in unused
    }
