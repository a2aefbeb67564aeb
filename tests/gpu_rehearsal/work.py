"""What each kernel of a training run works on: its layer, the bytes it moves, and its multiplications and additions.

Everything is read off the tensors that an operation is given and returns, so nothing here is measured. An operation
reads each of its arguments once and writes each of its results once, however often a real kernel goes back to them. One
that changes a tensor in place reads and writes it. A view moves nothing. Kernels in Triton, the package's and
Inductor's, are counted one by one, each by the tensors that it is given. Only convolutions and matrix products have
their arithmetic counted, an addition and a multiplication as two operations, as in `cifar_fast.experiments.arithmetic`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves

import cifar_fast.training.step as step_module
from cifar_fast.hardware.cuda_graph import CapturedFunction
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.optim import Muon
from cifar_fast.training.step import Update
from gpu_rehearsal.calls import WORK, calls, n_calls

aten = torch.ops.aten

NAMESPACE = "cifar_fast"
"""Of the package's own operators: their arguments and results are counted, whatever they do inside."""
OWN_KERNELS = "fused pool, norm and activation"
"""The family of the package's own Triton kernels."""
NETWORK = "network"
"""The layer of all kernels of a compiled network: the compiler fuses across layers."""
TRANSFERS = ("copy from pinned memory", "copy from pageable memory", "copy to the host")
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
COPIES = {aten._to_copy, aten.copy_, aten.clone, aten.cat, aten._foreach_copy_}
POOLS = {
    aten.max_pool2d_with_indices,
    aten.max_pool2d_with_indices_backward,
    aten.adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward,
}
GATHERS = {aten.index, aten.gather, aten.index_select}
"""Operations that read as much of their first argument as they return."""
ONLY_WRITTEN = {aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_, aten._foreach_zero_}
"""Operations that write the tensor they change without reading it."""
NOT_READ = {
    aten.zeros_like: (0,),
    aten.ones_like: (0,),
    aten.full_like: (0,),
    aten.new_zeros: (0,),
    aten.new_ones: (0,),
    aten.new_full: (0,),
    aten.max_pool2d_with_indices_backward: (1,),  # the indices say where its input had the maximum
    aten.adaptive_max_pool2d_backward: (1,),
    aten.nll_loss_backward: (1,),
}
"""Positions of arguments that only lend their shape."""
NOT_WRITTEN = {aten._fused_sgd_: ("grads",)}
"""Arguments that the signature allows to change, and that stay as they are without a gradient scaler."""


@dataclass(frozen=True)
class Kernel:
    """One launch, and what it works on."""

    layer: str
    """A layer of the network, or `set-up`, `batch`, `loss`, `optimiser`."""
    direction: str
    """`forward` or `backward`; empty outside of the two."""
    family: str
    what: str
    """The operation, and the shape of its result or of its factors."""
    n_bytes: int
    """Read and written."""
    flop: int


@dataclass(frozen=True)
class _Place:
    """Where in a training step an operation happens."""

    layer: str
    direction: str
    kind: str
    """Of the innermost module: `norm`, `activation`, or empty."""


# ---- Bytes and arithmetic ----


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; those that a broadcast repeats count once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n if stride or not n else 1 for n, stride in sides) * tensor.element_size()


def _on_device(value: Any) -> list[Tensor]:
    """Return the CUDA tensors in a value, each once."""
    found = {}
    for each in tree_leaves(value):
        if isinstance(each, Tensor) and each.is_cuda:
            found[each.data_ptr(), each.shape, each.stride(), each.dtype] = each
    return list(found.values())


def moved(operation: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes that an operation on CUDA tensors reads and writes."""
    packet, signature = operation.overloadpacket, operation._schema.arguments
    read, written = [], []
    for position, argument in enumerate(signature):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if changes and argument.name not in NOT_WRITTEN.get(packet, ()):
            written.append(value)
            if argument.is_out or packet in ONLY_WRITTEN:
                continue
        if position not in NOT_READ.get(packet, ()):
            read.append(value)
    results = _on_device(result)
    if packet in GATHERS:
        return sum(map(size, _on_device(read[1:]))) + 2 * sum(map(size, results))
    changed = _on_device(written)
    places = {each.data_ptr() for each in changed if each.numel()}
    new = [each for each in results if each.data_ptr() not in places]
    return sum(map(size, [*_on_device(read), *changed, *new]))


def product_flop(packet: Any, args: tuple) -> int:
    """Return the operations of a matrix product: twice the elements of the first factor times the other's columns."""
    first, second = args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
    return 2 * first.numel() * second.shape[-1]


def convolution_parts(args: tuple, result: Any, names: list[str]) -> list[tuple[int, int]]:
    """Return bytes and operations of each kernel that cuDNN's stand-in launched for a convolution or its gradients.

    `names` are those of the kernels; a gradient takes as many operations as the convolution itself.
    """
    if isinstance(result, Tensor):
        (x, weight), y = args[:2], result
        gradients: tuple[Tensor | None, ...] = (None, None, None)
    else:
        y, x, weight = args[:3]
        gradients = result
    flop = 2 * y.numel() * weight[0].numel()

    def part(name: str) -> tuple[int, int]:
        if "converts the layout" in name:
            return 2 * size(y if "gradient" in name else x), 0
        if name == "cudnn bias":
            return 2 * size(y), 0
        if name == "cudnn bias, gradient":
            return size(y), 0
        if "gradient of the input" in name:
            assert gradients[0] is not None
            return size(y) + size(weight) + size(gradients[0]), flop
        if "gradient of the weights" in name:
            assert gradients[1] is not None
            return size(y) + size(x) + size(gradients[1]), flop
        return size(x) + size(weight) + size(y), flop

    return [part(name) for name in names]


# ---- Who launched what ----


class Recorder(TorchDispatchMode):
    """Notes for every call of the runtime which operation, of which layer, made it; `install` it once in a process.

    The mode sees each operation of forward, backward and optimiser, also those that Inductor leaves to torch. Kernels
    that Inductor generates are noted as they are launched. The nodes of autograd's graph remember the module that made
    them, so that each kernel of the backward pass belongs to a layer, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[int, Kernel] = {}
        """By the number of the call."""
        self.graphs: list[tuple[str, int]] = []
        """Of each captured function: its stage, `batch` or `optimiser`, and the number of its capture."""
        self._stage = "set-up"
        self._modules: list[_Place] = []
        self._last_backward = _Place("loss", "backward", "")
        self._training_set: set[int] = set()
        self._resumes = False

    # -- where --

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Attribute to `stage` what happens outside of modules."""
        before, self._stage = self._stage, stage
        try:
            yield
        finally:
            self._stage = before

    def _place(self) -> _Place:
        if torch._C._current_graph_task_id() == -1:
            return self._modules[-1] if self._modules else _Place(self._stage, "forward" * (self._stage == "loss"), "")
        # Where a tensor has two gradients, autograd adds them between nodes: the sum goes to the node before.
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            self._last_backward = node.metadata.get("place", _Place("loss", "backward", ""))
        return self._last_backward

    def call_module(self, name: str, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a module, attribute to it what happens inside, and mark the nodes of its part of autograd's graph."""
        parts = name.split(".")
        layer = parts[1] if len(parts) > 1 else parts[0]
        kind = "norm" if isinstance(module, _BatchNorm) else "activation" if parts[-1] == "activation" else ""
        self._modules.append(_Place(layer, "forward", kind))
        try:
            result = call(*args, **kwargs)
        finally:
            self._modules.pop()
        _mark(result, _Place(layer, "backward", kind))
        return result

    # -- what --

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        begin = n_calls()
        result = operation(*args, **kwargs)
        end = n_calls()
        if end > begin:
            self._note(begin, end, operation, args, kwargs, result)
        return result

    def _note(self, begin: int, end: int, operation: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        launched = {
            number: call
            for number, call in enumerate(calls(begin, end), begin)
            if call.kind in (*WORK, *TRANSFERS) and number not in self.kernels  # the package's own kernels are
        }
        if not launched:
            return
        packet, place = operation.overloadpacket, self._place()
        family = _family(operation, place)
        what = f"{operation.namespace}::{packet.__name__} {_shapes(result if _on_device(result) else args)}"
        if operation in CONVOLUTIONS:
            names = [call.name for call in launched.values()]
            for (number, call), (n_bytes, flop) in zip(
                launched.items(), convolution_parts(args, result, names), strict=True
            ):
                kind = family if flop else "cast or copy" if "layout" in call.name else "bias"
                self._add(number, place, kind, call.name, n_bytes, flop)
            return
        n_bytes = moved(operation, args, kwargs, result)
        flop = product_flop(packet, args) if packet in PRODUCTS else 0
        # Each kernel of an operation over many tensors has its share of them. Of others the first has all.
        shares = len(launched) if packet.__name__.startswith(("_foreach_", "_fused_")) else 1
        for order, (number, call) in enumerate(launched.items()):
            if call.kind in TRANSFERS:
                self._add(number, place, call.kind, what, call.n_bytes, 0)
            elif order < shares:
                self._add(number, place, family, what, n_bytes // shares, flop // shares)
            else:
                self._add(number, place, family, f"{what}, another kernel", 0, 0)

    def _add(self, number: int, place: _Place, family: str, what: str, n_bytes: int, flop: int) -> None:
        self.kernels[number] = Kernel(place.layer, place.direction, family, what, n_bytes, flop)

    def _note_inductors(self, begin: int, kernel: Any, args: tuple) -> None:
        """Note a kernel that Inductor generated, by the tensors that it was given."""
        tensors = list(zip(kernel.fn.arg_names, args, strict=False))
        given = [(name, each) for name, each in tensors if isinstance(each, Tensor) and each.is_cuda]
        others = [each.numel() for _, each in given if each.untyped_storage().data_ptr() not in self._training_set]
        n_bytes = 0
        for name, each in given:
            if each.untyped_storage().data_ptr() in self._training_set:  # it gathers a batch
                n_bytes += max(others, default=0) * each.element_size()
            else:
                n_bytes += (2 if name.startswith("in_out") else 1) * size(each)
        name = kernel.fn.__name__
        family = "fused by Inductor" + ", gradient of a max-pool" * ("max_pool2d_with_indices_backward" in name)
        for number, call in enumerate(calls(begin), begin):
            if call.kind in WORK:
                self._add(number, self._place(), family, name, n_bytes, 0)
                n_bytes = 0

    def _note_own(self, begin: int, kernel: Any, args: tuple) -> None:
        """Note a Triton kernel of the package, which reads or writes each tensor that it is given once."""
        n_bytes = sum(map(size, _on_device(args)))
        for number, call in enumerate(calls(begin), begin):
            if call.kind in WORK:
                self._add(number, self._place(), OWN_KERNELS, kernel.__name__, n_bytes, 0)

    # -- how it watches --

    def install(self) -> None:
        """Watch the training code of this process for good; enter the mode separately, once all is compiled."""
        from torch._inductor.output_code import CompiledFxGraph
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        recorder, capture, replay = self, CapturedFunction.__init__, CapturedFunction.__call__
        forward_backward, draw, run = step_module.forward_backward, TrainBatches.choices, CachingAutotuner.run
        run_graph, run_own, step = CompiledFxGraph.__call__, JITFunction.run, Muon.step

        def stage_of(function: Any) -> str:
            return "optimiser" if isinstance(function, Update) else "batch"

        def init(self: Any, function: Any, *inputs: Tensor, **kwargs: Any) -> None:
            self.stage = stage_of(function)
            begin = n_calls()
            called = recorder.compiled(function) if hasattr(function, "_torchdynamo_orig_callable") else function
            with recorder.within(self.stage):
                capture(self, called, *inputs, **kwargs)
            recorder.graphs.append((self.stage, max(call.capture for call in calls(begin))))

        def call(self: Any, *arguments: Tensor) -> Any:
            with recorder.within("batch"):  # the graph's arguments are copied to where it reads them
                return replay(self, *arguments)

        def watched(model: nn.Module, *arguments: Any) -> Any:
            with recorder.within("loss"):
                if hasattr(model, "_orig_mod"):
                    *others, score = arguments
                    return forward_backward(_Compiled(recorder, model), *others, score and recorder.compiled(score))
                with recorder._naming(model):
                    return forward_backward(model, *arguments)

        def move(self: Any) -> None:
            compiled = vars(self).get("update")
            if compiled is None:
                return step(self)
            self.update = recorder.compiled(compiled)
            try:
                step(self)
            finally:
                self.update = compiled

        def choices(self: Any, epoch: int) -> Any:
            recorder._training_set = {each.untyped_storage().data_ptr() for each in (self.all_images, self.all_labels)}
            with recorder.within("batch"):
                return draw(self, epoch)

        def launch(self: Any, *arguments: Any, **kwargs: Any) -> Any:
            begin = n_calls()
            result = run(self, *arguments, **kwargs)
            recorder._note_inductors(begin, self, arguments)
            return result

        def launch_own(self: Any, *arguments: Any, **kwargs: Any) -> Any:
            begin = n_calls()
            result = run_own(self, *arguments, **kwargs)
            recorder._note_own(begin, self, arguments)
            return result

        def graph(self: Any, inputs: Any) -> Any:
            is_on = recorder in _get_current_dispatch_mode_stack()
            with recorder if recorder._resumes and not is_on else nullcontext():
                return run_graph(self, inputs)

        CapturedFunction.__init__, CapturedFunction.__call__ = init, call  # type: ignore[method-assign]
        step_module.forward_backward, TrainBatches.choices = watched, choices  # type: ignore
        Muon.step = move  # type: ignore[method-assign]
        CachingAutotuner.run, CompiledFxGraph.__call__ = launch, graph  # type: ignore[method-assign]
        JITFunction.run = launch_own

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled function that is looked up without this mode, and watched once it is found.

        Torch would not recognise what it has compiled while a mode is on, and compiles nothing then.
        """

        def call(*args: Any) -> Any:
            before, self._resumes = self._resumes, self in _get_current_dispatch_mode_stack()
            try:
                with _disable_current_modes():
                    return function(*args)
            finally:
                self._resumes = before

        return call

    @contextmanager
    def _naming(self, model: nn.Module) -> Iterator[None]:
        """Know the modules of `model` by their names. Hooks would do it too, but layers with a hook are never fused."""
        names = {id(module): name for name, module in model.named_modules() if name}
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(module) not in names:
                return original(module, *args, **kwargs)
            return self.call_module(names[id(module)], module, original, module, *args, **kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    # -- what was seen --

    def between(self, begin: int, end: int, capture: int = 0) -> Counter[Kernel]:
        """Count the kernels and transfers between two marks that were executed, or recorded by a capture.

        Raises `AssertionError` when one of them belongs to no operation.
        """
        found: Counter[Kernel] = Counter()
        for number, call in enumerate(calls(begin, end), begin):
            if call.kind in (*WORK, *TRANSFERS) and call.capture == capture:
                assert number in self.kernels, f"nobody knows who launched {call.name or call.kind}"
                found[self.kernels[number]] += 1
        return found


class _Compiled(nn.Module):
    """A compiled network whose kernels are counted as those of one layer."""

    def __init__(self, recorder: Recorder, model: nn.Module) -> None:
        super().__init__()
        self.model, self.recorder = model, recorder

    def forward(self, *args: Any) -> Any:
        return self.recorder.call_module(NETWORK, self, self.recorder.compiled(self.model), *args)


def _mark(result: Any, place: _Place) -> None:
    """Note in the nodes of autograd's graph behind a module's result where they belong, up to those that are marked."""
    todo: list[Any] = [
        each.grad_fn for each in tree_leaves(result) if isinstance(each, Tensor) and each.grad_fn is not None
    ]
    while todo:
        node = todo.pop()
        if "place" not in node.metadata:
            node.metadata["place"] = place
            todo += [following for following, _ in node.next_functions if following is not None]


def _family(operation: Any, place: _Place) -> str:
    packet = operation.overloadpacket
    if operation.namespace == NAMESPACE:
        return f"{NAMESPACE}::{packet.__name__}"
    if operation in CONVOLUTIONS:
        return "convolution"
    if packet in PRODUCTS:
        return "matrix product"
    if place.kind:
        return place.kind
    if packet in POOLS:
        return "pooling"
    if packet in COPIES:
        return "cast or copy"
    return {"batch": "augmentation", "loss": "loss", "optimiser": "update"}.get(place.layer, "elementwise")


def _shapes(value: Any) -> str:
    tensors = _on_device(value)
    if not tensors:
        return ""
    first = f"{str(tensors[0].dtype).removeprefix('torch.')} {tuple(tensors[0].shape)}"
    return first + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
