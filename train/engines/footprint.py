"""What a part of the model takes of a device's memory in a training step, found without it.

    bytes   forward                  backward
      |        ____                     ____
      |    ___|    |                   |    |
      |   |        |____ ... _____ ____|    |
      |   | input  |   saved      | dout    |__ dx
      |

Eagerly, the part runs forward and backward on fake tensors, which have shapes but no memory, and
every storage is counted while it lives. Compiled, it is traced by AOTAutograd, whose partitioner
chooses what is saved; then each operation of its two graphs that inductor gives memory is counted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.fx import GraphModule, Node

from phd.block import Block
from phd.config import ModelConfig
from phd.linear import Linear
from phd.loss import next_token_loss
from phd.loss_memory import fused_loss_bytes
from phd.model import RowContext
from phd.norm import RMSNorm
from phd.pattern import Pattern
from train.engines.activation_checkpointing import ATTENTION as CPU_ATTENTION
from train.engines.activation_checkpointing import MATRIX_PRODUCTS, checkpointed
from train.engines.device import autocast
from train.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    aot_graphs,
    on_free,
    storage_key,
    tree_leaves,
)

aten = torch.ops.aten

CPU = torch.device("cpu")
"""The device of the fake tensors."""

torch.library.define("phd_footprint::attention", "(Tensor q, Tensor k, Tensor v) -> Tensor[]")
torch.library.define(
    "phd_footprint::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> Tensor[]",
)
ATTENTION = torch.ops.phd_footprint.attention.default
ATTENTION_BACKWARD = torch.ops.phd_footprint.attention_backward.default
"""Attention of all rules as one operation each way, of which there are only the shapes.

It reads and returns what the packed backend does. The many small operations that the CPU has in
place of a kernel are not traced, and a kernel's own scratch is in `_scratch`.
"""

KERNELS = frozenset((*MATRIX_PRODUCTS, aten.bmm.default, ATTENTION, ATTENTION_BACKWARD))
"""The operations that inductor calls as they are; it fuses the others."""

TRACED_TOKENS = (2039, 2053)
"""Of the micro-batch from which the footprint of all others follows.

They are primes: so a storage is of tokens if its bytes are divisible by their number, unless a size
of the model is, too, and then the other one is taken.
"""

Recompute = Literal["none", "selective", "full"]


class Footprint(NamedTuple):
    """Bytes of a part of the model in one forward and backward pass, besides its own weights.

    Attributes:
        forward: the most in the forward pass, the input included.
        saved: what is kept from the forward to the backward pass.
        casts: weights in the dtype of the products, which autocast keeps until the whole forward
            pass ends, and which are not saved.
        backward: the most in the backward pass, with what was saved, and all gradients.
        gradients: of the weights, as far as they are new.
    """

    forward: int
    saved: int
    casts: int
    backward: int
    gradients: int


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of a micro-batch.

    Attributes:
        model: the shape.
        rows, tokens: of the micro-batch: B and T.
        dtype: of the matrix products.
        weights: the dtype that matrices are given in: float32, which autocast casts, or `dtype`.
        rounded: blocks have copies of their matrices in `dtype` that are kept for many passes
            (`train.engines.rounded_weights`), so that autocast casts none.
        device: that is meant, `cpu` or `cuda`. The fake tensors are always on the CPU, because
            autograd takes none on CUDA where PyTorch is built without it.
        compiled: whether blocks are compiled.
        recompute: what a block computes again in its backward pass.
        accumulates: whether earlier micro-batches have left gradients, to which this one adds.
    """

    model: ModelConfig
    rows: int
    tokens: int
    dtype: torch.dtype
    weights: torch.dtype
    rounded: bool
    device: str
    compiled: bool
    recompute: Recompute
    accumulates: bool


def block_footprints(given: Pass, checkpoint_every: int = 1) -> list[Footprint]:
    """The footprint of every block, in their order, in each pass. Equal blocks are traced once."""
    model, last = given.model, given.model.layers - 1
    plain = replace(given, recompute="none")
    # Where nothing depends on the depth, one layer stands for all.
    shape = replace(model, layers=min(model.layers, 3))
    found = []
    for i in range(model.layers):
        settings = plain if i % checkpoint_every else given
        layer = shape.layers - 1 if i == last else min(i, 1)
        if model.K == 1 and model.norm != "hybrid_star" and i < last:
            layer = shape.layers - 2
        found.append(_block_footprint(replace(settings, model=shape), layer))
    # The backward pass goes through the last pass of a loop first, and makes the gradients there.
    earlier = [block._replace(gradients=0) for block in found] * (model.passes - 1)
    return earlier + found


def _block_footprint(given: Pass, layer: int) -> Footprint:
    """The footprint of one block.

    A trace takes seconds. Compiled for CUDA, a block's bytes at each moment are so many for each
    token, and as many as its weights' gradients: those of any micro-batch follow from a small one.
    """
    if not given.compiled:
        return _eager_block_footprint(given, layer)
    traced = given
    if given.device == "cuda":
        tokens = next(n for n in TRACED_TOKENS if all(size % n for size in _sizes(given.model)))
        # Of one row, a slice of copies is contiguous, and need not be copied.
        traced = replace(given, rows=min(given.rows, 2), tokens=tokens, accumulates=False)
    found = _traced_block(traced, layer).at(given.rows * given.tokens)
    return found._replace(gradients=0) if given.accumulates else found


def _sizes(model: ModelConfig) -> tuple[int, ...]:
    """The dims of a block's weights and activations, besides rows and tokens."""
    return model.K, model.dim, model.ffn_dim, model.heads, model.kv_heads, model.head_dim


@lru_cache(maxsize=256)
def _eager_block_footprint(given: Pass, layer: int) -> Footprint:
    with FakeTensorMode():
        block, context, shape = _fake_block(given, layer)
        if given.recompute != "none":
            block.forward = checkpointed(
                block.forward,
                given.recompute,
                compiled=False,
                attention=(*CPU_ATTENTION, ATTENTION),
            )
        return _eager_footprint(lambda x: block(x, context), block, shape, given)


@lru_cache(maxsize=256)
def _traced_block(given: Pass, layer: int) -> "_Traced":
    with FakeTensorMode():
        block, context, shape = _fake_block(given, layer)
        return _traced(block, context, shape, given)


def _fake_block(given: Pass, layer: int) -> tuple[nn.Module, RowContext, tuple[int, ...]]:
    """A block of fake tensors, its context, and the shape of its input."""
    model = given.model
    copies = model.K if layer else model.distinct_inputs
    block = _weighted(Block(model, layer), given.weights)
    if given.rounded:
        for linear in _linears(block):
            linear.rounded = torch.empty_like(linear.weight, dtype=given.dtype).detach()
    context = _context(given, last_copy_only=layer == model.layers - 1)
    return block, context, (given.rows, copies, given.tokens, model.dim)


@lru_cache(maxsize=256)
def head_footprint(given: Pass, z_loss: float) -> Footprint:
    """The footprint of the final norm, the LM head and the loss, whose weight counts as its own."""
    model = given.model
    if given.device == "cuda" and given.dtype != torch.float64:
        return _fused_head(given)
    with FakeTensorMode():
        module = nn.ModuleDict({"norm": RMSNorm(model.dim, model.norm_eps, 1 / model.width_ratio)})
        head = nn.Linear(model.dim, model.vocab_size, bias=False)
        module["head"] = _weighted(head, given.weights)
        targets = torch.zeros(given.rows, given.tokens, dtype=torch.int64)

        def loss(x: Tensor) -> Tensor:
            return next_token_loss(module["norm"](x), head.weight, targets, z_loss).total

        return _eager_footprint(loss, module, (given.rows, given.tokens, model.dim), given)


def _fused_head(given: Pass) -> Footprint:
    """The same where the loss is `phd.loss.fused_cross_entropy`, which runs on CUDA alone.

    Around it are the norm's input and output, both in float32, and the output in `dtype`.
    """
    model, rows = given.model, given.rows * given.tokens
    states, weights = rows * model.dim, model.vocab_size * model.dim
    loss = fused_loss_bytes(rows, model.dim, model.vocab_size, given.dtype, given.weights)
    narrow = states * given.dtype.itemsize if given.dtype != torch.float32 else 0
    saved = 4 * (states + rows) + states * given.dtype.itemsize + 4 * weights
    return Footprint(
        forward=8 * states + 4 * rows + narrow + loss,
        saved=saved,
        casts=0,
        backward=max(4 * (states + rows) + loss, saved + 4 * weights + 8 * states),
        gradients=0 if given.accumulates else given.weights.itemsize * weights,
    )


def _linears(block: nn.Module) -> list[Linear]:
    return [layer for layer in block.modules() if isinstance(layer, Linear)]


def _weighted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, whose matrices are given this dtype."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=dtype))
    return module


@torch.library.register_fake("phd_footprint::attention")
def _(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:  # noqa: ARG001
    B, N, Q, T, H = q.shape
    out = q.new_empty(B, T, N, Q, H).permute(0, 2, 3, 1, 4)  # as kernels lay it out
    return [out, q.new_empty(B, N, Q, T, dtype=torch.float32)]


@torch.library.register_fake("phd_footprint::attention_backward")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *result: Tensor) -> list[Tensor]:  # noqa: ARG001
    return [x.new_empty(x.shape) for x in (q, k, v)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ATTENTION(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(ATTENTION_BACKWARD(grads[0].contiguous(), *ctx.saved_tensors))


@dataclass(frozen=True)
class _Rows(RowContext):
    """The context of whole rows, whose attention is only traced."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Attention.apply(*self.rotated(q, k, v))


def _context(given: Pass, last_copy_only: bool) -> RowContext:
    """The context of a block; on the CPU with the real attention, whose operations are its own."""
    model = given.model
    K = model.K if model.copy_positions == "flattened" else 1
    cos, sin = (torch.empty(1, K, 1, given.tokens, model.head_dim) for _ in range(2))
    real = given.device == "cpu" and not given.compiled
    context = RowContext if real else _Rows
    backend = model.attention if model.attention in ("reference", "packed") else "auto"
    return context(Pattern.of(model), backend, (cos, sin), last_copy_only, None)


# Eager


def _eager_footprint(
    run: Callable[[Tensor], Tensor], module: nn.Module, shape: tuple[int, ...], given: Pass
) -> Footprint:
    """The footprint of a function of x, float32 of this shape, and of a module's weights."""
    weights = list(module.parameters())
    leaf = torch.empty(shape, requires_grad=True)
    if given.accumulates:
        for weight in weights:
            weight.grad = torch.empty_like(weight)
    live = LiveBytes()
    with live:
        x = leaf.clone()  # autograd keeps a leaf for its gradient, and this only where it is saved
        with autocast(CPU, given.dtype):
            out = run(x)
            del x
            cast = live.bytes
        forward, live.most, kept = live.most, 0, live.bytes
        out.backward(torch.empty_like(out))
    # The result is the next part's input, and counted there.
    result = out.untyped_storage().nbytes()
    new = 0 if given.accumulates else sum(w.grad.nbytes for w in weights if w.grad is not None)
    return Footprint(forward, kept - result, cast - kept, live.most - result, new)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as they exist.

    Attributes:
        bytes: of those that exist now.
        most: the most at one time, the kernels' scratch included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage_key(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in self.known | before:
                self._count(tensor)
        self.most = max(self.most, self.bytes + _scratch(func, args))
        return out

    def _count(self, tensor: Tensor) -> None:
        key, size = storage_key(tensor), tensor.untyped_storage().nbytes()
        self.known.add(key)
        self.bytes += size
        on_free(tensor, partial(self._free, key, size))

    def _free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.bytes -= size


def _scratch(func: Any, args: Any) -> int:
    """Bytes of an operation's own: dq in float32, and the exponentials that are summed."""
    if func is ATTENTION_BACKWARD:
        return 4 * args[1].numel()
    return args[0].nbytes if func is aten.logsumexp.default else 0


# Compiled


class _Line(NamedTuple):
    """Bytes that grow with the number of tokens: those of no tokens, and those of each."""

    fixed: int
    per_token: int

    def at(self, tokens: int) -> int:
        return self.fixed + self.per_token * tokens


class _Traced(NamedTuple):
    """The footprint of a compiled block, for any number of tokens.

    Attributes:
        forward, backward: of the moments of these passes.
        saved, gradients: as in `Footprint`.
    """

    forward: frozenset[_Line]
    saved: _Line
    backward: frozenset[_Line]
    gradients: int

    def at(self, tokens: int) -> Footprint:
        forward, backward = (
            max(line.at(tokens) for line in lines) for lines in (self.forward, self.backward)
        )
        return Footprint(forward, self.saved.at(tokens), 0, backward, self.gradients)


def _traced(block: nn.Module, context: RowContext, shape: tuple[int, ...], given: Pass) -> _Traced:
    """The footprint of a block that `torch.compile` compiles."""
    names, weights = zip(*block.named_parameters(), strict=True)

    layers = _linears(block) if given.rounded else []
    copies = [layer.rounded for layer in layers if layer.rounded is not None]

    def run(x: Tensor, cos: Tensor, sin: Tensor, *given_weights: Tensor) -> Tensor:
        rows = replace(context, rope=(cos, sin))
        weights = given_weights[: len(names)]
        for layer, rounded in zip(layers, given_weights[len(names) :], strict=True):
            layer.rounded = rounded
        with autocast(CPU, given.dtype):
            return functional_call(block, dict(zip(names, weights, strict=True)), (x, rows))

    x = torch.empty(shape, requires_grad=True)
    keeps = {"none": None, "full": set(), "selective": {*MATRIX_PRODUCTS, ATTENTION}}
    kept = keeps[given.recompute]
    graphs = aot_graphs(
        run, (x, *context.rope, *weights, *copies), None if kept is None else kept.__contains__
    )
    forward, backward = (
        _Liveness(graph, given.rows * given.tokens) for graph in (graphs.forward, graphs.backward)
    )
    first, *others = forward.inputs
    constant = {_key(node) for node in others}  # weights and RoPE's tables
    saved = forward.outputs[graphs.results :]
    stored = {_key(node): forward.size(node) for node in saved if _key(node) not in constant}
    # The backward graph names its inputs as the forward graph does what it saves.
    views = {node.name for node in saved if _key(node) in constant}
    gradients = _sum(map(backward.size, backward.outputs[1:]))
    return _Traced(
        forward.moments(owned=(), held=[first]),
        _sum(stored.values()),
        backward.moments(owned=[n for n in backward.inputs if n.name not in views], held=()),
        0 if given.accumulates else gradients.at(given.rows * given.tokens),
    )


def _sum(lines: Iterable[_Line]) -> _Line:
    lines = list(lines)
    return _Line(sum(line.fixed for line in lines), sum(line.per_token for line in lines))


class _Liveness:
    """When each storage of a compiled graph exists.

    Inductor gives memory to what its kernels read and write. All else is computed within the
    kernels of its readers: of mm(a + b), the sum; of mm(a).exp().sum(), both but not the exp.

    Args:
        tokens: of the trace.

    Attributes:
        inputs, outputs: nodes of tensors.
    """

    def __init__(self, graph: GraphModule, tokens: int) -> None:
        self.tokens = tokens
        self.nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        [end] = (node for node in graph.graph.nodes if node.op == "output")
        self.outputs = [node for node in tree_leaves(end.args) if isinstance(node, Node)]
        kernels = [node for node in self.nodes if node.target in KERNELS]
        made = [*self.inputs, *self.outputs, *(n for kernel in kernels for n in _results(kernel))]
        read = [node for kernel in kernels for node in kernel.all_input_nodes]
        self.stored = {_key(node) for node in (*made, *read)}

    def moments(self, owned: Iterable[Node], held: Iterable[Node]) -> frozenset[_Line]:
        """The bytes at the beginning and at each operation.

        Args:
            owned: inputs that are freed after their last use.
            held: inputs that stay, and count.
        """
        last_use = self._last_uses()
        always = {_key(node) for node in (*self.outputs, *held)}
        live = {_key(node): self.size(node) for node in (*owned, *held)}
        ignored = {_key(node) for node in self.inputs} - live.keys()
        found = {_sum(live.values())}
        for place, node in enumerate(self.nodes):
            dying = [key for key in live if key not in always and last_use.get(key, -1) <= place]
            if node.target not in KERNELS:  # its result may take the place of what it reads
                for key in dying:
                    del live[key]
            for result in _results(node):
                if (key := _key(result)) in self.stored - ignored:
                    live[key] = self.size(result)
            values = [_value(n) for n in node.args if isinstance(n, Node)]
            scratch = self._line(_scratch(node.target, values))
            found.add(_sum([*live.values(), scratch]))
            for key in dying:
                live.pop(key, None)
        return frozenset(found)

    def size(self, node: Node) -> _Line:
        """Bytes of a node's storage."""
        return self._line(_value(node).untyped_storage().nbytes())

    def _line(self, nbytes: int) -> _Line:
        per_token, rest = divmod(nbytes, self.tokens)
        return _Line(nbytes, 0) if rest else _Line(0, per_token)

    def _last_uses(self) -> dict[int, int]:
        """By storage, the place of the last node that reads it, itself or within its kernel."""
        sources: dict[Node, set[int]] = {}
        last: dict[int, int] = {}
        for node in self.inputs:
            sources[node] = {_key(node)}
        for place, node in enumerate(self.nodes):
            read = {key for source in node.all_input_nodes for key in sources[source]}
            results = _results(node)
            written = {_key(result) for result in results} & self.stored
            if written:
                last |= dict.fromkeys(read | written, place)
            for result in {node, *results}:
                sources[result] = written or read
        return last


def _results(node: Node) -> list[Node]:
    """The tensors that a node returns, as nodes."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node]
    return [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]


def _value(node: Node) -> Any:
    return node.meta["val"]


def _key(node: Node) -> int:
    return storage_key(_value(node))
