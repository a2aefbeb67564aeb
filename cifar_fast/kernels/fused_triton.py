"""The Triton kernels of `fused_gpu`, which explains the method; importing this module requires Triton.

An image tensor, channels-last, is a table with a row for each pixel and a column for each channel, and a group of batch
norm is a block of whole rows. A program works on tiles of `ROWS` rows and `CHANNELS` columns. Sums over a group go in
two steps: each program adds up one part of the rows, then a small kernel adds up the parts. Their order is fixed, so
the same shapes on the same numbers give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 64, 64
"""A tile: 64 channels in half precision are 128 bytes, the size of one memory transaction on a GPU."""
WARPS = 8
"""Warps for each program: 16 numbers a thread, few enough for several programs to share a multiprocessor."""
PARTS, FEW_CHANNELS = 128, 16
"""A tile of the kernels that add up parts: narrow, so that the little work there is spreads over many programs."""
GROUPS = 16
"""Groups whose statistics are averaged at a time."""
PROGRAMS = 1024
"""About how many programs sum up a tensor: several for each multiprocessor of the largest GPUs."""


@triton.jit
def _at(row, channel, n_channels):
    """Return the offsets of a tile in memory, in 64 bits because a tensor may hold more than 2**31 numbers."""
    return row.to(tl.int64)[:, None] * n_channels + channel[None, :]


@triton.jit
def _activate(t, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(t < 0, 0.0, t)
    elif ACTIVATION == "silu":
        y = t / (1.0 + tl.exp(-t))
    elif ACTIVATION == "gelu":
        y = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    else:
        y = tl.where(t > 0, t, ALPHA * (tl.exp(t / ALPHA) - 1.0))
    return y


@triton.jit
def _slope(t, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "relu":
        slope = tl.where(t > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-t))
        slope = share * (1.0 + t * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * t * t)
        slope = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476)) + t * density
    else:
        slope = tl.where(t > 0, 1.0, tl.exp(t / ALPHA))
    return slope


@triton.jit(do_not_specialize=["rows", "chunk", "height", "width"])
def norm_moments(
    x, pooled, winner, partial, rows, chunk, n_channels, height, width,
    POOL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the mean of a part of a group, and its sum of squared deviations, to partial (groups, parts, 2, C).

    With `POOL` the rows are those of the pooled image, which is written too, with the place of each maximum in its
    window: 0 and 1 in the upper row, 2 and 3 in the lower.
    """
    part, group = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mean = tl.zeros((CHANNELS,), partial.dtype.element_ty)
    squares = tl.zeros((CHANNELS,), partial.dtype.element_ty)
    first, end = part * chunk, tl.minimum((part + 1) * chunk, rows)
    for start in range(first, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & (c < n_channels)[None, :]
        row = group * rows + r
        if POOL:
            high, wide = height // 2, width // 2
            image, window = row // (high * wide), row % (high * wide)
            corner = (image * height + window // wide * 2) * width + window % wide * 2
            best = tl.load(x + _at(corner, c, n_channels), mask, other=0.0).to(mean.dtype)
            which = tl.zeros((ROWS, CHANNELS), tl.uint8)
            for k in tl.static_range(1, 4):
                other = tl.load(x + _at(corner + k // 2 * width + k % 2, c, n_channels), mask, other=0.0).to(mean.dtype)
                wins = (other > best) | (other != other)  # as in max_pool2d: the first of equals, and any NaN
                best, which = tl.where(wins, other, best), tl.where(wins, k, which).to(tl.uint8)
            tl.store(pooled + _at(row, c, n_channels), best.to(pooled.dtype.element_ty), mask)
            tl.store(winner + _at(row, c, n_channels), which, mask)
        else:
            best = tl.load(x + _at(row, c, n_channels), mask, other=0.0).to(mean.dtype)
        # The moments of this tile are joined to those of the tiles before it (Chan, Golub and LeVeque, 1983).
        before, count = (start - first).to(mean.dtype), tl.minimum(end - start, ROWS).to(mean.dtype)
        tile_mean = tl.sum(best, 0) / count
        deviation = tl.where(mask, best - tile_mean[None, :], 0.0)
        step = tile_mean - mean
        mean += step * (count / (before + count))
        squares += tl.sum(deviation * deviation, 0) + step * step * (before * count / (before + count))
    there = partial + (group * tl.num_programs(0) + part) * 2 * n_channels + c
    tl.store(there, mean, c < n_channels)
    tl.store(there + n_channels, squares, c < n_channels)


@triton.jit(do_not_specialize=["rows", "chunk", "parts"])
def norm_join_moments(
    partial, mean, variance, rows, chunk, parts, n_channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write the mean and the biased variance of each group, (groups, C), from those of its parts."""
    group, c = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = (c < n_channels)[None, :]
    sums = tl.zeros((PARTS, CHANNELS), partial.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & here
        count = tl.minimum(rows - part * chunk, chunk).to(sums.dtype)[:, None]
        sums += count * tl.load(partial + _at((group * parts + part) * 2, c, n_channels), mask, other=0.0)
    of_group = tl.sum(sums, 0) / rows
    squares = tl.zeros((PARTS, CHANNELS), partial.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & here
        count = tl.minimum(rows - part * chunk, chunk).to(sums.dtype)[:, None]
        there = partial + _at((group * parts + part) * 2, c, n_channels)
        away = tl.load(there, mask, other=0.0) - of_group[None, :]
        squares += tl.where(mask, tl.load(there + n_channels, mask, other=0.0) + count * away * away, 0.0)
    tl.store(mean + group * n_channels + c, of_group, c < n_channels)
    tl.store(variance + group * n_channels + c, tl.sum(squares, 0) / rows, c < n_channels)


@triton.jit(do_not_specialize=["rows", "groups"])
def norm_activate(
    values, y, mean, variance, weight, bias, statistics, rows, groups, n_channels,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write a tile of y. The first program of each block of channels also writes statistics (2, C): mean and unbiased
    variance, averaged over the groups."""
    tile, group = tl.program_id(0), tl.program_id(1)
    r, c = tile * ROWS + tl.arange(0, ROWS), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < n_channels
    mask = (r < rows)[:, None] & here[None, :]
    m = tl.load(mean + group * n_channels + c, here, other=0.0)
    v = tl.load(variance + group * n_channels + c, here, other=1.0)
    scale = tl.load(weight + c, here, other=0.0) / tl.sqrt(v + EPS)
    shift = tl.load(bias + c, here, other=0.0)
    at = _at(group * rows + r, c, n_channels)
    value = tl.load(values + at, mask, other=0.0).to(m.dtype)
    t = (value - m[None, :]) * scale[None, :] + shift[None, :]
    tl.store(y + at, _activate(t, ACTIVATION, ALPHA).to(y.dtype.element_ty), mask)
    if (tile == 0) & (group == 0):
        means = tl.zeros((GROUPS, CHANNELS), m.dtype)
        variances = tl.zeros((GROUPS, CHANNELS), m.dtype)
        for start in range(0, groups, GROUPS):
            g = start + tl.arange(0, GROUPS)
            some = (g < groups)[:, None] & here[None, :]
            means += tl.load(mean + _at(g, c, n_channels), some, other=0.0)
            variances += tl.load(variance + _at(g, c, n_channels), some, other=0.0)
        n = rows.to(m.dtype)
        tl.store(statistics + c, tl.sum(means, 0) / groups, here)
        tl.store(statistics + n_channels + c, tl.sum(variances, 0) / groups * (n / (n - 1)), here)


@triton.jit(do_not_specialize=["rows", "chunk"])
def norm_gradient_sums(
    values, dy, mean, variance, weight, bias, partial, rows, chunk, n_channels,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the sums of dt and of dt u over a part of a group to partial (groups, parts, 2, C)."""
    part, group = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < n_channels
    m = tl.load(mean + group * n_channels + c, here, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(variance + group * n_channels + c, here, other=1.0) + EPS)
    scale, shift = tl.load(weight + c, here, other=0.0), tl.load(bias + c, here, other=0.0)
    sums = tl.zeros((ROWS, CHANNELS), m.dtype)
    products = tl.zeros((ROWS, CHANNELS), m.dtype)
    end = tl.minimum((part + 1) * chunk, rows)
    for start in range(part * chunk, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & here[None, :]
        at = _at(group * rows + r, c, n_channels)
        u = (tl.load(values + at, mask, other=0.0).to(m.dtype) - m[None, :]) * inverse[None, :]
        slope = _slope(u * scale[None, :] + shift[None, :], ACTIVATION, ALPHA)
        dt = tl.load(dy + at, mask, other=0.0).to(m.dtype) * slope
        sums += dt
        products += dt * u
    there = partial + (group * tl.num_programs(0) + part) * 2 * n_channels + c
    tl.store(there, tl.sum(sums, 0), here)
    tl.store(there + n_channels, tl.sum(products, 0), here)


@triton.jit(do_not_specialize=["parts"])
def norm_join_sums(partial, sums, parts, n_columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write sums (groups, n_columns) of partial (groups, parts, n_columns)."""
    group, c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (c < n_columns)[None, :]
        total += tl.load(partial + _at(group * parts + part, c, n_columns), mask, other=0.0)
    tl.store(sums + group * n_columns + c, tl.sum(total, 0), c < n_columns)


@triton.jit(do_not_specialize=["rows", "tiled", "groups", "height", "width"])
def norm_input_gradient(
    values, winner, dy, mean, variance, weight, bias, sums, dx, of_parameters,
    rows, tiled, groups, n_channels, height, width,
    POOL: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write a tile of dx. The first program of each block of channels also writes of_parameters (2, C): db and dw.

    The programs share `tiled` rows of each group. With `POOL` a row is a window of dx, and windows that reach over an
    odd edge count, too. Every pixel is written, and all but the maxima become zero.
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    r, c = tile * ROWS + tl.arange(0, ROWS), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < n_channels
    mask = (r < tiled)[:, None] & here[None, :]
    row = group * tiled + r
    m = tl.load(mean + group * n_channels + c, here, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(variance + group * n_channels + c, here, other=1.0) + EPS)
    scale, shift = tl.load(weight + c, here, other=0.0), tl.load(bias + c, here, other=0.0)
    of_group = sums + group * 2 * n_channels + c
    sum_mean = tl.load(of_group, here, other=0.0) / rows
    product_mean = tl.load(of_group + n_channels, here, other=0.0) / rows
    if POOL:
        high, wide = (height + 1) // 2, (width + 1) // 2
        image, i, j = row // (high * wide), row % (high * wide) // wide, row % wide
        whole = (i < height // 2) & (j < width // 2)
        at = _at((image * (height // 2) + i) * (width // 2) + j, c, n_channels)
        known = mask & whole[:, None]
    else:
        at = _at(row, c, n_channels)
        known = mask
    u = (tl.load(values + at, known, other=0.0).to(m.dtype) - m[None, :]) * inverse[None, :]
    slope = _slope(u * scale[None, :] + shift[None, :], ACTIVATION, ALPHA)
    dt = tl.load(dy + at, known, other=0.0).to(m.dtype) * slope
    gradient = (scale * inverse)[None, :] * (dt - sum_mean[None, :] - u * product_mean[None, :])
    gradient = gradient.to(dx.dtype.element_ty)
    if POOL:
        which = tl.load(winner + at, known, other=4)
        for k in tl.static_range(4):
            down, right = 2 * i + k // 2, 2 * j + k % 2
            there = _at((image * height + down) * width + right, c, n_channels)
            inside = mask & ((down < height) & (right < width))[:, None]
            tl.store(dx + there, tl.where(which == k, gradient, 0.0), inside)
    else:
        tl.store(dx + at, gradient, mask)
    if (tile == 0) & (group == 0):
        db = tl.zeros((GROUPS, CHANNELS), m.dtype)
        dw = tl.zeros((GROUPS, CHANNELS), m.dtype)
        for start in range(0, groups, GROUPS):
            g = start + tl.arange(0, GROUPS)
            some = (g < groups)[:, None] & here[None, :]
            db += tl.load(sums + _at(2 * g, c, n_channels), some, other=0.0)
            dw += tl.load(sums + _at(2 * g + 1, c, n_channels), some, other=0.0)
        tl.store(of_parameters + c, tl.sum(db, 0), here)
        tl.store(of_parameters + n_channels + c, tl.sum(dw, 0), here)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, alpha: float, group_size: int, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `fused_gpu.norm_activation`, with the same arguments, in three kernel launches."""
    assert x.is_contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    high, wide = (height // 2, width // 2) if pool else (height, width)
    groups, rows = n // group_size, group_size * high * wide
    y = _images(x, n, channels, high, wide)
    pooled = torch.empty_like(y) if pool else x.new_empty(0)
    winner = torch.empty_like(y, dtype=torch.uint8) if pool else x.new_empty(0, dtype=torch.uint8)
    values = pooled if pool else x
    mean, variance = weight.new_empty(groups, channels), weight.new_empty(groups, channels)
    statistics = weight.new_empty(2, channels)
    parts, chunk = _parts(groups, rows, channels)
    partial = weight.new_empty(groups, parts, 2, channels)
    columns, kind = triton.cdiv(channels, CHANNELS), {"ACTIVATION": activation, "ALPHA": alpha, "EPS": eps}
    tile: dict[str, Any] = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    norm_moments[(parts, groups, columns)](
        x, pooled, winner, partial, rows, chunk, channels, height, width, POOL=pool, **tile
    )
    norm_join_moments[(groups, triton.cdiv(channels, FEW_CHANNELS))](
        partial, mean, variance, rows, chunk, parts, channels, PARTS=PARTS, CHANNELS=FEW_CHANNELS
    )
    norm_activate[(triton.cdiv(rows, ROWS), groups, columns)](
        values, y, mean, variance, weight, bias, statistics, rows, groups, channels, **kind, **tile, GROUPS=GROUPS
    )
    return y, pooled, winner, mean, variance, statistics


def backward(
    dy: Tensor,
    values: Tensor,
    winner: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    alpha: float,
    eps: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Compute `fused_gpu.norm_activation_backward`, with the same arguments, in three kernel launches."""
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (dy, values))
    n, channels, high, wide = dy.shape
    pool, groups = winner.numel() > 0, len(mean)
    rows = n // groups * high * wide
    tiled = n // groups * triton.cdiv(height, 2) * triton.cdiv(width, 2) if pool else rows
    dx = _images(dy, n, channels, height, width)
    sums, of_parameters = weight.new_empty(groups, 2, channels), weight.new_empty(2, channels)
    parts, chunk = _parts(groups, rows, channels)
    partial = weight.new_empty(groups, parts, 2, channels)
    columns, kind = triton.cdiv(channels, CHANNELS), {"ACTIVATION": activation, "ALPHA": alpha, "EPS": eps}
    tile: dict[str, Any] = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    norm_gradient_sums[(parts, groups, columns)](
        values, dy, mean, variance, weight, bias, partial, rows, chunk, channels, **kind, **tile
    )
    norm_join_sums[(groups, triton.cdiv(2 * channels, FEW_CHANNELS))](
        partial, sums, parts, 2 * channels, PARTS=PARTS, COLUMNS=FEW_CHANNELS
    )
    norm_input_gradient[(triton.cdiv(tiled, ROWS), groups, columns)](
        values, winner, dy, mean, variance, weight, bias, sums, dx, of_parameters,
        rows, tiled, groups, channels, height, width, POOL=pool, **kind, **tile, GROUPS=GROUPS,
    )  # fmt: skip
    return dx, of_parameters


def _images(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _parts(groups: int, rows: int, channels: int) -> tuple[int, int]:
    """Return the number of parts into which a group's rows are split, and the rows in each, a multiple of `ROWS`."""
    tiles = triton.cdiv(rows, ROWS)
    tiles_of_a_part = max(1, tiles * groups * triton.cdiv(channels, CHANNELS) // PROGRAMS)
    return triton.cdiv(tiles, tiles_of_a_part), tiles_of_a_part * ROWS
