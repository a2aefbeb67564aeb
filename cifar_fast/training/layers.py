"""The few layers that torch lacks: ghost batch norm, a 3x3 convolution by several algorithms, whitening, a scale."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.hardware.numerics import HALF
from cifar_fast.kernels import amx, fused, fused_gpu, winograd

MANY_GROUPS = 8
"""With more groups than this, each is so small that a GPU does better to normalise all of them at once."""


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of `group_size` consecutive images; one group for the whole batch is ordinary
    batch norm.

    The running statistics move towards the mean over the groups. Source: Hoffer, Hubara and Soudry, "Train longer,
    generalize better", arXiv 1705.08741.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, n_channels: int, group_size: int, *, eps: float, momentum: float, freeze_scale: bool) -> None:
        """Build for `n_channels`; with `freeze_scale` the scale stays at 1 and only the bias is learned."""
        super().__init__(n_channels, eps=eps, momentum=momentum)
        self.group_size = group_size
        self.batch_momentum = momentum
        self.weight.requires_grad = not freeze_scale

    def expect_part(self, part: int, n_parts: int) -> None:
        """Prepare for part number `part`, from 1, of a batch that comes in `n_parts` equal parts.

        The running statistics end where the whole batch would have moved them: after the later parts have taken their
        share, each part counts for `batch_momentum / n_parts`.
        """
        share = self.batch_momentum / n_parts
        self.momentum = share / (1 - share * (n_parts - part))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Normalise by each group's own statistics in training, by the running ones in evaluation."""
        if not self.training or len(x) == self.group_size:
            return super().forward(x)
        # A GPU has a kernel for one group, and a compiler makes a better one for all.
        many = len(x) > MANY_GROUPS * self.group_size or torch.compiler.is_compiling()
        return self.all_groups_at_once(x) if x.is_cuda and many else self.group_by_group(x)

    def then(
        self, activation: nn.Module, x: Tensor, *, pool: bool = False
    ) -> Tensor:  # (N, C, H, W) -> (N, C, H, W), or (N, C, H // 2, W // 2) if it pools
        """Return `activation(self(x))`, of `x` max-pooled by 2 first if `pool`.

        They are fused if a kernel supports them and neither module has a hook.
        """
        if self._can_fuse(activation, x, pool=pool) and fused_gpu.suits(x, self, activation):
            y, statistics = fused_gpu.normalise_and_activate(
                x, self.weight, self.bias, activation, group_size=self.group_size, eps=self.eps, pool=pool
            )
            torch._foreach_lerp_([self.running_mean, self.running_var], list(statistics), self.momentum)
            self._count_batch(len(x))
            return y
        if pool:
            x = F.max_pool2d(x, 2)
        if not (self._can_fuse(activation, x) and fused.suits(x, self, activation)):
            return activation(self(x))
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return fused.apply_and_activate(x, self.running_mean, scale, self.bias, activation)
        y, means, variances = fused.normalise_and_activate(
            x, self.weight, self.bias, activation, group_size=self.group_size, eps=self.eps
        )
        self._move_statistics(means, variances, self._values_per_group(x))
        self._count_batch(len(x))
        return y

    def _can_fuse(self, activation: nn.Module, x: Tensor, *, pool: bool = False) -> bool:
        values = self.group_size * (x.shape[2] // 2) * (x.shape[3] // 2) if pool else self._values_per_group(x)
        whole_groups = len(x) % self.group_size == 0 and values > 1
        return (whole_groups or not self.training) and not fused.watched(self, activation)

    def _count_batch(self, n: int) -> None:
        if n == self.group_size and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def group_by_group(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Normalise one group after the other: each fits into a CPU's cache, and a GPU has a kernel for it."""
        groups = x.split(self.group_size)
        # With momentum 1, batch_norm leaves a group's own mean and unbiased variance in the buffers that it is given.
        means = self.running_mean.new_zeros(len(groups), self.num_features)
        variances = torch.zeros_like(means)
        normalised = [
            F.batch_norm(group, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for group, mean, variance in zip(groups, means, variances, strict=True)
        ]
        self._move_statistics(means, variances)
        return torch.cat(normalised)

    def all_groups_at_once(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Normalise all groups together: a GPU prefers a few large kernels to many small ones."""
        groups = x.unflatten(0, (-1, self.group_size))  # (N / g, g, C, H, W)
        groups = groups.float() if x.dtype in HALF else groups
        variance, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0, keepdim=True)  # (N / g, 1, C, 1, 1)
        scale, bias = self.weight[:, None, None], self.bias[:, None, None]
        normalised = torch.addcmul(bias, (groups - mean) * torch.rsqrt(variance + self.eps), scale)
        self._move_statistics(mean.flatten(1), variance.flatten(1), self._values_per_group(x))
        return normalised.to(x.dtype).flatten(0, 1)

    def _values_per_group(self, x: Tensor) -> int:
        return self.group_size * x[0, 0].numel()

    @torch.no_grad()
    def _move_statistics(self, means: Tensor, variances: Tensor, count: int | None = None) -> None:
        """Move the running statistics towards the mean of the groups' `means` and `variances`, (groups, C).

        As in batch norm, the running variance is unbiased: biased variances come with `count`, the number of values
        behind each.
        """
        self.running_mean.lerp_(means.mean(0), self.momentum)
        unbiased = variances.mean(0) if count is None else variances.mean(0) * (count / (count - 1))
        self.running_var.lerp_(unbiased, self.momentum)


class Block(nn.Sequential):
    """Layers in a row. With `fuse` a norm and the activation right after it are fused where a kernel supports them; on
    a GPU, so is the max-pool right before them."""

    fuse = False

    def forward(self, x: Tensor) -> Tensor:
        norm: GhostBatchNorm | None = None
        pool = False
        layers = list(self)
        for layer, *following in (layers[i : i + 3] for i in range(len(layers))):
            if norm is not None:
                x, norm, pool = norm.then(layer, x, pool=pool), None, False
            elif self.fuse and following and isinstance(layer, GhostBatchNorm):
                norm = layer
            elif self.fuse and len(following) == 2 and _leaves_the_pool(layer, following[0], x):
                x, pool = layer.convolved(x), True
            else:
                x = layer(x)
        return x


def _leaves_the_pool(layer: nn.Module, following: nn.Module, x: Tensor) -> TypeGuard[Conv3x3]:
    """Return whether a convolution can leave its max-pool to the norm after it, which happens only on a GPU."""
    return (
        x.is_cuda
        and isinstance(following, GhostBatchNorm)
        and isinstance(layer, Conv3x3)
        and layer.pool
        and not fused.watched(layer)
    )


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padding 1, without bias, its output max-pooled by 2 if `pool`.

    `convolution` names the algorithm: `direct` is torch's own, `winograd` needs fewer multiplications, `amx` uses the
    matrix unit of some processors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        init: str = "kaiming",
        pool: bool = False,
        convolution: str = "direct",
    ) -> None:
        """Build with `init` `kaiming` (torch's default) or `dirac` (the first outputs copy the inputs)."""
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.pool, self.convolution = pool, convolution
        if init == "dirac":
            # Only as many outputs as there are inputs: the others keep their random filters.
            nn.init.dirac_(self.weight.data[:in_channels])

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K, H, W), or (N, K, H // 2, W // 2) if it pools
        if self.convolution == "winograd":
            convolve = winograd.winograd_conv2d_max_pool if self.pool else winograd.winograd_conv2d
            return convolve(x, self.weight)
        if self.convolution == "amx":
            return (amx.amx_conv2d_max_pool if self.pool else amx.amx_conv2d)(x, self.weight)
        y = self.convolved(x)
        return F.max_pool2d(y, 2) if self.pool else y

    def convolved(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K, H, W)
        """Return torch's own convolution of `x`, not pooled."""
        return super().forward(x)


class Whitening(nn.Conv2d):
    """A first convolution whose filters are computed from the training images and stay fixed; only its bias learns."""


def whitening_layer(model: nn.Module) -> Whitening | None:
    """Return the whitening layer of `model`, or None if it has none."""
    return next((module for module in model.modules() if isinstance(module, Whitening)), None)


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Normalise(nn.Module):
    """Shifts and scales pixel values, 0 ... 255, to zero mean and unit variance in each channel.

    The statistics are saved with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        """Use the `mean` and `std` of the channels, float32 (C,), in pixel values."""
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W), any dtype -> float32
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]


def patch_covariance(images: Tensor, size: int) -> Tensor:
    """Return E[p p^T] over all patches p of normalised `images` (N, C, H, W): their dtype, C * size**2 square."""
    channels = images.shape[1]
    covariance = images.new_zeros(channels * size**2, channels * size**2)
    count = 0
    for some in images.split(1000):  # the patches of a thousand images take a few hundred MB
        # F.unfold would launch a kernel for each image on a GPU.
        windows = some.unfold(2, size, 1).unfold(3, size, 1)  # (n, C, H - size + 1, W - size + 1, size, size), a view
        patches = windows.permute(1, 4, 5, 0, 2, 3).reshape(channels * size**2, -1)  # (C * size**2, patches)
        covariance += patches @ patches.T
        count += patches.shape[1]
    return covariance / count


def whitening_filters(images: Tensor, size: int, eps: float) -> Tensor:
    """Return the filters (C * size**2, C, size, size) whose outputs over the patches of `images` are uncorrelated and
    have unit variance.

    `images`: normalised (N, C, H, W), floating point. `eps` is added to each eigenvalue. The filter of the largest
    eigenvalue comes first, and the largest weight of each filter is positive. Sources: David Page, "How to train your
    ResNet 8", 2019; tysam-code, hlb-CIFAR10, 2023.
    """
    # On the CPU: a GPU would load a library of solvers for one small matrix.
    eigenvalues, eigenvectors = torch.linalg.eigh(patch_covariance(images, size).double().cpu())
    # The sign of an eigenvector is free. The solver's choice depends on rounding, thus on the number of threads.
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(0, keepdim=True))
    eigenvectors = eigenvectors * largest.sign()
    filters = (eigenvectors / torch.sqrt(eigenvalues.clamp(min=0) + eps)).T.flip(0)  # (C * size**2, C * size**2)
    return filters.to(images.device, images.dtype).reshape(-1, images.shape[1], size, size)
