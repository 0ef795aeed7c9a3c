"""Where the time of a step goes, by groups of kernels, from the events of torch's profiler.

On CUDA a kernel's time counts for the group that its name belongs to. On the CPU an operator's own
time does, and the operators that it was called from tell more: a product within the attention of
hidden copies is no product of a projection.
"""

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent


class Group(Enum):
    """What a kernel or an operator is for."""

    PRODUCTS = "matrix products"
    RULE_1 = "attention: rule 1, and flash kernels"
    HIDDEN = "attention: rules 2 and 3"
    ELEMENTWISE = "norms and elementwise"
    LOSS = "loss without its products"
    OPTIMIZER = "clipping and optimizer"
    COMMUNICATION = "communication"
    COPIES = "copies and casts"


OWN = (
    (Group.HIDDEN, r"^(forward|backward)_kernel(_\d+)?$"),  # of phd/attention/fused.py
    # Inductor names a kernel after all operators that are fused in it.
    (Group.LOSS, r"^triton_\w*(softmax|nll_loss|logsumexp|cross_entropy)"),
    (Group.COPIES, r"^triton_poi_fused(__to_copy|_clone|_copy)+_\d+$"),
    (Group.ELEMENTWISE, r"^triton_(poi|red|per)_"),
    (Group.PRODUCTS, r"^triton_tem_fused\w*mm"),
    (Group.COMMUNICATION, r"nccl|gloo|c10d"),
    (Group.OPTIMIZER, r"adam|multi_tensor|_foreach|lpnorm|optimizer"),
    (Group.HIDDEN, r"^(forward|backward)_kernel|_packed|phd::\w*hidden|flex_attention"),
    (Group.RULE_1, r"flash|fmha|sdpa|scaled_dot_product|efficient_attention|cudnn.*attn"),
    (Group.LOSS, r"cross_entropy|softmax|nll_loss|logsumexp|^_kernel|_chunked"),
    (Group.PRODUCTS, r"gemm|gemv|cutlass|cublas|nvjet|wgmma|xmma|::(b|add|badd)?mm|matmul|linear"),
    (Group.COPIES, r"memcpy|memset|copy|::(to|clone|contiguous|fill_|zero_|cat)$|fillfunctor"),
)
"""The groups by what a name contains; the first match counts, and else it is elementwise."""

WITHIN = (Group.OPTIMIZER, Group.HIDDEN)
"""Groups that take everything that is called within them, but the flash kernel."""

PATTERNS = [(group, re.compile(pattern, re.IGNORECASE)) for group, pattern in OWN]


class Breakdown(NamedTuple):
    """Milliseconds of a step.

    Attributes:
        groups: of the kernels (CUDA) or operators (CPU) of each group.
        twice: of them, those in which kernels of two streams ran at the same time.
        idle: in which nothing ran.
        step: from one step to the next.
    """

    groups: dict[Group, float]
    twice: float
    idle: float
    step: float


class Interval(NamedTuple):
    """When something ran, in microseconds."""

    start: float
    end: float


def group_of(name: str, callers: Iterable[str] = ()) -> Group:
    """The group of a kernel or an operator, which was called within `callers`, the nearest first.

    >>> group_of("nvjet_tst_256x128_64x4"), group_of("aten::bmm", ["_PackedBackward"])
    (<Group.PRODUCTS: 'matrix products'>, <Group.HIDDEN: 'attention: rules 2 and 3'>)
    """
    own = _named(name)
    if own in (Group.COMMUNICATION, Group.RULE_1):
        return own
    around = [_named(caller) for caller in callers]
    for group in WITHIN:
        if group in around:
            return group
    if own is None and Group.LOSS in around:
        return Group.LOSS
    return own or Group.ELEMENTWISE


def breakdown(events: Iterable[FunctionEvent], steps: int, seconds: float) -> Breakdown:
    """Add up the time of a window of so many steps, which took so many seconds.

    Args:
        events: of the profiler. If there are any of a GPU, only those count.
    """
    assert steps > 0
    # An annotation is no work, and stands around what is, on the GPU as well.
    events = [event for event in events if not event.is_user_annotation]
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    groups = dict.fromkeys(Group, 0.0)
    if kernels:
        for event in kernels:
            groups[group_of(event.name)] += event.time_range.elapsed_us()
    else:
        for event in events:
            groups[group_of(event.name, _callers(event))] += event.self_cpu_time_total
    roots = kernels or [event for event in events if _is_outermost(event)]
    busy_us = covered(Interval(e.time_range.start, e.time_range.end) for e in roots)
    ms = 1e-3 / steps
    step = seconds * 1e3 / steps
    groups = {group: spent * ms for group, spent in groups.items()}
    twice = max(0.0, sum(groups.values()) - busy_us * ms)
    return Breakdown(groups, twice, max(0.0, step - busy_us * ms), step)


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals.

    >>> covered([Interval(0, 2), Interval(5, 6), Interval(1, 3)])
    4.0
    """
    total, end = 0.0, float("-inf")
    for interval in sorted(intervals):
        total += max(0.0, interval.end - max(interval.start, end))
        end = max(end, interval.end)
    return total


def table(found: Breakdown) -> str:
    """A table in Markdown: milliseconds of a step and their part of it, the most first."""
    rows = [(group.value, spent) for group, spent in found.groups.items() if spent > 0]
    rows.sort(key=lambda row: -row[1])
    if found.twice > 0.005 * found.step:
        rows.append(("less what ran at the same time", -found.twice))
    rows += [("idle", found.idle), ("step", found.step)]
    lines = [f"| {name} | {ms:.2f} | {100 * ms / found.step:.1f} % |" for name, ms in rows]
    return "\n".join(["| where | ms | of the step |", "| --- | --- | --- |", *lines])


def _named(name: str) -> Group | None:
    return next((group for group, pattern in PATTERNS if pattern.search(name)), None)


def _callers(event: FunctionEvent) -> Iterator[str]:
    return (caller.name for caller in _chain(event))


def _is_outermost(event: FunctionEvent) -> bool:
    return all(caller.is_user_annotation for caller in _chain(event))


def _chain(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The events within which this one was called, the nearest first."""
    caller = event.cpu_parent
    while caller is not None:
        yield caller
        caller = caller.cpu_parent
