"""Stop synchronisation: all ranks end after the same step, and no device waits for it.

A rank that stopped by itself would leave the others hanging in their next collective. So in every
step the ranks exchange a few flags over gloo, on the CPU, while the devices compute.
"""

from signal import Signals
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed.process_groups import ProcessGroups
from train.distributed.signals import StopSignal
from train.distributed.watchdog import Watchdog


class RankFlags(NamedTuple):
    """What a rank knows before a step; after the exchange, the maximum of each over all ranks.

    Attributes:
        signal: the number of the signal that came; 0: none.
        data_failed: the batch after this one cannot be had, because of an error.
        has_next: the batch after this one has targets.
        time_is_up: `train.max_time` is over.
    """

    signal: int = 0
    data_failed: bool = False
    has_next: bool = False
    time_is_up: bool = False


class StopSync:
    """An all-reduce of the ranks' flags in every step, behind the device's work.

        start(flags)        the all-reduce begins
        train_step(...)     devices compute, flags arrive
        wait()              the maximum of each flag: all ranks have the same

    Between micro-batches, and while evaluating or sampling, `stop_requested` asks about signals
    alone. Each call is a sign of life for the watchdog.

    Attributes:
        signal: the first signal that any rank has received; None: there is none.
    """

    def __init__(self, groups: ProcessGroups, stop_signal: StopSignal, watchdog: Watchdog) -> None:
        self.groups = groups
        self.stop_signal = stop_signal
        self.watchdog = watchdog
        self.signal: Signals | None = None
        self._flags = torch.zeros(len(RankFlags()), dtype=torch.int64)
        self._work: dist.Work | None = None

    def start(self, flags: RankFlags) -> None:
        """Send this rank's flags; its signal is filled in here."""
        self.watchdog.heartbeat()
        self._flags = torch.tensor(flags._replace(signal=self._received()))
        self._work = self._all_reduce_max(self._flags)

    def wait(self) -> RankFlags:
        """The maximum of every flag over all ranks."""
        if self._work is not None:
            self._work.wait()
        signal, data_failed, has_next, time_is_up = self._flags.tolist()
        if self._work is None:  # a lone process need not wait for the next exchange
            signal = self._received()
        self._note(signal)
        return RankFlags(signal, bool(data_failed), bool(has_next), bool(time_is_up))

    def stop_requested(self) -> bool:
        """Whether any rank has received a signal; every rank asks at the same point."""
        self.watchdog.heartbeat()
        if self.signal is None:
            flag = torch.tensor([self._received()])
            if (work := self._all_reduce_max(flag)) is not None:
                work.wait()
            self._note(flag.tolist()[0])
        return self.signal is not None

    def _received(self) -> int:
        return int(self.stop_signal.received or 0)

    def _note(self, signal: int) -> None:
        if signal and self.signal is None:
            self.signal = Signals(signal)
            self.watchdog.begin_exit()  # this rank has to leave, too, whoever got the signal

    def _all_reduce_max(self, flags: Tensor) -> dist.Work | None:
        group = self.groups.control
        if group is None:
            return None
        return dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group, async_op=True)
