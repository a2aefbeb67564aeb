"""Numeric mode: the arithmetic of CUDA tensors, done on the CPU in the memory that they have."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_rehearsal.calls import launch
from gpu_rehearsal.conversions import conversion

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)

TORCHS_OWN = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.is_pinned.default,
    aten._pin_memory.default,
    aten.record_stream.default,
    aten.is_same_size.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten._has_compatible_shallow_copy_type.default,
}
"""Operations without arithmetic, which torch does as it would on a GPU."""
WAITING = {
    aten.nonzero.default,
    aten.bincount.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.linalg_eigh.default,
    aten._linalg_eigh.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose shape or error depends on values, so that they wait for the device."""
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
IN_HALF_PRECISION = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
}
"""Products whose terms a GPU adds up in float32, whatever the format of the factors."""
FUSED_SGD = {aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr}

Recorded = tuple[Any, tuple, dict[str, Any], "list[tuple[int, Tensor]] | None"]
"""An operation, the arguments it reads again at each replay, and where its results go; None: it is called as it is."""


_name = functools.cache(str)


@functools.cache
def _is_composite(operation: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_view(operation: Any) -> bool:
    results, arguments = operation._schema.returns, operation._schema.arguments
    aliases = results and all(each.alias_info is not None and not each.alias_info.is_write for each in results)
    return bool(aliases) and not any(each.alias_info is not None and each.alias_info.is_write for each in arguments)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    buffer = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    memory = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


class SimulatedGPU(TorchDispatchMode):
    """A context in which CUDA tensors have their numbers.

    Views, allocations, streams, events and captures are torch's own and fail as they would on a GPU. While a stream is
    being captured, an operation is recorded with the addresses and numbers that it was called with, and whatever it
    changed is put back; a replay does it again. Reading a number, or copying from or to the host, synchronises the
    stream, which the fake runtime refuses in a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        """How often each operation was called for CUDA tensors; a recorded one once, when it was recorded."""
        self.replayed = 0
        """Operations done by replays."""
        self.conversions: Counter[str] = Counter()
        """Changes of dtype or memory layout, by what changed; a recorded one once."""
        self.copies: Counter[str] = Counter()
        """Copies between host and device, by direction and kind of memory."""
        self._recording: list[Recorded] | None = None
        self._changed: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._graphs: dict[int, list[Recorded]] = {}
        self._replaced: dict[str, Callable] = {}
        self._depth = 0

    # ---- Graphs ----

    def __enter__(self) -> SimulatedGPU:
        self._depth += 1
        if self._depth == 1:
            self._watch_graphs()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for name, method in self._replaced.items():
                setattr(torch.cuda.CUDAGraph, name, method)
        super().__exit__(*error)

    def _watch_graphs(self) -> None:
        graph_class = torch.cuda.CUDAGraph
        self._replaced = {
            name: getattr(graph_class, name) for name in ("capture_begin", "capture_end", "replay", "reset")
        }
        begin, end, replay, reset = self._replaced.values()

        def capture_begin(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
            begin(graph, *args, **kwargs)
            self._recording, self._changed = [], {}

        def capture_end(graph: torch.cuda.CUDAGraph) -> None:
            recorded, self._recording = self._recording, None
            # A capture executes nothing. Backwards: a tensor may have been changed through a view before it was noted.
            for there, before in reversed(self._changed.values()):
                there.copy_(before)
            self._changed = {}
            end(graph)
            assert recorded is not None
            self._graphs[id(graph)] = recorded

        def replay_recorded(graph: torch.cuda.CUDAGraph) -> None:
            replay(graph)
            for recorded in self._graphs[id(graph)]:
                self._do_again(*recorded)

        def forget(graph: torch.cuda.CUDAGraph) -> None:
            self._graphs.pop(id(graph), None)
            reset(graph)

        for name, method in zip(self._replaced, (capture_begin, capture_end, replay_recorded, forget), strict=True):
            setattr(graph_class, name, method)

    def _is_recording(self) -> bool:
        return self._recording is not None and torch.cuda.is_current_stream_capturing()

    def _do_again(self, operation: Any, args: tuple, kwargs: dict[str, Any], results: list | None) -> None:
        self.replayed += 1
        if results is None:
            operation(*args, **kwargs)
            return
        found = list(_leaves(_call(operation, args, kwargs)))
        for number, there in results:
            there.copy_(found[number])

    # ---- Operations ----

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        flat = list(_leaves((args, kwargs)))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if operation.namespace == "c10d":  # the fake NCCL computes
            self.operations[str(operation)] += 1
            if self._is_recording():
                self._recording.append((operation, args, kwargs, None))
            return operation(*args, **kwargs)
        wants_cuda = any(isinstance(value, torch.device) and value.type == "cuda" for value in flat)
        if not wants_cuda and not any(tensor.is_cuda for tensor in tensors):
            return operation(*args, **kwargs)
        if operation not in TORCHS_OWN and _is_composite(operation):  # in inference mode these arrive whole
            with self:
                return operation.decompose(*args, **kwargs)
        if operation in TORCHS_OWN or _is_view(operation):
            return operation(*args, **kwargs)
        self.operations[_name(operation)] += 1
        if change := conversion(operation, args, kwargs):
            self.conversions[change] += 1
        if operation in (aten._local_scalar_dense.default, aten.item.default):
            _wait()
            return on_cpu(args[0]).item()
        if operation in (aten._to_copy.default, aten.copy_.default):
            return self._copy(operation, args, kwargs)
        if operation is aten._foreach_copy_.default and not all(source.is_cuda for source in args[1]):
            for target, source in zip(*args[:2], strict=True):  # what torch does between devices
                self._copy(aten.copy_.default, (target, source), kwargs)
            return None
        self._require_what_kernels_require(operation, args, kwargs, tensors)
        masked = operation in BY_MASK and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if masked or operation in WAITING:
            _wait()
        return self._compute(operation, args, kwargs)

    @staticmethod
    def _require_what_kernels_require(operation: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        """Raise where a CUDA kernel would and a CPU kernel does not."""
        for tensor in tensors:
            if not tensor.is_cuda and tensor.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {operation} got {tuple(tensor.shape)} on the CPU"
                )
        if operation in FUSED_SGD:
            for parameter, *others in zip(*(tensors for tensors in args[:3] if tensors), strict=True):
                if any(not _same_layout(parameter, other) or other.dtype != parameter.dtype for other in others):
                    raise RuntimeError(
                        "fused SGD: a parameter differs from its gradient or momentum in layout or dtype"
                    )
            rate = kwargs.get("lr")
            if isinstance(rate, Tensor) and (rate.dtype != torch.float32 or not rate.is_cuda):
                raise RuntimeError("fused SGD reads its learning rate as float32 on the device")

    def _copy(self, operation: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Copy between devices as CUDA does: from and to the host only pinned memory does not wait."""
        is_in_place = operation is aten.copy_.default
        target, source = (args[0], args[1]) if is_in_place else (None, args[0])
        device = target.device if is_in_place else torch.device(kwargs.get("device") or source.device)
        if source.is_cuda and device.type == "cuda":
            return self._compute(operation, args, kwargs)
        if source.is_cuda:
            self.copies["copy to the host"] += 1
            _wait()
            there = on_cpu(source)
            return target.copy_(there) if is_in_place else there.to(dtype=kwargs.get("dtype"), copy=True)
        is_pinned = source.is_pinned()
        self.copies[f"copy from {'pinned' if is_pinned else 'pageable'} memory"] += 1
        may_run_ahead = is_pinned and (args[2] if is_in_place and len(args) > 2 else kwargs.get("non_blocking"))
        if not may_run_ahead or torch.cuda.is_current_stream_capturing():
            _wait()
        if not is_in_place:
            memory_format = kwargs.get("memory_format") or torch.preserve_format
            source = source.to(dtype=kwargs.get("dtype"), memory_format=memory_format, copy=True)
            target = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype, device=device)
        on_cpu(target).copy_(source)
        return target

    def _compute(self, operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        near_args, near_kwargs = _mapped(_near, args), _mapped(_near, kwargs)
        near_kwargs.pop("pin_memory", None)
        written = {tensor.data_ptr(): tensor for tensor in _written(operation, args, kwargs)}
        is_recording = self._is_recording()
        for tensor in written.values() if is_recording else ():
            place = (tensor.data_ptr(), tensor.size(), tensor.stride())
            if place not in self._changed:
                there = on_cpu(tensor)
                self._changed[place] = there, there.clone()
        launch(_name(operation))  # which the fake runtime checks as it does any kernel
        found = _call(operation, near_args, near_kwargs)
        device = next((value.device for value in _leaves((args, kwargs)) if _is_cuda(value)), "cuda")
        results: list[tuple[int, Tensor]] = []
        numbers = itertools.count()

        def on_gpu(value: Any) -> Any:
            number = next(numbers)
            if not isinstance(value, Tensor):
                return value
            if value.numel() and value.data_ptr() in written:
                return written[value.data_ptr()]
            new = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            there = on_cpu(new)
            there.copy_(value)
            results.append((number, there))
            return new

        made = _mapped(on_gpu, found)
        if is_recording:
            self._recording.append((operation, near_args, near_kwargs, results))
        return made


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a copy of a nest of tuples, lists and dictionaries with `function` applied to what is in it."""
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, each) for each in value)
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in value.items()}
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in a nest of tuples, lists and dictionaries, in the order of `_mapped`."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        yield value
        return
    for each in value:
        yield from _leaves(each)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _wait() -> None:
    torch.cuda.current_stream().synchronize()  # which the fake runtime refuses in a capture


def _near(value: Any) -> Any:
    if _is_cuda(value):
        return on_cpu(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return all(i == j for i, j, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1)


def _written(operation: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments that the operation changes."""
    found: list[Tensor] = []
    for position, name in _written_arguments(operation):
        value = args[position] if position < len(args) else kwargs.get(name)
        found += [each for each in _leaves(value) if isinstance(each, Tensor)]
    return found


@functools.cache
def _written_arguments(operation: Any) -> list[tuple[int, str]]:
    arguments = enumerate(operation._schema.arguments)
    return [(position, each.name) for position, each in arguments if each.alias_info and each.alias_info.is_write]


def _call(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on CPU tensors; those that only CUDA has are computed by their equals."""
    if operation is aten.cudnn_batch_norm.default:
        return *aten.native_batch_norm(*args), torch.empty(0, dtype=torch.uint8)
    if operation is aten.cudnn_batch_norm_backward.default:
        x, gradient, weight, mean, variance, batch_mean, batch_deviation, eps, _ = args
        statistics = (mean, variance, batch_mean, batch_deviation)
        return aten.native_batch_norm_backward(gradient, x, weight, *statistics, True, eps, [True, True, True])
    half = next((x.dtype for x in args if isinstance(x, Tensor) and x.dtype in HALF), None)
    if operation in IN_HALF_PRECISION and half:
        widened = _mapped(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, args)
        return _mapped(lambda x: x.to(half) if isinstance(x, Tensor) else x, operation(*widened, **kwargs))
    return operation(*args, **kwargs)
