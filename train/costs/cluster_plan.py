"""The plan of a run for a cluster: the meshes that fit, the one to take, and what failures cost."""

from dataclasses import dataclass
from math import inf
from typing import Any

from conf.errors import ConfigError, Problem
from conf.validation import as_dict
from train.config import Config
from train.costs.cluster import ClusterConfig
from train.costs.disk import checkpoint_disk
from train.costs.failures import DAY_S, Failures, Saving, best_interval_s, failures_of, saving_of
from train.costs.layouts import Layout, Layouts, find_layouts
from train.settings.engine import FsdpConfig

PARTS = ("gather", "scatter", "reduce", "context", "tensor")
"""The communication of a step, as `StepTime` names it."""


@dataclass(frozen=True)
class ClusterPlan:
    """What a cluster makes of a run.

    Attributes:
        name: of the cluster, as the user gives it.
        cluster: the machines.
        layouts: the meshes, the fastest first.
        tokens: of the run; None if only `train.max_time` ends it.
        saving: a checkpoint on the recommended mesh.
        failures: at the configured interval between checkpoints.
        young_s, daly_s: the intervals that lose the least.
    """

    name: str
    cluster: ClusterConfig
    layouts: Layouts
    tokens: int | None
    saving: Saving
    failures: Failures
    young_s: float
    daly_s: float

    @property
    def best(self) -> Layout:
        """The recommended mesh: of those that fit, the one with the shortest step."""
        return self.layouts.fitting[0]

    @property
    def daly_steps(self) -> int:
        """Daly's interval as `checkpoint.every`; 0 where nothing is expected to fail."""
        return 0 if self.daly_s == inf else max(1, round(self.daly_s / self.best.time.total))

    @property
    def at_daly(self) -> Failures:
        """What is lost with that interval."""
        return failures_of(self.saving, self.cluster, self.daly_s)

    @property
    def of_each_kind(self) -> list[Layout]:
        """The fastest mesh of each kind."""
        kinds: dict[str, Layout] = {}
        for layout in self.layouts.fitting:
            kinds.setdefault(layout.name, layout)
        return list(kinds.values())

    def days(self, layout: Layout) -> float | None:
        """Of training alone; None if the run's length is not known."""
        return None if self.tokens is None else self.tokens / layout.tokens_per_s / DAY_S

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        best, at_daly, longer = self.best, self.at_daly, 1 + self.failures.cost
        days = self.days(best)
        return {
            "name": self.name,
            "settings": as_dict(self.cluster),
            "meshes": [self._layout(layout) for layout in self.layouts.fitting],
            "too_large": self.layouts.too_large,
            "uneven": self.layouts.uneven,
            "recommended": best.settings,
            "why": reasons(self),
            "checkpoint": self.saving._asdict(),
            "failures": _finite(self.failures._asdict()),
            "days_with_failures": None if days is None else _or_none(days * longer),
            "proposed": {
                "young_s": _or_none(self.young_s),
                "daly_s": _or_none(self.daly_s),
                "checkpoint.every": self.daly_steps,
                "cost": _or_none(at_daly.cost),
            },
        }

    def _layout(self, layout: Layout) -> dict[str, Any]:
        time, days = layout.time, self.days(layout)
        return {
            "kind": layout.name,
            "replicate": layout.dims.replicate,
            "shard": layout.dims.shard,
            "context": layout.dims.context,
            "tensor": layout.dims.tensor,
            "micro_batch": layout.config.micro_batch_on(self.cluster.ranks),
            "activation_checkpointing": layout.config.engine.activation_checkpointing,
            "settings": layout.settings,
            "memory": {"total": layout.memory.total, **layout.memory._asdict()},
            "step_s": {"total": time.total, **time._asdict(), "hidden": time.hidden},
            "tokens_per_s": layout.tokens_per_s,
            "mfu": layout.mfu,
            "days": days,
            "device_hours": None if days is None else days * 24 * self.cluster.ranks,
        }


def plan_cluster(name: str, cluster: ClusterConfig, config: Config) -> ClusterPlan:
    """Lay a run out on a cluster.

    Raises:
        ConfigError: it is not for these devices or this engine, or fits on no mesh.
    """
    if problems := _problems(name, cluster, config):
        raise ConfigError(problems)
    layouts = find_layouts(config, cluster)
    if not layouts.fitting:
        reason = (
            f"none of {layouts.too_large + layouts.uneven} meshes of its {cluster.ranks} ranks "
            f"fits: on {layouts.too_large} a step needs more than a device's memory, and "
            f"{layouts.uneven} do not divide train.global_batch={config.train.global_batch} rows"
        )
        hint = "choose a smaller size, a shorter train.seq_len, or another cluster"
        raise ConfigError([Problem("cluster", name, reason, hint, ("train.seq_len", "model"))])
    best = layouts.fitting[0]
    size = checkpoint_disk(config, config.parameters).checkpoint
    saving = saving_of(size, best.dims.shards * best.dims.tensor, cluster)
    every = config.checkpoint.every
    interval = every * best.time.total if every else inf
    failures = failures_of(saving, cluster, interval)
    return ClusterPlan(
        name, cluster, layouts, _tokens(config), saving, failures, *best_interval_s(saving, cluster)
    )


def _problems(name: str, cluster: ClusterConfig, config: Config) -> list[Problem]:
    """Why a run is not for a cluster."""
    found, engine = [], config.engine
    if not isinstance(engine, FsdpConfig):
        reason, hint = "cluster= lays out PyTorch's own engine", "leave engine=deepspeed out"
        found.append(Problem("engine.kind", engine.kind, reason, hint, ("cluster",)))
    if engine.device not in ("auto", cluster.kind):
        reason = f"the devices of cluster={name} are {cluster.device}"
        found.append(Problem("engine.device", engine.device, reason, "leave it out", ("cluster",)))
    return found


def _tokens(config: Config) -> int | None:
    steps = config.total_steps
    return None if steps is None else steps * config.train.tokens_per_step


def reasons(plan: ClusterPlan) -> list[str]:
    """Why the recommended mesh is that, and what the fastest of each other kind loses by."""
    best, count = plan.best, len(plan.layouts.fitting)
    time = best.time
    share = time.exposed / time.total
    why = f"has the shortest step of the {count} that fit, of which {share:.1%} is exposed"
    found = [f"{best.name} {best.shape} {why} communication"]
    for other in plan.of_each_kind:
        if other is not best:
            slower = other.time.total / time.total - 1
            found.append(f"{other.name} {other.shape} is {slower:.1%} slower: {_loss(other, best)}")
    return found


def _loss(other: Layout, best: Layout) -> str:
    """The part of a step that makes a mesh slower than the best one."""
    mine, its = other.time, best.time
    parts = {
        "products of smaller matrices": mine.products - its.products,
        "computing again": mine.attention + mine.other - its.attention - its.other,
        "the optimizer on fewer shards": mine.optimizer - its.optimizer,
        "communication that nothing hides": mine.exposed - its.exposed,
    }
    name, seconds = max(parts.items(), key=lambda part: part[1])
    if name == "communication that nothing hides":
        most = max(PARTS, key=lambda part: getattr(mine, part) - getattr(its, part))
        words = {
            "gather": "all-gathers of weights",
            "scatter": "reduce-scatters of gradients",
            "reduce": "all-reduces of gradients",
            "context": "keys and values of other ranks",
            "tensor": "activations of tensor ranks",
        }
        name = f"{name}, most of it {words[most]}"
    return f"{1000 * seconds:,.0f} ms for {name}"


def _or_none(value: float) -> float | None:
    return None if value == inf else value


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in values.items()}
