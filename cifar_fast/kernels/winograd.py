"""3x3 convolution on a CPU by Winograd's minimal filtering: the same result with a quarter of the multiplications.

Four neighbouring outputs of a one-dimensional filter with three taps take 12 multiplications. They are also
coefficients in a product of short polynomials, and a polynomial of degree five is known from its values at six points
(0, 1, -1, 2, -2 and "infinity"): evaluate the inputs there (B^T d), evaluate the taps there (G g), multiply point by
point - six multiplications - and interpolate (A^T m). In two dimensions, for a 4x4 tile of outputs Y and the 6x6 tile
d of inputs that it sees,

    Y = A^T [ (G g G^T) * (B^T d B) ] A,      36 multiplications instead of 144.

The sum over input channels can be taken before interpolating, so each of the 36 points is one matrix product, (tiles x
input channels) by (input channels x output channels). The transforms only add and scale, and each is shared by all the
channels on the other side. Both gradients follow by transposing: the input's gradient is a convolution of dY with the
flipped weights, and the weights' gradient is

    dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G.

Where max-pool by 2 follows, its 2x2 windows lie inside the tiles: it is done before a tile leaves the registers.

A side of 5, 9, 13 or 17 pixels nearly wastes a row of tiles: 5 pixels take two tiles, as many as 8 do. Two such images
side by side, with their padding between them, take 11 pixels and three tiles. What an image gives then depends on its
neighbour, but only by rounding.

Given the same inputs, the result and both gradients are about as accurate as those of a direct convolution in float32.
In a whole network, gradients can still differ by a per cent or two, because max-pool sends each gradient to one place,
and where two values nearly tie, rounding decides which one.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015, arXiv 1509.09308. `winograd.c` holds
the loops; the machine's C compiler builds it once, on first use.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cifar_fast.kernels.compile import INT, LONG, POINTER, Library, address

BLOCK_TILES = 56
"""Tiles a thread handles at a time: few enough for its caches, enough to reuse each transformed filter it reads."""

PARTIAL_SUMS_BELOW = 128 * 256
"""Channel pairs up to which each thread sums its own weight gradient; larger copies would not fit in the caches."""

# 24 G: a filter's three taps as a polynomial, evaluated at the six points and scaled as B and A need it.
EVALUATE_TAPS = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))

LIBRARY = Library(
    "winograd.c",
    {
        "lanes": (INT, []),
        "rows": (INT, []),
        "scratch_floats": (LONG, [INT] * 3),
        "count_tiles": (LONG, [INT] * 3),
        "convolve": (None, [POINTER] * 6 + [INT] * 7),
        "weight_gradient": (None, [POINTER] * 5 + [INT] * 8),
    },
)
available = LIBRARY.available


def winograd_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with 3x3 filters, stride 1, padding 1, no bias; differentiable like `F.conv2d`.

    Args:
        x: images (N, C_in, H, W); float32 and channels-last on a CPU to be fast, anything else goes to `F.conv2d`.
        weight: filters (C_out, C_in, 3, 3).

    Returns:
        (N, C_out, H, W), equal to `F.conv2d(x, weight, padding=1)` up to rounding (about 1e-6 of the largest value).
    """
    if not _suits(x, weight):
        return F.conv2d(x, weight, padding=1)
    return WinogradConv2d.apply(x, weight, False)


def winograd_conv2d_max_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve like `winograd_conv2d` with a fused max-pool by 2: the large image in between is never in memory.

    Args:
        x: images (N, C_in, H, W), as for `winograd_conv2d`.
        weight: filters (C_out, C_in, 3, 3).

    Returns:
        (N, C_out, H // 2, W // 2), equal to `F.max_pool2d(winograd_conv2d(x, weight), 2)` and so is its gradient.
    """
    if not _suits(x, weight):
        return F.max_pool2d(F.conv2d(x, weight, padding=1), 2)
    return WinogradConv2d.apply(x, weight, True)


class WinogradConv2d(torch.autograd.Function):
    """The convolution, max-pooled or not, with its two gradients; the functions above check the arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pool: bool) -> Tensor:
        """Convolve, and max-pool by 2 if `pool`."""
        places = _empty_places(x, weight.shape[0]) if pool else None
        y = _convolve(x, None, x.shape[2:], _transform_weight(weight), weight.shape[0], places)
        ctx.save_for_backward(x, weight, places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and weight, each only if it is needed."""
        x, weight, places = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _convolve(dy, places, x.shape[2:], _transform_weight(weight, transposed=True), weight.shape[1], None)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(x, dy, places)
        return dx, dw, None


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled loops take these arguments and are likely to be worth it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= 16
        and x.numel() > 0
        and min(x.shape[2:]) >= 3
        and x.shape[0] >= torch.get_num_threads()
        and x.is_contiguous(memory_format=torch.channels_last)
        and available()[0]
    )


@functools.cache
def _tap_matrix() -> Tensor:
    """G (x) G: the 36 values of a filter from its nine taps, (36, 9)."""
    g = torch.tensor(EVALUATE_TAPS, dtype=torch.float64) / 24
    return torch.kron(g, g).float()


def _panels(channels: int) -> int:
    """Panels of output channels, the unit in which the matrix products are done."""
    return -(-channels // (2 * LIBRARY.functions.lanes()))


def _transform_weight(weight: Tensor, transposed: bool = False) -> Tensor:
    """Filters (C_out, C_in, 3, 3) to points (36, panels, C_in, panel); `transposed` flips them and swaps channels."""
    matrix = _tap_matrix()
    taps = weight.detach().permute(2, 3, 1, 0)  # (3, 3, C_in, C_out)
    if transposed:
        matrix, taps = matrix.flip(1), taps.transpose(2, 3)
    cin, cout = taps.shape[2:]
    panels, panel = _panels(cout), 2 * LIBRARY.functions.lanes()
    taps = F.pad(taps.reshape(9, cin, cout), (0, panels * panel - cout))
    taps = taps.view(9, cin, panels, panel).transpose(1, 2)
    return (matrix @ taps.reshape(9, -1)).view(36, panels, cin, panel)


def _block(tiles: int) -> int:
    """Return how many of its `tiles` a thread handles at a time: even shares, in whole register blocks."""
    rows = LIBRARY.functions.rows()
    shares = -(-tiles // BLOCK_TILES)
    return -(-tiles // shares // rows) * rows


def _empty_places(x: Tensor, channels: int) -> Tensor:
    """Return an empty tensor for each maximum's place in its 2x2 window, the channels rounded up to whole vectors."""
    lanes = LIBRARY.functions.lanes()
    return torch.empty(x.shape[0], x.shape[2] // 2, x.shape[3] // 2, -(-channels // lanes) * lanes, dtype=torch.uint8)


def _convolve(
    x: Tensor, x_places: Tensor | None, size: Sequence[int], points: Tensor, cout: int, y_places: Tensor | None
) -> Tensor:
    """Convolve x (N, C_in, H, W) with transformed weights (36, panels, C_in, panel), (H, W) being `size`.

    With `x_places` x (N, C_in, H // 2, W // 2) stands for the image that is x at these places and zero elsewhere. With
    `y_places` the result is max-pooled by 2 and the places are filled in.
    """
    library, threads = LIBRARY.functions, torch.get_num_threads()
    (n, cin), (height, width) = x.shape[:2], size
    block = _block(-(-library.count_tiles(n, height, width) // threads))
    scratch = torch.empty(threads * library.scratch_floats(cin, cout, block))
    shape = (n, cout, height, width) if y_places is None else (n, cout, height // 2, width // 2)
    y = torch.empty(shape, memory_format=torch.channels_last)
    library.convolve(
        x.data_ptr(), address(x_places), points.data_ptr(), y.data_ptr(), address(y_places), scratch.data_ptr(),
        n, height, width, cin, cout, block, threads,
    )  # fmt: skip
    return y


def _weight_gradient(x: Tensor, dy: Tensor, places: Tensor | None) -> Tensor:
    """Gradient of the filters (C_out, C_in, 3, 3) from images x (N, C_in, H, W) and dy (N, C_out, H, W).

    With `places` dy (N, C_out, H // 2, W // 2) stands for the image that is dy at these places and zero elsewhere.
    """
    library, threads = LIBRARY.functions, torch.get_num_threads()
    n, cin, height, width = x.shape
    cout, panels, panel = dy.shape[1], _panels(dy.shape[1]), 2 * library.lanes()
    # Threads share out the tiles, each with a partial sum of its own; where those are large, they share out panels.
    most = 1 if cin * cout < PARTIAL_SUMS_BELOW else panels
    splits = threads // max(parts for parts in range(1, most + 1) if threads % parts == 0)
    block = _block(-(-library.count_tiles(n, height, width) // splits))
    scratch = torch.empty(threads * library.scratch_floats(cin, cout, block))
    sums = torch.empty(splits, 36, panels, cin, panel)
    library.weight_gradient(
        x.data_ptr(), dy.data_ptr(), address(places), sums.data_ptr(), scratch.data_ptr(),
        n, height, width, cin, cout, block, splits, threads,
    )  # fmt: skip
    taps = _tap_matrix().T.repeat(1, splits) @ sums.view(splits * 36, -1)  # (9, panels * C_in * panel)
    taps = taps.view(3, 3, panels, cin, panel).permute(2, 4, 3, 0, 1).reshape(panels * panel, cin, 3, 3)
    return taps[:cout].contiguous(memory_format=torch.channels_last)
