"""What a rank does besides computing hardly grows with the number of ranks, counted in messages."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.forked_python import forked_python
from tests.train.many_ranks import rank_of
from train.benchmarks.scale import SETTINGS, bench_scale
from train.benchmarks.stand_ins import as_rank
from train.checkpoint.reader import metadata_for
from train.checkpoint.staging import HostMemory, StagedPlanner, flaw_of_pieces
from train.compose import load

FEW, MANY = 8, 32


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Of two real ranks among a few, and among more."""
    with forked_python():
        result = bench_scale(load(["size=tiny", *SETTINGS]), (FEW, MANY), 2)
    return {(row["work"], row["rank"], row["ranks"]): row for row in result.rows}


@pytest.mark.process
def test_what_a_rank_receives_does_not_depend_on_the_number_of_ranks(rows: dict) -> None:
    works = {work for work, rank, _ in rows if rank == "1"}
    assert {"log", "save", "find the checkpoint", "stop flags, a step"} < works
    for work in works - {"connect what is used", "connect all with all"}:
        few, many = (rows[work, "1", ranks]["received_kib"] for ranks in (FEW, MANY))
        assert many <= 1.1 * few, work


@pytest.mark.process
def test_what_rank_0_receives_and_sends_is_linear(rows: dict) -> None:
    for work, rank, ranks in rows:
        if (rank, ranks) != ("0", FEW) or work == "connect all with all":
            continue
        for key in ("messages", "received_kib", "sent_kib"):
            few, many = (rows[work, "0", number][key] for number in (FEW, MANY))
            assert many <= 1.1 * few * (MANY - 1) / (FEW - 1), (work, key)


@pytest.mark.process
def test_connecting_all_with_all_would_be_quadratic_in_what_each_rank_reads(rows: dict) -> None:
    def read(work: str, ranks: int) -> float:
        return rows[work, "1", ranks]["received_kib"]

    assert read("connect all with all", MANY) > 6 * read("connect all with all", FEW)
    assert read("connect what is used", MANY) < 2 * read("connect what is used", FEW)
    used, all_with_all = (
        rows[f"connect {which}", "1", MANY]["sockets"] for which in ("what is used", "all with all")
    )
    assert used < 16 < MANY < all_with_all


SHAPES = {"model.a": (40, 3), "model.b": (5,), "model.c": (16, 2), "model.d": (1, 2)}


def tensors_of(rank: int, ranks: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (ranks,))
    shards: dict[str, Tensor] = {
        name: distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)
        for name, shape in SHAPES.items()
    }
    names = [name.replace("model.", "optimizer.") for name in SHAPES]
    steps = {f"{n}.step": torch.zeros(()) for i, n in enumerate(names) if i % ranks == rank}
    return shards | steps | ({"random.cpu": torch.zeros(7)} if rank == 0 else {})


def plan_of(rank: int, ranks: int) -> Any:
    with rank_of(rank, ranks):
        return StagedPlanner(tensors_of(rank, ranks), HostMemory()).local_plan


def test_a_stand_in_plans_what_a_real_rank_of_its_number_would(tmp_path: Path) -> None:
    for ranks in (3, 8):
        said = plan_of(1, ranks)
        for rank in range(2, ranks):
            made = as_rank(said, rank, None, model=1, ranks=ranks, root=tmp_path)
            real = plan_of(rank, ranks)
            key = lambda item: item.index.fqn  # noqa: E731
            assert sorted(made.items, key=key) == sorted(real.items, key=key), rank


def test_a_rank_looks_only_at_the_pieces_that_it_reads() -> None:
    pieces = [
        {"start": [5 * i, 0], "shape": [5, 3], "file": f"__{i}", "offset": 0, "bytes": 60}
        for i in range(8)
    ]
    index = {"model.a": {"dtype": "float32", "shape": [40, 3], "pieces": pieces}}
    for ranks, read in ((8, [3]), (4, [6, 7]), (1, [*range(8)])):
        with rank_of(min(3, ranks - 1), ranks):
            tensors = {"model.a": tensors_of(0, ranks)["model.a"]}
            storage = metadata_for(index, tensors).storage_data
            assert [place.relative_path for place in storage.values()] == [f"__{i}" for i in read]


# Pieces of a tensor


def cut(size: tuple[int, ...], random: Random) -> list[ChunkStorageMetadata]:
    """A box, cut in two again and again."""
    boxes = [([0] * len(size), list(size))]
    for _ in range(random.randrange(6)):
        start, shape = boxes.pop(random.randrange(len(boxes)))
        dim, at = random.randrange(len(size)), 0
        at = random.randint(0, shape[dim])
        low, high = list(shape), list(shape)
        low[dim], high[dim] = at, shape[dim] - at
        after = list(start)
        after[dim] += at
        boxes += [(start, low), (after, high)]
    return [ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in boxes]


def covered_once(size: tuple[int, ...], pieces: list[ChunkStorageMetadata]) -> bool:
    """The definition: every number lies in one piece, and no piece reaches out."""
    room = torch.zeros([2 * n + 2 for n in size], dtype=torch.int64)
    for piece in pieces:
        room[tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))] += 1
    inside = room[tuple(slice(0, n) for n in size)]
    return bool((inside == 1).all()) and int(room.sum()) == inside.numel()


def test_pieces_are_right_if_and_only_if_they_cover_a_tensor_once() -> None:
    random = Random(0)
    found = set()
    for _ in range(400):
        size = tuple(random.randint(1, 4) for _ in range(random.randint(1, 3)))
        pieces = cut(size, random)
        if random.random() < 0.5:
            i, dim = random.randrange(len(pieces)), random.randrange(len(size))
            moved = list(pieces[i].offsets)
            moved[dim] = max(0, moved[dim] + random.choice([-1, 1]))
            pieces[i] = ChunkStorageMetadata(torch.Size(moved), pieces[i].sizes)
        flaw = flaw_of_pieces(torch.Size(size), pieces)
        filled = [piece for piece in pieces if piece.sizes.numel()]
        outside = any(
            a + n > m
            for p in pieces
            for a, n, m in zip(p.offsets, p.sizes, size, strict=True)
        )  # fmt: skip
        assert (flaw is None) == (covered_once(size, filled) and not outside), (size, pieces)
        found.add(flaw is None)
    assert found == {True, False}


class Looked(ChunkStorageMetadata):
    """Counts how often somebody asks where a piece begins."""

    count = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "offsets":
            Looked.count += 1
        return super().__getattribute__(name)


def looks(ranks: int) -> int:
    """At a tensor that is cut along its shorter dim, as FSDP2 cuts a down projection."""
    sizes = torch.Size([1, 4 * ranks])
    pieces = [Looked(torch.Size([rank, 0]), sizes) for rank in range(ranks)]
    Looked.count = 0
    assert flaw_of_pieces(torch.Size([ranks, 4 * ranks]), pieces) is None
    return Looked.count


def test_checking_pieces_takes_a_number_of_looks_that_is_linear() -> None:
    assert looks(512) <= 8.5 * looks(64)
