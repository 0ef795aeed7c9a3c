"""The machines that a run is planned for: `conf/cluster/`, or a YAML file of the user's own."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.errors import ConfigError, Problem, reason_of
from conf.settings import Settings, above, at_least
from conf.validation import build, closest, did_you_mean
from train.conf_files import CLUSTERS, CONF, choices
from train.engines.accelerators import ACCELERATORS, Accelerator, accelerator

ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class RatesConfig(Settings):
    """What one device computes and copies, measured on large pieces of work.

    Attributes:
        product_tflops: of a large matrix product in the dtype of training, TFLOP/s.
        attention_tflops: of causal attention, forward and backward together, by the FLOPs that the
            pattern needs (no score counts twice), TFLOP/s.
        memory_gb_per_s: bytes read plus written by a copy within the device's memory, GB/s. Norms,
            activations and the optimizer go at this speed.
        sustained: the part of these rates that whole steps reach, day after day: clocks fall under
            load, kernels have gaps, the kernels of collectives take cores, ranks wait for the
            slowest.
    """

    product_tflops: float
    attention_tflops: float
    memory_gb_per_s: float
    sustained: float = 1.0

    def problems(self) -> list[Problem]:
        names = ("product_tflops", "attention_tflops", "memory_gb_per_s", "sustained")
        found = above(self, "rates", 0, *names)
        if not found and self.sustained > 1:
            found.append(Problem("rates.sustained", self.sustained, "expected a number up to 1"))
        return found

    @property
    def products(self) -> float:
        """FLOP/s of products in a run."""
        return self.sustained * self.product_tflops * 1e12

    @property
    def attention(self) -> float:
        """FLOP/s of attention in a run."""
        return self.sustained * self.attention_tflops * 1e12

    @property
    def memory(self) -> float:
        """Bytes a second that a run reads and writes in the device's memory."""
        return self.sustained * self.memory_gb_per_s * 1e9


@dataclass(frozen=True, kw_only=True)
class LinkConfig(Settings):
    """How a device sends to others in a collective of all of them.

    Attributes:
        gb_per_s: what a device sends, and at the same time receives, in large collectives, GB/s:
            the *bus bandwidth* of nccl-tests. 0: there is no such link.
        latency_us: of each step of a ring, microseconds.
    """

    gb_per_s: float = 0.0
    latency_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Settings):
    """Where checkpoints go.

    Attributes:
        host_gb_per_s: at which each device's tensors are copied to its host's memory, for which
            training stops, GB/s.
        node_write_gb_per_s: what one node writes, GB/s.
        write_gb_per_s: what all nodes write together at most, GB/s.
        node_read_gb_per_s: what one node reads, GB/s.
        read_gb_per_s: what all nodes read together at most, GB/s.
    """

    host_gb_per_s: float
    node_write_gb_per_s: float
    write_gb_per_s: float
    node_read_gb_per_s: float
    read_gb_per_s: float

    def problems(self) -> list[Problem]:
        names = ("node_write_gb_per_s", "write_gb_per_s", "node_read_gb_per_s", "read_gb_per_s")
        return above(self, "storage", 0, "host_gb_per_s", *names)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Settings):
    """Equal nodes of equal devices. Each rank has a device of its own.

    Attributes:
        nodes: how many.
        devices: of a node.
        device: `cpu`, or a GPU such as `H100`, whose memory and peak are those of its data sheet
            where they are not given.
        memory_gib: what a program can have of a device's memory, GiB.
        peak_tflops: a device's dense bf16 peak, TFLOP/s, of which the MFU is a part; null: of `cpu`
            it is not known, and there is no MFU.
        cores: of a node, where ranks share them: ranks beyond that number wait for each other, and
            so do computation and communication; null: each rank computes on a device of its own,
            beside which its links work.
        rates: of a device.
        within: the links between the devices of a node.
        between: the links between nodes, for each device.
        start_us: what a collective takes before its first byte, microseconds.
        fsdp_factor: how much longer FSDP2 takes to gather weights, or to scatter gradients, than
            the collectives alone: it also copies what it sends.
        step_s: what a step takes besides, seconds: the host's work that nothing hides.
        storage: for checkpoints.
        failures_per_device_hour: how often a device, or what belongs to it, ends the run.
        restart_s: from a failure to the first new step, seconds, without reading the checkpoint.
    """

    nodes: int
    devices: int
    device: str
    memory_gib: float | None = None
    peak_tflops: float | None = None
    cores: int | None = None
    rates: RatesConfig
    within: LinkConfig = field(default_factory=LinkConfig)
    between: LinkConfig = field(default_factory=LinkConfig)
    start_us: float = 0.0
    fsdp_factor: float = 1.0
    step_s: float = 0.0
    storage: StorageConfig
    failures_per_device_hour: float = 0.0
    restart_s: float = 0.0

    def problems(self) -> list[Problem]:
        found = at_least(self, "", 1, "nodes", "devices", "cores")
        found += above(self, "", 0, "memory_gib", "peak_tflops", "fsdp_factor")
        found += at_least(
            self, "", 0.0, "start_us", "step_s", "failures_per_device_hour", "restart_s"
        )
        if self.device != "cpu" and self.accelerator is None:
            names = ", ".join(ACCELERATORS)
            guess = did_you_mean(closest(self.device, ACCELERATORS))
            found.append(Problem("device", self.device, f"expected cpu or one of {names}", guess))
        if self.device == "cpu" and self.memory_gib is None:
            hint = "give what a rank can have of its node's memory"
            found.append(Problem("memory_gib", expected="not known of device=cpu", hint=hint))
        found += self._link_problems("within", self.devices)
        return found + self._link_problems("between", self.nodes)

    def _link_problems(self, name: str, ends: int) -> list[Problem]:
        link: LinkConfig = getattr(self, name)
        if found := at_least(link, name, 0.0, "gb_per_s", "latency_us"):
            return found
        if ends <= 1 or link.gb_per_s > 0:
            return []
        several = "nodes" if name == "between" else "devices"
        expected = f"has to be given: there are {ends} {several}"
        return [Problem(f"{name}.gb_per_s", expected=expected, others=(several,))]

    @property
    def accelerator(self) -> Accelerator | None:
        """What is known of the device; None of `cpu`."""
        name = accelerator(self.device)
        return None if name is None else ACCELERATORS[name]

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        """`cuda` or `cpu`."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def memory(self) -> int:
        """Bytes that a program can have of a device."""
        gib = self.memory_gib
        if gib is None:
            assert self.accelerator is not None
            gib = self.accelerator.memory_gib
        return int(gib * 2**30)

    @property
    def peak_flops(self) -> float | None:
        """A device's dense bf16 peak in FLOP/s; None if it is not known."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return None if self.accelerator is None else self.accelerator.peak_flops

    @property
    def ranks(self) -> int:
        """One for each device."""
        return self.nodes * self.devices


def cluster_problems(cluster: str) -> list[Problem]:
    """Why there is no cluster of this name, or what is wrong with the file of this path."""
    try:
        load_cluster(cluster)
    except ConfigError as error:
        found = [problem for problem in error.problems if isinstance(problem, Problem)]
        return [
            p if p.key == "cluster" else replace(p, key=f"cluster={cluster}: {p.key}")
            for p in found
        ]
    return []


def load_cluster(cluster: str) -> ClusterConfig:
    """The cluster of a file of conf/cluster/, or of the YAML file of a path.

    Raises:
        ConfigError: there is no such file, or with everything that is wrong in it.
    """
    path = Path(cluster).expanduser()
    if "/" not in cluster and path.suffix not in ENDINGS:
        names = choices(CLUSTERS)
        if cluster not in names:
            expected = f"expected one of {', '.join(names)}, or the path of a YAML file"
            hint = did_you_mean(closest(cluster, names))
            raise ConfigError([Problem("cluster", cluster, expected, hint)])
        path = CONF / CLUSTERS / f"{cluster}.yaml"
    return build(ClusterConfig, _values(cluster, path), f"cluster={cluster}")


def _values(cluster: str, path: Path) -> dict[str, Any]:
    """What a file holds; numbers are read as Hydra reads them."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        expected = f"cannot be read ({reason_of(error)})"
        hint = f"the files of conf/{CLUSTERS}/ show how one is written"
        raise ConfigError([Problem("cluster", cluster, expected, hint)]) from None
    if not isinstance(values, dict):
        expected = "has no settings such as nodes: 8"
        raise ConfigError([Problem("cluster", cluster, expected)])
    return {str(name): value for name, value in values.items()}
