"""How all ranks come to end after the same step, without waiting for each other's devices."""

from signal import Signals
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed.process_groups import ProcessGroups
from train.distributed.signals import StopSignal
from train.distributed.watchdog import Watchdog


class RankFlags(NamedTuple):
    """What a rank knows before a step; agreed upon, what is so for any of them.

    Attributes:
        signal: the number of the signal that came; 0: none.
        failed: there will be no batch after this one.
        full: the batch after this one has targets.
        late: the time that the run may take is over.
    """

    signal: int = 0
    failed: bool = False
    full: bool = False
    late: bool = False


class StopSync:
    """A vote in every step, counted on the CPU while the devices compute.

        begin(standing)     the votes go out
        engine.step(...)    devices compute, votes arrive
        end()               the largest of each: all ranks have the same

    Between micro-batches, and while evaluating or sampling, `stop` asks about signals alone.
    Whoever asks is not hung: the watchdog is told.

    Attributes:
        signal: the one that all ranks know of; None: there is none.
    """

    def __init__(self, groups: ProcessGroups, stop_signal: StopSignal, watchdog: Watchdog) -> None:
        self.groups = groups
        self.stop_signal = stop_signal
        self.watchdog = watchdog
        self.signal: Signals | None = None
        self._votes = torch.zeros(len(RankFlags()), dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self, flags: RankFlags) -> None:
        """Send this rank's standing; its signal is known here."""
        self.watchdog.heartbeat()
        self._votes = torch.tensor(flags._replace(signal=self._received()))
        self._work = self._largest(self._votes)

    def end(self) -> RankFlags:
        """Wait for the others' standing; return what all have agreed on."""
        if self._work is not None:
            self._work.wait()
        signal, failed, full, late = self._votes.tolist()
        if self._work is None:  # a lone process need not wait for the next vote
            signal = self._received()
        self._learn(signal)
        return RankFlags(signal, bool(failed), bool(full), bool(late))

    def stop(self) -> bool:
        """Whether any rank has got a signal; every rank asks at the same point."""
        self.watchdog.heartbeat()
        if self.signal is None:
            vote = torch.tensor([self._received()])
            if (work := self._largest(vote)) is not None:
                work.wait()
            self._learn(vote.tolist()[0])
        return self.signal is not None

    def _received(self) -> int:
        return int(self.stop_signal.received or 0)

    def _learn(self, signal: int) -> None:
        if signal and self.signal is None:
            self.signal = Signals(signal)
            self.stop_signal.on_first_signal()  # whoever else got it, this rank ends, too

    def _largest(self, votes: Tensor) -> dist.Work | None:
        group = self.groups.control
        if group is None:
            return None
        return dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group, async_op=True)
