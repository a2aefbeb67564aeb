"""Which operations move a tensor's bytes only to change their dtype or their order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def conversion(operation: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """Return in words what an operation on CUDA tensors converts; empty: nothing.

    Convolutions count too where input and weights, or gradient and weights, differ in layout: cuDNN converts one first.
    """
    if operation is aten.convolution.default:
        return _mismatch("input", args[0], args[1])
    if operation is aten.convolution_backward.default:
        return _mismatch("gradient", args[0], args[2])
    if operation is aten._to_copy.default:
        source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        layout = _asked_layout(source, kwargs.get("memory_format"))
    elif operation is aten.clone.default:
        source, dtype = args[0], args[0].dtype
        layout = _asked_layout(source, kwargs.get("memory_format"))
    elif operation is aten.copy_.default:
        target, source = args[0], args[1]
        dtype, layout = target.dtype, _layout(target)
    else:
        return ""
    if not source.is_cuda or (operation is aten._to_copy.default and _leaves_the_device(kwargs)):
        return ""
    changes = []
    if dtype != source.dtype:
        changes.append(f"{source.dtype} to {dtype}".replace("torch.", ""))
    if source.dim() == 4 and layout and _layout(source) and layout != _layout(source):
        changes.append(f"{_layout(source)} to {layout}")
    return " and ".join(changes)


def _leaves_the_device(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != "cuda"


def _mismatch(what: str, tensor: Tensor, weight: Tensor) -> str:
    mine, other = _layout(tensor), _layout(weight)
    return f"{what} of a convolution from {mine} to {other}" if mine and other and mine != other else ""


def _layout(tensor: Tensor) -> str:
    """Return the order of a tensor's dimensions in memory; empty: both orders fit, or neither does."""
    first = tensor.is_contiguous()
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if first == last:
        return ""
    return "channels first" if first else "channels last"


def _asked_layout(source: Tensor, memory_format: torch.memory_format | None) -> str:
    if memory_format == torch.channels_last:
        return "channels last"
    if memory_format == torch.contiguous_format:
        return "channels first"
    return _layout(source)
