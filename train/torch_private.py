"""Every private name of torch that `train` uses, and what each use assumes.

pyproject.toml allows the versions of torch that these were tested with. The tests in
tests/train/test_torch_private.py check one assumption each, so that an upgrade that breaks one
fails in one place.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch._dynamo.decorators import maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future
from torch.fx import GraphModule, Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "FakeTensorMode",
    "StorageInfo",
    "TorchDispatchMode",
    "dedup_save_plans",
    "tree_leaves",
    "tree_map_only",
]

aten = torch.ops.aten
functional = torch.ops._c10d_functional

SDPA_KERNELS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""The operators that `scaled_dot_product_attention` dispatches to, on the CPU and on CUDA."""


class KernelDispatchMode(TorchDispatchMode):
    """A dispatch mode that sees every operator of an eager forward pass.

    `supports_higher_order_operators` also passes it FlexAttention, which is no ordinary operator.
    `ignore_compile_internals` keeps it from operators that torch.compile runs while it compiles.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def init_fsdp_root(module: FSDPModule) -> None:
    """Make `module` the root of its FSDP2 modules now, and not at its first forward pass.

    Otherwise a block that is called before the root becomes a root itself, and the root's first
    forward pass fails.
    """
    module._get_fsdp_state()._lazy_init()


def drop_accumulated_gradients(modules: Sequence[FSDPModule]) -> None:
    """Drop the gradients that FSDP2 has accumulated, unsharded, and not reduced yet.

    FSDP2 keeps them in its parameter group: in `unsharded_accumulated_grad` if they are reduced in
    another precision than they are computed in, else in `.grad` of the unsharded parameter.
    """
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group else ():
            parameter.unsharded_accumulated_grad = None
            parameter._unsharded_param.grad = None


def ignore_in_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Have DDP neither broadcast nor reduce the buffers and parameters with these names."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def mark_dynamic(tensor: Tensor) -> None:
    """Have torch.compile make a graph for every length of a vector, and not for this one alone.

    Otherwise the second length would compile it again.
    """
    maybe_mark_dynamic(tensor, 0)


def keep_graphs_with_functions() -> None:
    """Have torch.compile keep graphs with autograd functions for later starts, too.

    It keeps them by their traced operations, as any other graph. This saves tracing their backward
    again.
    """
    functorch.autograd_cache_allow_custom_autograd_functions = True


def all_gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """The x (n, ...), contiguous, of the ranks of a group, one after another: (ranks * n, ...).

    This and the two that follow are collectives that torch.compile can trace, by the operators
    that PyTorch's own functional collectives call. The group is given by its name.
    """
    return functional.wait_tensor(functional.all_gather_into_tensor(x, ranks, group))


def reduce_scatter_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part (n, ...) of the sum of the x (ranks * n, ...), contiguous, of a group."""
    return functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", ranks, group))


def all_reduce(x: Tensor, operation: Literal["sum", "max"], group: str) -> Tensor:
    """The sum, or the largest, of the x of the ranks of a group; x stays what it is."""
    return functional.wait_tensor(functional.all_reduce(x, operation, group))


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for two tensors if and only if they share their storage.

    `_cdata` is the address of the storage's C++ object. `data_ptr()` would not do, because it is 0
    for every fake tensor.
    """
    return tensor.untyped_storage()._cdata


def compile_each_shape() -> AbstractContextManager[object]:
    """Let `torch.compile` compile each shape for itself, and up to 64 of them.

    Otherwise a function that has been compiled for one shape is compiled for all of them at the
    second one, which is slower, and gives up after 8.
    """
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64)


MOST_ALLOCATIONS = 1_000_000
"""Of a memory history; at 1 KB each, what the host pays for it at most is a gigabyte."""


def record_memory_history() -> None:
    """Note every allocation and release of CUDA memory from now on, with its stack."""
    torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)


def write_memory_snapshot(path: Path) -> None:
    """Write what was noted as a pickle, which https://docs.pytorch.org/memory_viz draws."""
    torch.cuda.memory._dump_snapshot(str(path))


def stop_memory_history() -> None:
    """Note no more, and forget what was noted."""
    torch.cuda.memory._record_memory_history(enabled=None)


def on_free(tensor: Tensor, freed: Callable[[], object]) -> None:
    """Call `freed` when the last tensor with this tensor's storage is gone.

    A storage has one Python object for as long as it exists, also where only autograd holds it.
    """
    weakref.finalize(tensor.untyped_storage(), freed)


class AotGraphs(NamedTuple):
    """The graphs that AOTAutograd makes of a function: what inductor compiles.

    The forward's outputs are the function's own, `results` of them, and then what is kept for the
    backward pass. The backward's inputs are what was kept, in this order, and the gradients of the
    results. Each node's value, a fake tensor, is `node.meta["val"]`.
    """

    forward: GraphModule
    backward: GraphModule
    results: int


def aot_graphs(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    keeps: Callable[[Any], bool] | None = None,
) -> AotGraphs:
    """Trace a function of fake tensors as `torch.compile` does, and cut it as that does.

    Args:
        keeps: which operators' results a checkpointed region keeps, as the lists of
            `create_selective_checkpoint_contexts` say; None: the region is not checkpointed.
    """
    # These load inductor, which takes seconds; most commands need none of it.
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[GraphModule] = []
    results: list[int] = []

    def partition(joint: GraphModule, inputs: Any, **settings: Any) -> Any:
        results.append(settings["num_fwd_outputs"])
        if keeps is not None:
            [end] = (node for node in joint.graph.nodes if node.op == "output")
            _checkpoint_graph(joint, tree_leaves(end.args)[0], keeps)
        return min_cut_rematerialization_partition(joint, inputs, **settings)

    def note(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:  # noqa: ARG001
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    traced = aot_function(
        function, note, note, partition_fn=partition, decompositions=select_decomp_table()
    )
    out = traced(*inputs)
    out.backward(torch.empty_like(out))
    return AotGraphs(graphs[0], graphs[1], results[0])


def _checkpoint_graph(joint: GraphModule, result: Node, keeps: Callable[[Any], bool]) -> None:
    """Mark the forward part of a joint graph as one region, as a compiled `checkpoint` does.

    Args:
        result: of the forward part, which it ends with.
    """
    for node in joint.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):  # not the parts of a result
            kept = keeps(node.target)
            node.meta["recompute"] = (
                CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
            )
            node.meta["ac_graph_id"] = 0
        if node is result:
            return


def fuse_clip_and_skip(optimizer: torch.optim.Optimizer, scale: Tensor, skip: Tensor) -> None:
    """Have the next step of a fused optimizer divide gradients by `scale`, or skip the update.

    The fused AdamW kernel reads `grad_scale` and `found_inf` of its optimizer, which
    `torch.amp.GradScaler` sets in the same way.

    Args:
        optimizer: with `fused=True`.
        scale: float scalar on the device of the parameters.
        skip: float scalar on the same device; the step is skipped if it is 1, and not if it is 0.
    """
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]


def use_fake_backend() -> None:
    """Let `init_process_group("fake")` make a group of any size in which nothing is sent.

    So one process sees what a rank of thousands sees of meshes and shards.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers it


def completed_work(result: Any) -> dist.Work:
    """What a collective of a process group in Python returns when it is done."""
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)
