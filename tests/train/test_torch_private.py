"""What train/torch_private.py assumes of torch, one test for each assumption."""

import inspect
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.train.many_ranks import run_ranks
from train.distributed.process_groups import ProcessGroups
from train.torch_private import (
    SDPA_KERNELS,
    AotGraphs,
    FakeTensorMode,
    KernelDispatchMode,
    StorageInfo,
    all_gather_rows,
    all_reduce,
    aot_graphs,
    compile_each_shape,
    completed_work,
    dedup_save_plans,
    drop_accumulated_gradients,
    fuse_clip_and_skip,
    ignore_in_ddp,
    init_fsdp_root,
    mark_dynamic,
    on_free,
    record_memory_history,
    reduce_scatter_rows,
    stop_memory_history,
    storage_key,
    tree_leaves,
    tree_map_only,
    use_fake_backend,
    write_memory_snapshot,
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Blocks(nn.Module):
    """Two blocks, of which the first can be called alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
        for block in self.blocks:
            nn.init.normal_(block.weight, generator=generator)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def sharded(mesh: DeviceMesh, policy: MixedPrecisionPolicy = MixedPrecisionPolicy()) -> Blocks:  # noqa: B008
    model = Blocks()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def test_a_block_that_is_called_before_the_root_becomes_one_unless_there_is_a_root(
    mesh: DeviceMesh,
) -> None:
    x = torch.ones(1, 3)
    without, with_root = sharded(mesh), sharded(mesh)
    without.blocks[0](x)
    with pytest.raises(RuntimeError, match="lazily initialized"):
        without(x)
    assert isinstance(with_root, FSDPModule)
    init_fsdp_root(with_root)
    first = with_root.blocks[0](x)
    assert torch.equal(with_root(x), with_root.blocks[1](first))


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_gradients_that_were_not_reduced_can_be_dropped(
    mesh: DeviceMesh, reduce_dtype: torch.dtype | None
) -> None:
    param_dtype = None if reduce_dtype is None else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    model, twin = sharded(mesh, policy), sharded(mesh, policy)
    assert isinstance(model, FSDPModule)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 3)).sum().backward()
    assert any(accumulated(module) for module in modules)
    drop_accumulated_gradients(modules)
    assert not any(accumulated(module) for module in modules)
    model.set_requires_gradient_sync(True)
    for each in (model, twin):
        each(torch.full((2, 3), 0.5)).sum().backward()
    for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(ours.grad), whole(other.grad)), name


def accumulated(module: Any) -> list[Tensor]:
    """The gradients that a module has not reduced, wherever FSDP2 keeps them."""
    group = module._get_fsdp_state()._fsdp_param_group
    parameters = group.fsdp_params if group else []
    places = [(p.unsharded_accumulated_grad, p._unsharded_param.grad) for p in parameters]
    return [gradient for place in places for gradient in place if gradient is not None]


def whole(gradient: Any) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor()


@pytest.mark.usefixtures("mesh")
def test_ddp_leaves_out_the_names_that_it_is_given() -> None:
    norm = nn.BatchNorm1d(3)
    module = nn.Sequential(norm)
    ignore_in_ddp(module, ["0.running_mean", "0.bias"])
    replicated = DistributedDataParallel(module)
    synchronized = {id(buffer) for buffer in replicated.modules_buffers}
    assert id(norm.running_mean) not in synchronized
    assert id(norm.running_var) in synchronized
    reduced: list[Tensor] = []

    def note(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.extend(bucket.parameters())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replicated.register_comm_hook(None, note)
    replicated(torch.rand(4, 3)).sum().backward()
    assert [id(parameter) for parameter in reduced] == [id(norm.weight)]


def test_collectives_give_a_tensor_of_their_own(mesh: DeviceMesh) -> None:
    """With more ranks: tests/train/engines/test_tensor_parallel.py."""
    x, group = torch.rand(2, 3), mesh.get_group().group_name
    for made in (
        all_gather_rows(x, 1, group),
        reduce_scatter_rows(x, 1, group),
        all_reduce(x, "sum", group),
        all_reduce(x, "max", group),
    ):
        assert torch.equal(made, x)
        assert made.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("fake", [False, True])
def test_the_storage_key_is_that_of_the_storage(fake: bool) -> None:
    def check() -> None:
        first, second = torch.zeros(4, 4), torch.zeros(4, 4)
        assert storage_key(first) == storage_key(first[1:]) == storage_key(first.mT)
        assert storage_key(first) != storage_key(second)

    if fake:
        with FakeTensorMode():
            check()
    else:
        check()


def test_a_fake_tensor_has_the_size_of_a_real_one_and_no_memory() -> None:
    with FakeTensorMode():
        huge = torch.zeros(1 << 20, 1 << 20) + 1
    assert huge.untyped_storage().nbytes() == 4 << 40


def stepped(gradient: Tensor, scale: float, skip: float) -> dict[str, Tensor]:
    """A parameter and its state after two steps of fused AdamW, the second of them scaled."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(8)
    optimizer.step()
    parameter.grad = gradient.clone()
    fuse_clip_and_skip(optimizer, torch.tensor(scale), torch.tensor(skip))
    optimizer.step()
    return {"parameter": parameter.detach(), **optimizer.state[parameter]}


def test_fused_adamw_divides_gradients_by_the_scale() -> None:
    gradient = torch.linspace(-2, 3, 8)
    plain, scaled = stepped(gradient, 1.0, 0.0), stepped(4 * gradient, 4.0, 0.0)
    assert plain.keys() == scaled.keys() == {"parameter", "step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_fused_adamw_changes_nothing_in_a_step_that_is_skipped() -> None:
    gradient = torch.full((8,), torch.nan)
    skipped = stepped(gradient, 1.0, 1.0)
    parameter = nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(8)
    optimizer.step()
    once = {"parameter": parameter.detach(), **optimizer.state[parameter]}
    assert all(torch.equal(once[name], skipped[name]) for name in once)


def test_dcp_tells_where_it_wrote_a_tensor(tmp_path: Path) -> None:
    info = StorageInfo("file", 3, 5)
    assert (info.relative_path, info.offset, info.length) == ("file", 3, 5)
    planner, writer = DefaultSavePlanner(), FileSystemWriter(tmp_path, sync_files=False)
    planner.set_up_planner({"x": torch.arange(5)}, is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    [plan], metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan([plan])
    results = writer.write_data(planner.finish_plan(plan), planner).value()
    writer.finish(metadata, [results])
    [written] = metadata.storage_data.values()
    assert isinstance(written, StorageInfo)
    size = (tmp_path / written.relative_path).stat().st_size
    assert 0 <= written.offset < written.offset + written.length <= size


class Seen(KernelDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_kernel_of_attention() -> None:
    q = torch.rand(1, 2, 8, 4)
    with Seen() as seen:
        scaled_dot_product_attention(q, q, q, is_causal=True)
    assert set(seen.operators) & set(SDPA_KERNELS) == {SDPA_KERNELS[0]}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_dispatch_mode_sees_flex_attention() -> None:
    q = torch.rand(1, 2, 8, 4)
    with torch.no_grad(), Seen() as seen:
        flex_attention(q, q, q)
    assert torch.ops.higher_order.flex_attention in seen.operators


@pytest.mark.compile
def test_a_marked_vector_is_compiled_once_for_all_its_lengths() -> None:
    for marked, graphs in ((True, 1), (False, 2)):
        torch.compiler.reset()
        counter = CompileCounter()
        doubled = torch.compile(lambda x: x * 2, backend=counter)
        for length in (4, 7, 5):
            vector = torch.arange(length)
            if marked:
                mark_dynamic(vector)
            assert torch.equal(doubled(vector), vector * 2)
        assert counter.frame_count == graphs


def test_a_tree_is_mapped_at_its_tensors_alone() -> None:
    tree = (torch.ones(2), [3, None, {"x": torch.ones(1)}])
    first, [number, nothing, inner] = tree_map_only(Tensor, lambda x: x + 1, tree)
    assert first.tolist() == [2, 2]
    assert (number, nothing) == (3, None)
    assert inner["x"].tolist() == [2]


@pytest.mark.compile
def test_each_shape_can_be_compiled_for_itself() -> None:
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(all(isinstance(x, Tensor) for x in inputs))
        return graph.forward

    doubled = torch.compile(lambda x: x * 2, backend=backend)
    with compile_each_shape():
        for size in range(2, 14):
            assert doubled(torch.ones(size)).sum() == 2 * size
    assert seen == [True] * 12  # a dynamic size would be an input of its own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_allocations_are_noted_and_written(tmp_path: Path) -> None:
    record_memory_history()
    x = torch.ones(1 << 20, device="cuda")
    write_memory_snapshot(tmp_path / "memory.pickle")
    stop_memory_history()
    del x
    with (tmp_path / "memory.pickle").open("rb") as file:
        traces = pickle.load(file)["device_traces"]
    assert any(event["action"] == "alloc" for trace in traces for event in trace)


def test_the_memory_history_takes_what_it_is_given() -> None:
    """Where there is no CUDA, that the functions are there, and take these arguments."""
    memory = torch.cuda.memory
    signature = inspect.signature(memory._record_memory_history)
    signature.bind(max_entries=1)
    signature.bind(enabled=None)
    inspect.signature(memory._dump_snapshot).bind("file")


def test_a_freed_storage_is_told_once_also_where_only_autograd_held_it() -> None:
    freed: list[str] = []
    with FakeTensorMode():
        x = torch.ones(3, requires_grad=True)
        y = x.exp()  # which saves its result
        on_free(y, lambda: freed.append("y"))
        total = y[1:].sum()
        del y
        assert freed == []
        total.backward()
        assert freed == ["y"]


def test_the_leaves_of_a_tree_are_found_in_their_order() -> None:
    assert tree_leaves((1, [2, {"x": 3}], None)) == [1, 2, 3, None]


def pointwise_and_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x, first, second = (t.bfloat16() for t in (x, first, second))
    return ((x @ first).sin().exp() @ second).cos()


def saved(graphs: Any) -> dict[str, Any]:
    """What the forward graph keeps besides its results and inputs, by name, with the operator."""
    [end] = (node for node in graphs.forward.graph.nodes if node.op == "output")
    kept = tree_leaves(end.args)[graphs.results :]
    return {node.name: node.target for node in kept if node.op != "placeholder"}


def test_a_function_is_cut_as_compiling_cuts_it() -> None:
    mm = torch.ops.aten.mm.default
    with FakeTensorMode():
        x, *weights = (torch.empty(4, 4, requires_grad=True) for _ in range(3))
        free, full, selective = (
            aot_graphs(pointwise_and_products, (x, *weights), keeps)
            for keeps in (None, lambda _: False, lambda operator: operator is mm)
        )
    assert list(saved(selective).values()).count(mm) == 2
    assert mm not in saved(full).values()
    assert mm in saved(free).values()
    names = [node.name for node in free.backward.graph.nodes if node.op == "placeholder"]
    assert set(saved(free)) < set(names)
    assert names[-1].startswith("tangents")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_checkpointed_function_is_cut_as_torch_compile_cuts_it() -> None:
    mm, kept = torch.ops.aten.mm.default, []

    def forward_only(graph: GraphModule, _: Any) -> Any:
        kept.append(saved(AotGraphs(graph, graph, 1)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_only,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    contexts = partial(create_selective_checkpoint_contexts, [mm])

    @torch.compile(backend=backend)
    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(pointwise_and_products, *inputs, use_reentrant=False, context_fn=contexts)

    inputs = [torch.rand(4, 4, requires_grad=True) for _ in range(3)]
    checkpointed(*inputs).sum().backward()
    with FakeTensorMode():
        fakes = [torch.empty(4, 4, requires_grad=True) for _ in range(3)]
        found = aot_graphs(pointwise_and_products, fakes, lambda operator: operator is mm)
    assert kept[0] == saved(found)
    assert list(kept[0].values())[:2] == [mm, mm]


def test_of_tensors_that_several_ranks_have_one_rank_writes_each() -> None:
    def plan_of(tensors: dict[str, Tensor]) -> SavePlan:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors)
        return planner.create_local_plan()

    x, y, z = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    plans = dedup_save_plans([plan_of({"x": x, "y": y}), plan_of({"x": x, "y": y, "z": z})])
    names = [{item.index.fqn for item in plan.items} for plan in plans]
    assert names[0] | names[1] == {"x", "y", "z"}
    assert names[0] & names[1] == set()
    assert all(names)


class Echo(dist.ProcessGroup):
    """A group in Python, in which every other rank says the same as this one."""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # noqa: ARG002
        for tensor in tensors:
            tensor.mul_(self.size())
        return completed_work(tensors)


def rank_of_thousands(groups: ProcessGroups) -> tuple:  # noqa: ARG001
    """Where rank 7 of 4,096 is in a mesh, and what it sums up in a group in Python."""
    use_fake_backend()
    dist.Backend.register_backend("echo", lambda *given: Echo(given[1], given[2]), devices=["cpu"])
    dist.init_process_group("fake", rank=7, world_size=4096, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (512, 8), mesh_dim_names=("replicate", "fsdp"))
    x = torch.ones(2)
    work = dist.all_reduce(x, group=dist.new_group(backend="echo"), async_op=True)
    assert work is not None
    work.wait()
    return list(mesh.get_coordinate() or ()), x.tolist()


@pytest.mark.process
def test_one_process_may_be_a_rank_of_thousands() -> None:
    assert run_ranks(1, rank_of_thousands) == [([0, 7], [4096.0, 4096.0])]
