"""Batch norm and the activation after it on a CPU, in as few passes over memory as there can be.

Both are cheap to compute and dear to fetch: on their own they read or write an image tensor thirteen times, forward
and backward, and a CPU waits for its memory. Together they do it eight times for ReLU, nine for an activation whose
slope is dear to compute. With the normalised u = (x - m) / sqrt(v + eps),

    y = act(t),  t = w u + b,

a first pass takes the mean m and variance v of each channel, a second writes y. Nothing but x is kept: backward
computes t again, which costs less than to fetch it. With dt = dy act'(t), a first pass takes db = sum dt and
dw = sum dt u (and keeps dt in the place of dx, unless act is ReLU), and as m and v depend on every x of the group, a
second writes

    dx = w / sqrt(v + eps) (dt - db / n - u dw / n).

Source of the gradient: Ioffe and Szegedy, "Batch normalization", 2015, arXiv 1502.03167. `fused.c` holds the loops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cifar_fast.kernels.compile import FLOAT, INT, LONG, POINTER, Library

DTYPES = (torch.float32, torch.bfloat16)
"""Number formats that the compiled loops know."""

ACTIVATIONS = {nn.ReLU: 0, nn.SiLU: 1, nn.GELU: 2, nn.CELU: 3}
"""Activations that the compiled loops know, by their number there."""

_KIND = [INT, INT, INT, FLOAT, INT]  # channels, activation, whether bfloat16, alpha, threads

LIBRARY = Library(
    "fused.c",
    {
        "forward": (None, [POINTER] * 4 + [FLOAT] + [POINTER] * 4 + [LONG] * 2 + _KIND),
        "evaluate": (None, [POINTER] * 3 + [LONG] + _KIND),
        "backward": (None, [POINTER] * 5 + [FLOAT] + [POINTER] * 6 + [LONG] * 2 + _KIND),
    },
)
available = LIBRARY.available


def suits(x: Tensor, norm: nn.BatchNorm2d, activation: nn.Module) -> bool:
    """Return whether the compiled loops take this: a CPU's float32 or bfloat16 images, channels-last, and an
    activation that they know; outside training, only where no gradient is asked for."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and norm.weight.dtype == torch.float32
        and type(activation) in ACTIVATIONS
        and getattr(activation, "approximate", "none") == "none"
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (norm.training or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and available()[0]
    )


def watched(*modules: nn.Module) -> bool:
    """Return whether somebody has a hook on one of them, and so has to see it called."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in modules for kind in kinds)


def normalise_and_activate(
    x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module, *, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group of images by its own statistics and apply `activation`; differentiable.

    Args:
        x: images (N, C, H, W) that `suits` has found to suit; N must be a multiple of `group_size`.
        weight: scale (C,), float32.
        bias: (C,), float32.
        activation: one of `ACTIVATIONS`.
        group_size: images in a group.
        eps: added to the variance.

    Returns:
        The result (N, C, H, W), and of each group the mean and the biased variance, float32 (N / group_size, C).
    """
    y, mean, variance = NormActivation.apply(x, weight, bias, activation, group_size, eps)
    return y, mean, variance


def apply_and_activate(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    """Return `activation((x - mean) * scale + bias)` of images (N, C, H, W), the others being (C,); no gradient."""
    y, now = torch.empty_like(x), torch.stack([mean, scale, bias])
    LIBRARY.functions.evaluate(x.data_ptr(), y.data_ptr(), now.data_ptr(), _rows(x), *_kind(x, activation))
    return y


class NormActivation(torch.autograd.Function):
    """The two at once, with their gradient; the functions above check that the arguments fit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module, group_size: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result and each group's statistics."""
        groups, channels = x.shape[0] // group_size, x.shape[1]
        y = torch.empty_like(x)
        mean, variance = torch.empty(2, groups, channels)
        sums, room = _scratch(channels, 4)
        LIBRARY.functions.forward(
            x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, mean.data_ptr(), variance.data_ptr(),
            sums.data_ptr(), room.data_ptr(), groups, _rows(x) // groups, *_kind(x, activation),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.activation, ctx.eps = activation, eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, mean, variance = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        groups, channels = mean.shape
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty(2, groups, channels)
        sums, room = _scratch(channels, 5)
        LIBRARY.functions.backward(
            x.data_ptr(), dy.data_ptr(), dx.data_ptr(), weight.data_ptr(), bias.data_ptr(), ctx.eps, mean.data_ptr(),
            variance.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), sums.data_ptr(), room.data_ptr(), groups,
            _rows(x) // groups, *_kind(x, ctx.activation),
        )  # fmt: skip
        dw, db = (d.sum(0) if ctx.needs_input_grad[i] else None for i, d in enumerate((dweight, dbias), start=1))
        return dx, dw, db, None, None, None


def _rows(x: Tensor) -> int:
    """Pixels of all images."""
    return x.numel() // x.shape[1]


def _kind(x: Tensor, activation: nn.Module) -> tuple[int, int, int, float, int]:
    """What the loops ask of every call: channels, activation, whether bfloat16, alpha, threads."""
    alpha = getattr(activation, "alpha", 1.0)
    return x.shape[1], ACTIVATIONS[type(activation)], x.dtype == torch.bfloat16, alpha, torch.get_num_threads()


def _scratch(channels: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sums in double precision and room for `rows` values a channel, for each thread."""
    threads = torch.get_num_threads()
    return torch.empty(threads, 2, channels, dtype=torch.float64), torch.empty(threads, rows, channels)
