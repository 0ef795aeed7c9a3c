"""Work on whole matrices whose pieces are on many ranks: each is done once, by one rank.

    rank    its pieces           whole matrices                    its pieces
    0       a0 b0 c0   --+--->   a = a0 a1       --> f(a)    --+--->   of f(a), f(b), f(c)
    1       a1 b1 c1   --+--->   b = b0 b1, c    --> f(b), f(c)  +--->   of f(a), f(b), f(c)

For P numbers in matrices, S shards and n ranks, each rank receives P / n numbers on the way there,
and P / S on the way back. If each rank gathered all matrices instead, it would receive P numbers,
once, and compute n times as much.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import chain
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each piece of work: the most costly first, to whom has the least so far.

    >>> deal([1, 8, 1, 3, 4], 2)
    [1, 0, 0, 1, 1]
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    heapify(loads)
    owners = [0] * len(costs)
    # Where costs are equal, the order is that of the work, so that all ranks deal alike.
    for work in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        owners[work] = rank
        heapreplace(loads, (load + costs[work], rank))
    return owners


def batches(
    numbers: Sequence[int], shapes: Sequence[torch.Size], most: Sequence[int]
) -> list[list[int]]:
    """These of the matrices in batches of one shape, of which each says how many it takes at most.

    >>> square, wide = torch.Size([9, 9]), torch.Size([3, 9])
    >>> batches([0, 1, 2, 4], [square, wide, square, wide, square], most=[2, 3, 2, 3, 2])
    [[0, 2], [4], [1]]
    """
    alike: dict[torch.Size, list[list[int]]] = {}
    for number in numbers:
        found = alike.setdefault(shapes[number], [[]])
        if len(found[-1]) == most[number]:
            found.append([])
        found[-1].append(number)
    return list(chain(*alike.values()))


class MatrixExchange:
    """Who does which matrix, and which part of it each rank holds.

    Ranks form rows of S neighbours that hold a whole model together (FSDP2 and ZeRO: one row of
    all; HSDP: `replicate` rows; DDP: each rank alone). A matrix lies on the ranks of a row in
    consecutive pieces of its rows of numbers, some of which may be empty. It goes to its owner from
    the owner's row, and comes back to all ranks. Each rank is sent one message each way.

    Args:
        shapes: of the matrices.
        costs: of the work on each.
        most: of its shape that are worked on at once, by matrix.
        sizes: by rank, how many numbers of each matrix it holds.
        rank: this one.
        shards: S.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        costs: Sequence[float],
        most: Sequence[int],
        sizes: Sequence[Sequence[int]],
        *,
        rank: int,
        shards: int,
    ) -> None:
        self.shapes, self.sizes, self.rank, self.ranks = shapes, sizes, rank, len(sizes)
        self.owned: list[list[int]] = [[] for _ in sizes]
        for number, owner in enumerate(deal(costs, self.ranks)):
            self.owned[owner].append(number)
        self.batches = batches(self.owned[rank], shapes, most)
        self.row = range(rank - rank % shards, rank - rank % shards + shards)
        self.starts: list[list[int]] = []
        for first in range(0, self.ranks, shards):
            ends = [0] * len(shapes)
            for held in sizes[first : first + shards]:
                self.starts.append(ends)
                ends = list(map(sum, zip(ends, held, strict=True)))
            assert ends == list(map(prod, shapes)), ends

    def __call__(
        self, pieces: Sequence[Tensor], work: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """This rank's piece of `work` of each whole matrix, by number. Every rank calls this.

        Args:
            pieces: this rank's, flat, all of one dtype.
            work: maps matrices of one shape, (count, m, n), which it may overwrite, to as many.
        """
        if self.ranks == 1:
            yield from self._worked([dict(enumerate(pieces))], work)
        else:
            done = dict(self._worked(self._gathered(pieces), work))
            yield from self._scattered(done, like=pieces[0])

    def _worked(
        self, row: Sequence[Mapping[int, Tensor]], work: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """`work` of each matrix that this rank owns, flat, from the pieces of a row's ranks."""
        for batch in self.batches:
            whole = torch.cat([pieces[number] for number in batch for pieces in row])
            whole = whole.view(len(batch), *self.shapes[batch[0]])
            yield from zip(batch, work(whole).flatten(1), strict=True)

    def _gathered(self, pieces: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        """By rank of this row, its pieces of the matrices that this rank owns."""
        mine = self.owned[self.rank]
        given, sizes = [], []
        for rank, owned in enumerate(self.owned):
            near = rank in self.row
            given.append([pieces[number] for number in owned] if near else [])
            sizes.append([self.sizes[rank][number] for number in mine] if near else [])
        received = _exchange(given, sizes, like=pieces[0])
        return [dict(zip(mine, received[rank], strict=True)) for rank in self.row]

    def _scattered(self, done: Mapping[int, Tensor], like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """This rank's pieces of all matrices, of which it owns those that are given."""
        mine = self.owned[self.rank]
        given = [
            [done[number].narrow(0, starts[number], sizes[number]) for number in mine]
            for starts, sizes in zip(self.starts, self.sizes, strict=True)
        ]
        own = self.sizes[self.rank]
        received = _exchange(given, [[own[i] for i in owned] for owned in self.owned], like)
        for owned, parts in zip(self.owned, received, strict=True):
            yield from zip(owned, parts, strict=True)


def _exchange(
    given: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], like: Tensor
) -> list[Sequence[Tensor]]:
    """Send each rank its tensors, in one message; return those of each rank, of known sizes."""
    out = [tensor for tensors in given for tensor in tensors]
    sent = torch.cat(out) if out else like.new_empty(0)
    totals = [sum(of_rank) for of_rank in sizes]
    received = like.new_empty(sum(totals))
    splits = [sum(tensor.numel() for tensor in tensors) for tensors in given]
    dist.all_to_all_single(received, sent, totals, splits)
    parts = received.split(totals)
    return [part.split(list(of_rank)) for part, of_rank in zip(parts, sizes, strict=True)]
