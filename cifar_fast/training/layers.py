"""The few layers that torch lacks: ghost batch norm, a 3x3 convolution with its algorithm, whitening, a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.hardware.numerics import HALF
from cifar_fast.kernels import amx, fused, winograd


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm with statistics of `group_size` consecutive images; a group as large as the batch is ordinary batch
    norm.

    The running statistics take the mean over the groups. Source: Hoffer, Hubara and Soudry, "Train longer, generalize
    better", arXiv 1705.08741.
    """

    def __init__(self, n_channels: int, group_size: int, *, eps: float, momentum: float, freeze_scale: bool) -> None:
        """Build for `n_channels`; with `freeze_scale` the scale stays at 1 and only the bias is learned."""
        super().__init__(n_channels, eps=eps, momentum=momentum)
        self.group_size = group_size
        self.batch_momentum = momentum
        self.weight.requires_grad = not freeze_scale

    def expect_part(self, part: int, n_parts: int) -> None:
        """Prepare for part number `part`, from 1, of a batch that comes in `n_parts` equal parts.

        The running statistics then end where they would have ended had the batch come as a whole: each part counts
        `batch_momentum / n_parts` once the later ones have taken their share.
        """
        share = self.batch_momentum / n_parts
        self.momentum = share / (1 - share * (n_parts - part))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Normalise by each group's own statistics in training, by the running ones in evaluation."""
        if not self.training or len(x) == self.group_size:
            return super().forward(x)
        if x.is_cuda:
            return self.all_groups_at_once(x)
        groups = x.split(self.group_size)
        # With momentum 1 batch_norm leaves a group's own mean and variance in the buffers that it is given.
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        means = self.running_mean.new_zeros(len(groups), self.num_features)
        variances = torch.zeros_like(means)
        normalised = [
            F.batch_norm(group, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for group, mean, variance in zip(groups, means, variances, strict=True)
        ]
        self.running_mean.lerp_(means.mean(0), self.momentum)
        self.running_var.lerp_(variances.mean(0), self.momentum)
        return torch.cat(normalised)

    def then(self, activation: nn.Module, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Return `activation(self(x))`, computed at once where that can be; not where a hook watches one of the two."""
        count = self.group_size * x[0, 0].numel()  # values of a channel in a group
        groups = not self.training or (len(x) % self.group_size == 0 and count > 1)
        if not groups or fused.watched(self, activation) or not fused.suits(x, self, activation):
            return activation(self(x))
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return fused.apply_and_activate(x, self.running_mean, scale, self.bias, activation)
        y, mean, variance = fused.normalise_and_activate(
            x, self.weight, self.bias, activation, group_size=self.group_size, eps=self.eps
        )
        with torch.no_grad():
            self.running_mean.lerp_(mean.mean(0), self.momentum)
            # As batch_norm does, the running variance is the unbiased one.
            self.running_var.lerp_(variance.mean(0) * (count / (count - 1)), self.momentum)
            if len(mean) == 1 and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y

    def all_groups_at_once(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Normalise as `forward` does in training: a few large kernels, where a GPU would wait for many small ones."""
        groups = x.unflatten(0, (-1, self.group_size))  # (N / g, g, C, H, W)
        groups = groups.float() if x.dtype in HALF else groups
        variance, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0, keepdim=True)  # (N / g, 1, C, 1, 1)
        scale, bias = self.weight[:, None, None], self.bias[:, None, None]
        normalised = torch.addcmul(bias, (groups - mean) * torch.rsqrt(variance + self.eps), scale)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        count = groups[0, :, 0].numel()
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(1).mean(0), self.momentum)
            # As batch_norm does, the running variance is the unbiased one.
            self.running_var.lerp_(variance.flatten(1).mean(0) * (count / (count - 1)), self.momentum)
        return normalised.to(x.dtype).flatten(0, 1)


class Block(nn.Sequential):
    """Layers in a row; with `fuse` a norm and the layer right after it are computed at once where that can be."""

    fuse = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply one layer after the other."""
        norm: GhostBatchNorm | None = None
        for layer in self:
            if norm is not None:
                x, norm = norm.then(layer, x), None
            elif self.fuse and isinstance(layer, GhostBatchNorm):
                norm = layer
            else:
                x = layer(x)
        return x if norm is None else norm(x)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padding 1, without bias, its output max-pooled by 2 if `pool`.

    `convolution` says how: `direct` as torch does it, `winograd` with fewer multiplications, `amx` on matrix tiles.
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
            # Only as many outputs as there are inputs; the others keep their random filters.
            nn.init.dirac_(self.weight.data[:in_channels])

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K, H, W), or (N, K, H // 2, W // 2) if it pools
        """Convolve, and pool."""
        if self.convolution == "winograd":
            convolve = winograd.winograd_conv2d_max_pool if self.pool else winograd.winograd_conv2d
            return convolve(x, self.weight)
        if self.convolution == "amx":
            return (amx.amx_conv2d_max_pool if self.pool else amx.amx_conv2d)(x, self.weight)
        y = super().forward(x)
        return F.max_pool2d(y, 2) if self.pool else y


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        """Take the constant."""
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.factor


class Normalise(nn.Module):
    """Pixel values 0 ... 255 to zero mean and unit variance, by channel; the statistics travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        """Take the channels' `mean` and `std`, float32 (C,), in pixel values."""
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W), any dtype -> float32
        """Normalise."""
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]


def patch_covariance(images: Tensor, size: int) -> Tensor:
    """Return E[p p^T] over all patches p of normalised `images` (N, C, H, W): their dtype, C * size**2 square."""
    channels = images.shape[1]
    covariance = images.new_zeros(channels * size**2, channels * size**2)
    count = 0
    for some in images.split(1000):  # all patches of a thousand images fit in a few hundred MB
        patches = F.unfold(some, size).transpose(0, 1).flatten(1)  # (C * size**2, patches)
        covariance += patches @ patches.T
        count += patches.shape[1]
    return covariance / count


def whitening_filters(images: Tensor, size: int, eps: float) -> Tensor:
    """Return the filters (C * size**2, C, size, size) whose outputs over the patches of `images` are uncorrelated with
    unit variance.

    `images`: normalised (N, C, H, W), floating point. `eps` is added to each eigenvalue. Largest eigenvalue first; the
    largest weight of each filter is positive. Sources: David Page, "How to train your ResNet 8", 2019; tysam-code,
    hlb-CIFAR10, 2023.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(patch_covariance(images, size).double())
    # An eigenvector's sign is free, and the solver's depends on rounding, so on the number of threads.
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(0, keepdim=True))
    eigenvectors = eigenvectors * largest.sign()
    filters = (eigenvectors / torch.sqrt(eigenvalues.clamp(min=0) + eps)).T.flip(0)  # (C * size**2, C * size**2)
    return filters.to(images.dtype).reshape(-1, images.shape[1], size, size)
