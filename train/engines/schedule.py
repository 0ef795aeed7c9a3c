"""The learning rate, a pure function of the step."""

from math import cos, pi

from train.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    optim.lr          ......----.
                 ....'           `--.
    final   .''''                    `--.
              warm-up    peak     decay

    `cosine` and `linear` decay from the end of the warm-up on, so they have no peak phase. `wsd`
    (warm-up, stable, decay; arXiv 2404.06395) decays linearly in the last `decay_fraction`.
    """
    return config.optim.lr * _warm_up(config, step) * _decay(config, step)


def _warm_up(config: Config, step: int) -> float:
    """Rises linearly to 1 at the last step of the warm-up. The first step is above 0 already."""
    return min(1.0, (step + 1) / (config.warmup_steps or 1))


def _decay(config: Config, step: int) -> float:
    """Falls from 1 to `final_ratio`, which is reached at the last step of the run."""
    total = config.total_steps
    if config.schedule.kind == "constant" or total is None or config.decay_steps == 0:
        return 1.0
    into = step + 1 - (total - config.decay_steps)
    progress = min(1.0, max(0.0, into / config.decay_steps))
    fall = (1 - cos(pi * progress)) / 2 if config.schedule.kind == "cosine" else progress
    return 1 - (1 - config.schedule.final_ratio) * fall
