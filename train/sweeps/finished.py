"""Whether a run of a sweep has finished already, which is told without opening it."""

from conf.errors import DataError
from conf.validation import flatten_keys
from conf.wording import plural
from train.config import Config
from train.experiments.result import FILE, read_result
from train.run_dir.name import holds
from train.start.trunk import decays_of


def finished(config: Config) -> str | None:
    """How long this very run was; None if it has to be opened to find out what is left to do.

    A trunk that trains its decays has finished when they have, too.
    """
    decays = decays_of(config) if config.run.decays else []
    done = finished_itself(config)
    if done is None or any(finished_itself(decay) is None for decay in decays):
        return None
    return f"{done}, and {plural(len(decays), 'decay')}" if decays else done


def finished_itself(config: Config) -> str | None:
    """The same of a run alone, without the decays of a trunk.

    Its result counts, which is written last: after the last step, its checkpoint and its
    evaluation. It is not passed over if it is to be longer, begun anew, or evaluated otherwise.
    """
    if config.run.resume == "never" or config.total_steps is None:
        return None
    try:
        result = read_result(config.run_dir / FILE)
    except (OSError, DataError):  # none yet; or it is made again when the run is opened
        return None
    asked = flatten_keys({"eval": config.to_dict()["eval"]})
    same = all(result.settings.get(key) == value for key, value in asked.items())
    long_enough = result.status == "finished" and result.steps >= config.total_steps
    if not (same and long_enough and holds(config.run_dir, config)):
        return None
    return plural(result.steps, "step")
