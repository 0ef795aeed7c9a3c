"""What is probably not intended in a run, told from its plan."""

import shutil

from conf.wording import byte_size, short_count, two_digits
from train.config import Config
from train.costs.plan import Plan
from train.engines.memory import FITS

CHINCHILLA = 20
"""Tokens per parameter that are optimal for a compute budget (arXiv 2203.15556)."""

MOST_EPOCHS = 4
"""Text that is read more often teaches ever less than new text would (arXiv 2305.16264)."""


def warnings_of(plan: Plan) -> tuple[str, ...]:
    """Settings that are probably not intended, each with what to do."""
    return (*_size_warnings(plan), *_text_warnings(plan), *_odd(plan))


def _size_warnings(plan: Plan) -> list[str]:
    """Of memory, disk and length."""
    found = []
    share = FITS[plan.target.kind]
    if plan.target.memory is not None and plan.memory.total > share * plan.target.memory:
        found.append(
            f"needs about {byte_size(plan.memory.total)}, {plan.target.name} has "
            f"{byte_size(plan.target.memory)}, of which a step should take at most {share:.0%}: "
            "lower train.micro_batch or train.seq_len, or choose a smaller size"
        )
    free = _free_disk(plan.config) if plan.target.is_here else None
    if free is not None and plan.disk.total is not None and plan.disk.total > free:
        found.append(
            f"the checkpoints need {byte_size(plan.disk.total)} of disk, {plan.config.run_dir} has "
            f"{byte_size(free)} left: lower checkpoint.keep or raise checkpoint.keep_every, or "
            "choose another run.dir"
        )
    parameters = sum(plan.parameters.values())
    # A tenth of a token per parameter is 200 times less than optimal; probably a setting is wrong.
    if plan.tokens is not None and plan.tokens < 0.1 * parameters:
        found.append(
            f"{plan.tokens / parameters:.2f} tokens per parameter: the model will hardly have "
            f"begun to learn; about {CHINCHILLA} are compute-optimal"
        )
    return found


def _free_disk(config: Config) -> int | None:
    """Bytes that are left where the run's directory is, or will be."""
    path = config.run_dir.absolute()
    try:
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
    except OSError:
        return None


def _text_warnings(plan: Plan) -> list[str]:
    """Of sources that are read too often, or end before the run does."""
    found = []
    for name, epochs in plan.epochs.items():
        limit, drawn = plan.config.data.sources[name].epochs, short_count(plan.drawn[name])
        if limit is not None and epochs > limit:
            found.append(
                f"data.sources.{name}.epochs={limit}: its text ends after about "
                f"{short_count(plan.drawn[name] * limit / epochs)} tokens of the {drawn} that the "
                "run would read of it"
            )
        elif epochs > MOST_EPOCHS:
            found.append(
                f"data.sources.{name}: the run reads {drawn} tokens of it, which is all of it "
                f"{two_digits(epochs)} times; what is read more than {MOST_EPOCHS} times teaches "
                "little: add text, or make the run shorter"
            )
    return found


def _odd(plan: Plan) -> list[str]:
    """Of settings that make no difference, or a bad one."""
    config, model, train = plan.config, plan.config.model, plan.config.train
    found = []
    if model.variant == "phd_cswa" and model.window > model.chunk:
        found.append(
            f"model.window={model.window} reaches past model.chunk={model.chunk}: "
            "the chunk limits it"
        )
    if model.chunk_tokens is not None and model.chunk_tokens >= train.seq_len:
        found.append(f"model.chunk={model.chunk} covers the whole row: this is the same as phd_swa")
    if model.K == 1 and model.variant != "vanilla":
        found.append(f"model.K=1: {model.variant} with one copy is vanilla")
    found += [
        f"data.phases.{name}.after_tokens={phase.after_tokens}: begins after the run's "
        f"{plan.tokens} tokens"
        for name, phase in config.data.phases.items()
        if plan.tokens is not None and phase.after_tokens >= plan.tokens
    ]
    # The default run of the tiny size trains at 0.003; common peak rates are below 0.003. The
    # smallest rung of the ladder has 0.0242, at which 120 steps of it went as at 0.006.
    if config.optim.lr > 0.025:
        found.append(f"optim.lr={config.optim.lr}: AdamW diverges at such rates")
    if config.checkpoint.every == 0:
        found.append("checkpoint.every=0: a crash loses everything; only the end is saved")
    return found
