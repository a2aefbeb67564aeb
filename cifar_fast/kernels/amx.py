"""3x3 convolution with AMX, the matrix unit of some CPUs, in bfloat16 with float32 sums, with or without max-pool.

AMX keeps matrices in registers called tiles. One instruction multiplies a tile of 16 x 32 numbers by one of 32 x 16:
so much arithmetic that most of the time goes into loading the tiles. So the question is what a row of a tile should
be. If rows follow the pixels of an image, they run over its border: a quarter of the tiles for 7 x 7 pixels is padding,
and the pixels that a filter sees outside the image are multiplied as zeros. Here the 16 rows are the same pixel of 16
images. A tap outside the image is then outside for all 16, and left out: at 7 x 7 pixels that saves 18 % of the direct
algorithm's multiplications, at 3 x 3 pixels 40 %. Where max-pool by 2 follows, pixels that fill no window are not
computed at all.

In the forward pass each output pixel is a sum over the nine taps of (images x input channels) by (input channels x
output channels). The images' gradient is the same with flipped filters whose channels are exchanged. The filters'
gradient is, for each tap, a sum over pixels of (output channels x images) by (images x input channels). Max-pool takes
the float32 sums before anything is written, and stores the place of each maximum in a byte; in the backward pass each
gradient counts at its place, and as zero at the other places of its window.

Instructions: Intel, "Architecture instruction set extensions programming reference", chapter on AMX. `amx.c` holds the
loops; the machine's C compiler builds it once, on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cifar_fast.kernels.compile import INT, LONG, POINTER, Library, address

LINE = 32
"""Channels, and images, that are processed together: two tiles of 16."""

CACHE_BYTES = 1_200_000
"""What the filters' gradient packs at a time; it fits in a core's second-level cache (2 MB on machines with AMX)."""


LIBRARY = Library(
    "amx.c",
    {
        "convolve_scratch": (LONG, [INT] * 3),
        "gradient_scratch": (LONG, [INT] * 5),
        "pack_filters": (None, [POINTER] * 2 + [INT] * 4),
        "convolve": (None, [POINTER] * 6 + [INT] * 8),
        "weight_gradient": (None, [POINTER] * 6 + [INT] * 9),
        "multiply_in_registers": (None, [LONG, INT]),
    },
    not_permitted="this processor, its compiler or its operating system does not support AMX in bfloat16",
)
available = LIBRARY.available


def amx_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with 3x3 filters, stride 1, padding 1, no bias; differentiable like `F.conv2d`.

    Args:
        x: images (N, C_in, H, W), channels-last on a CPU: bfloat16, or what bfloat16 autocast would turn into it.
            Anything else goes to `F.conv2d`.
        weight: filters (C_out, C_in, 3, 3); they are rounded to bfloat16; their gradient keeps the format they came in.

    Returns:
        bfloat16 (N, C_out, H, W), equal to `F.conv2d(x, weight, padding=1)` up to rounding.
    """
    if not _suits(x, weight):
        return F.conv2d(x, weight, padding=1)
    return AmxConv2d.apply(x.bfloat16(), weight, False)


def amx_conv2d_max_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve like `amx_conv2d` with a fused max-pool by 2: the large image in between is never in memory.

    Args:
        x: images (N, C_in, H, W), as for `amx_conv2d`.
        weight: filters (C_out, C_in, 3, 3).

    Returns:
        bfloat16 (N, C_out, H // 2, W // 2), equal to `F.max_pool2d(amx_conv2d(x, weight), 2)`, except that the
        maximum is taken before rounding: of two values that round to the same, the larger one gets the gradient.
    """
    if not _suits(x, weight) or min(x.shape[2:]) < 2:
        return F.max_pool2d(F.conv2d(x, weight, padding=1), 2)
    return AmxConv2d.apply(x.bfloat16(), weight, True)


class AmxConv2d(torch.autograd.Function):
    """The convolution, max-pooled or not, with its two gradients; the functions above check the arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pool: bool) -> Tensor:
        """Convolve, and max-pool by 2 if `pool`."""
        x, size = x.contiguous(memory_format=torch.channels_last), _seen(x.shape[2:], pool)
        places = _empty((len(x), len(weight), size[0] // 2, size[1] // 2), torch.uint8) if pool else None
        y = _convolve(x, None, x.shape[2:], weight, False, places, size)
        ctx.save_for_backward(x, weight, places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and weight, each only if it is needed."""
        x, weight, places = ctx.saved_tensors
        dy = dy.bfloat16().contiguous(memory_format=torch.channels_last)
        size, dx, dw = _seen(x.shape[2:], places is not None), None, None
        if ctx.needs_input_grad[0]:
            dx = _convolve(dy, places, size, weight, True, None, x.shape[2:])
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(x, dy, places, size).to(weight.dtype)
        return dx, dw, None


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled loops take these arguments."""
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        x.device.type == "cpu"
        and half == torch.bfloat16
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.dtype in (torch.bfloat16, torch.float32)
        and weight.shape[2:] == (3, 3)
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and available()[0]
    )


def multiply_in_registers(products: int) -> float:
    """Multiply tiles that stay in registers, `products` times (a multiple of four) on each thread.

    Returns the number of floating-point operations. Divided by the time, that is the processor's peak rate.
    """
    threads = torch.get_num_threads()
    LIBRARY.functions.multiply_in_registers(products, threads)
    return 2.0 * 16 * 16 * 32 * products * threads


def _seen(size: Sequence[int], pool: bool) -> tuple[int, int]:
    """Return the height and width that are computed: before a max-pool, only whole windows."""
    height, width = size
    return (height // 2 * 2, width // 2 * 2) if pool else (height, width)


def _lines(channels: int) -> int:
    return -(-channels // LINE)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def _aligned(n_bytes: int) -> Tensor:
    """Return empty memory that begins at a whole cache line, as tiles must."""
    room = torch.empty(n_bytes + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + n_bytes]


def _convolve(
    x: Tensor,
    x_places: Tensor | None,
    x_size: Sequence[int],
    weight: Tensor,
    flipped: bool,
    y_places: Tensor | None,
    y_size: Sequence[int],
) -> Tensor:
    """Convolve x (N, C, H, W), (H, W) being `x_size`, with the filters, or with them flipped for the gradient.

    With `x_places` x (N, C, H // 2, W // 2) stands for the image that is x at these places and zero elsewhere. With
    `y_places` the result, of `y_size`, is max-pooled by 2 and the places are filled in.
    """
    library, threads, (n_out, n_in) = LIBRARY.functions, torch.get_num_threads(), weight.shape[:2]
    weight = weight.detach().float().contiguous(memory_format=torch.channels_last)
    filters = _aligned(_lines(n_in) * _lines(n_out) * 9 * LINE * LINE * 2)
    library.pack_filters(weight.data_ptr(), filters.data_ptr(), n_out, n_in, flipped, threads)
    if flipped:
        n_out, n_in = n_in, n_out
    y = _empty((len(x), n_out, *(y_size if y_places is None else y_places.shape[2:])), torch.bfloat16)
    scratch = _aligned(threads * library.convolve_scratch(x_size[1], n_in, y_places is not None))
    library.convolve(
        x.data_ptr(), address(x_places), filters.data_ptr(), y.data_ptr(), address(y_places), scratch.data_ptr(),
        len(x), *x_size, n_in, *y_size, n_out, threads,
    )  # fmt: skip
    return y


def _weight_gradient(x: Tensor, dy: Tensor, places: Tensor | None, size: Sequence[int]) -> Tensor:
    """Gradient of the filters, float32 (C_out, C_in, 3, 3), from images x (N, C_in, H, W) and dy (N, C_out, *size).

    With `places` dy (N, C_out, size[0] // 2, size[1] // 2) stands for the image that is dy at these places and zero
    elsewhere.
    """
    library, threads, (n, n_in, height, width) = LIBRARY.functions, torch.get_num_threads(), x.shape
    n_out = dy.shape[1]
    sums = _aligned(threads * _lines(n_in) * _lines(n_out) * 9 * LINE * LINE * 4)
    scratch = _aligned(threads * library.gradient_scratch(height, width, n_in, n_out, CACHE_BYTES))
    dw = _empty((n_out, n_in, 3, 3), torch.float32)
    library.weight_gradient(
        x.data_ptr(), dy.data_ptr(), address(places), dw.data_ptr(), sums.data_ptr(), scratch.data_ptr(),
        n, height, width, n_in, *size, n_out, CACHE_BYTES, threads,
    )  # fmt: skip
    return dw
