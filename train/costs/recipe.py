"""What the size of a run sets besides the model, in words."""

from typing import Any

from conf.errors import spelled
from conf.validation import flatten_keys
from train.conf_files import recipe_of
from train.config import Config


def describe_recipe(config: Config) -> str:
    """What the run's size sets besides the model; empty if nothing.

    A size from 151m on chooses a recipe, and with it the learning rate, the batch, the length and
    more. Of these settings, the run may have replaced some.
    """
    recipe = recipe_of(config.model.size)
    if recipe is None:
        return ""
    now = flatten_keys(config.to_dict())
    kept = [key for key, value in recipe.settings.items() if now[key] == value]
    replaced = [
        f"{key}={_short(now[key])} (recipe: {_short(value)})"
        for key, value in recipe.settings.items()
        if now[key] != value
    ]
    chosen = f"size={config.model.size} chose recipe={recipe.name}"
    text = f"{chosen}; they set {', '.join(f'{key}={_short(now[key])}' for key in kept)}"
    return text + (f"; this run replaces: {', '.join(replaced)}" if replaced else "")


def _short(value: Any) -> str:
    """A value as it could be typed; large integers with an exponent.

    >>> _short(300_000_000_000), _short(1024), _short(3e-4), _short(None)
    ('3e11', '1024', '0.0003', 'null')
    """
    if isinstance(value, int) and value >= 1_000_000:
        return f"{float(value):g}".replace("e+0", "e").replace("e+", "e")
    return spelled(value)
