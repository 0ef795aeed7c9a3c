"""The learning rate, a pure function of the step."""

from math import cos, pi

from train.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step` (0 is the first).

    optim.lr          ......----.
                 ....'           `--.            cosine and linear fall from the warm-up's
    final   .''''                    `--.        end, wsd in the last `decay_fraction`
              warm-up    peak     decay
    """
    return config.optim.lr * _warm_up(config, step) * _decay(config, step)


def _warm_up(config: Config, step: int) -> float:
    """Rises linearly; the first step is already above 0, the last of the warm-up is at 1."""
    return min(1.0, (step + 1) / (config.warmup_steps or 1))


def _decay(config: Config, step: int) -> float:
    """Falls from 1 to `final_ratio`, which the run's last step reaches."""
    total = config.train.total_steps
    if config.schedule.kind == "constant" or total is None or config.decay_steps == 0:
        return 1.0
    into = step + 1 - (total - config.decay_steps)
    progress = min(1.0, max(0.0, into / config.decay_steps))
    fall = (1 - cos(pi * progress)) / 2 if config.schedule.kind == "cosine" else progress
    return 1 - (1 - config.schedule.final_ratio) * fall
