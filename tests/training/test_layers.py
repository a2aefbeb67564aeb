"""Each layer is compared with what it should be equal to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar_fast.kernels import amx
from cifar_fast.training.layers import Conv3x3, GhostBatchNorm, Normalise, Scale, patch_covariance, whitening_filters


def random_batch(n: int, channels: int = 3, side: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, side, side, generator=generator)
    # Every image with another mean and scale, so that whose statistics are taken is seen.
    return x * torch.linspace(0.5, 3, n)[:, None, None, None] + torch.linspace(-2, 2, n)[:, None, None, None]


def ghost_norm(channels: int, group_size: int, *, freeze_scale: bool = False) -> GhostBatchNorm:
    norm = GhostBatchNorm(channels, group_size, eps=1e-5, momentum=0.1, freeze_scale=freeze_scale)
    norm.weight.data.copy_(torch.linspace(0.5, 1.5, channels))
    norm.bias.data.copy_(torch.linspace(-1, 1, channels))
    return norm


def batch_norm_like(norm: GhostBatchNorm) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    plain.load_state_dict(norm.state_dict())
    return plain


def outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y**3).sum().backward()  # for the sum of y or of its square, the gradient through a norm is near 0
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- Ghost batch norm ---


@given(st.integers(2, 9), st.integers(1, 4))
def test_a_ghost_group_as_large_as_the_batch_is_batch_norm(n: int, channels: int) -> None:
    ghost = ghost_norm(channels, n)
    plain, x = batch_norm_like(ghost), random_batch(n, channels)
    for _ in range(2):  # twice, so that the running statistics go on from where they were
        assert_all_close(outputs_and_gradients(ghost, x), outputs_and_gradients(plain, x))
    for name, value in plain.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(ghost.state_dict()[name], value)


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 3))
def test_ghost_groups_are_separate_batch_norms(group_size: int, groups: int, channels: int) -> None:
    ghost, x = ghost_norm(channels, group_size), random_batch(group_size * groups, channels)
    apart = [batch_norm_like(ghost) for _ in range(groups)]
    found = outputs_and_gradients(ghost, x)
    each = [outputs_and_gradients(norm, some) for norm, some in zip(apart, x.split(group_size), strict=True)]
    outputs, inputs, weights, biases = zip(*each, strict=True)
    assert_all_close(
        found, [torch.cat(outputs), torch.cat(inputs), torch.stack(weights).sum(0), torch.stack(biases).sum(0)]
    )
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            ghost.get_buffer(name), torch.stack([norm.get_buffer(name) for norm in apart]).mean(0)
        )


def test_in_evaluation_ghost_batch_norm_is_batch_norm_for_any_batch() -> None:
    ghost = ghost_norm(3, 4)
    for seed in range(3):
        ghost(random_batch(8, seed=seed))
    plain = batch_norm_like(ghost).eval()
    before, x = copy.deepcopy(ghost.state_dict()), random_batch(7)
    assert torch.equal(ghost.eval()(x), plain(x))
    assert all(torch.equal(before[name], value) for name, value in ghost.state_dict().items())


def test_the_images_of_another_group_do_not_matter() -> None:
    ghost, x = ghost_norm(3, 4), random_batch(8)
    other = torch.cat([x[:4], 5 * x[4:] - 1])
    assert torch.equal(ghost(x)[:4], ghost(other)[:4])


def test_a_frozen_scale_stays_and_the_bias_learns() -> None:
    frozen = GhostBatchNorm(3, 4, eps=1e-5, momentum=0.1, freeze_scale=True)
    (frozen(random_batch(8)) ** 3).sum().backward()
    assert frozen.weight.grad is None and frozen.bias.grad is not None
    assert torch.equal(frozen.weight, torch.ones(3))
    assert GhostBatchNorm(3, 4, eps=1e-5, momentum=0.1, freeze_scale=False).weight.requires_grad


# --- Convolution ---


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 4), (4, 10), (10, 4)])
def test_dirac_makes_the_first_outputs_copy_the_inputs(n_in: int, n_out: int) -> None:
    conv, x = Conv3x3(n_in, n_out, init="dirac"), random_batch(2, n_in)
    copied = min(n_in, n_out)
    torch.testing.assert_close(conv(x)[:, :copied], x[:, :copied])
    if n_out > n_in:
        assert conv.weight[n_in:].std() > 0.01  # the others are random, as ever


def test_conv3x3_keeps_the_size_and_has_no_bias() -> None:
    conv, x = Conv3x3(3, 5), random_batch(2)
    assert conv.bias is None and conv(x).shape == (2, 5, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1))


def test_winograd_is_the_same_convolution() -> None:
    direct, x = Conv3x3(16, 32), random_batch(2, 16, side=8).to(memory_format=torch.channels_last)
    fast = Conv3x3(16, 32, convolution="winograd")
    fast.load_state_dict(direct.state_dict())
    torch.testing.assert_close(fast(x), direct(x), rtol=1e-3, atol=1e-4)
    pooled = F.max_pool2d(direct(x), 2)
    direct.pool = fast.pool = True
    assert torch.equal(direct(x), pooled)
    torch.testing.assert_close(fast(x), pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", [False, True])
def test_matrix_tiles_are_the_same_convolution(pool: bool) -> None:
    direct, x = Conv3x3(16, 32, pool=pool), random_batch(2, 16, side=8).to(memory_format=torch.channels_last)
    fast = Conv3x3(16, 32, pool=pool, convolution="amx")
    fast.load_state_dict(direct.state_dict())
    assert torch.equal(fast(x), direct(x))  # float32, which tiles do not multiply
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fast(x), direct(x)
        assert torch.equal(y, (amx.amx_conv2d_max_pool if pool else amx.amx_conv2d)(x, direct.weight))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_scale_multiplies() -> None:
    assert torch.equal(Scale(0.125)(torch.tensor([8.0, -4.0])), torch.tensor([1.0, -0.5]))


# --- Normalisation and whitening ---


def test_normalise_gives_zero_mean_and_unit_variance_and_travels_with_the_weights() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = images.float().mean((0, 2, 3)), images.float().std((0, 2, 3), correction=0)
    normalise = Normalise(mean, std)
    out = normalise(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3))
    other = Normalise(torch.zeros(3), torch.ones(3))
    other.load_state_dict(normalise.state_dict())
    assert torch.equal(other(images), out)
    assert not list(normalise.parameters())


@pytest.mark.parametrize("freeze_scale", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_all_groups_at_once_are_normalised_as_one_by_one(
    freeze_scale: bool, memory_format: torch.memory_format
) -> None:
    one, all_ = (GhostBatchNorm(5, 4, eps=1e-5, momentum=0.3, freeze_scale=freeze_scale).double() for _ in range(2))
    with torch.no_grad():
        for norm in (one, all_):
            norm.bias.copy_(torch.linspace(-1, 1, 5))
            if not freeze_scale:
                norm.weight.copy_(torch.linspace(0.5, 2, 5))
    x = torch.randn(12, 5, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    inputs = [x.contiguous(memory_format=memory_format).requires_grad_() for _ in range(2)]
    outputs = [one(inputs[0]), all_.all_groups_at_once(inputs[1])]
    assert outputs[1].is_contiguous(memory_format=memory_format)
    for output in outputs:
        (output * torch.arange(2.0)).pow(3).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, p), q in zip(all_.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, value), expected in zip(all_.named_buffers(), one.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_all_groups_at_once_keep_half_precision_and_take_statistics_in_float32() -> None:
    norm = GhostBatchNorm(3, 4, eps=1e-5, momentum=1.0, freeze_scale=True)
    x = (1000 + torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    output = norm.all_groups_at_once(x)
    assert output.dtype == torch.bfloat16 and norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, x.float().mean((0, 2, 3)), rtol=1e-6, atol=1e-3)
    assert output.float().mean().abs() < 0.01 and 0.9 < output.float().std() < 1.1


def natural_images(n: int = 64, side: int = 12) -> Tensor:
    """Noise with neighbours and channels correlated as in photographs, and no mean."""
    noise = torch.randn(n, 3, side + 4, side + 4, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 3, stride=1) + 0.2 * noise[:, :, 1:-1, 1:-1]
    mixed = torch.einsum("cd,ndhw->nchw", torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]), smooth)
    return mixed - mixed.mean((0, 2, 3), keepdim=True)


def outputs_covariance(images: Tensor, filters: Tensor) -> Tensor:
    outputs = F.conv2d(images, filters).transpose(0, 1).flatten(1).double()  # (filters, patches)
    return outputs @ outputs.T / outputs.shape[1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_patch_covariance_is_the_mean_over_all_patches(size: int) -> None:
    images = natural_images(n=3, side=5)
    products = [
        torch.outer(patch, patch)
        for image in images
        for top in range(images.shape[2] - size + 1)
        for left in range(images.shape[3] - size + 1)
        for patch in [image[:, top : top + size, left : left + size].flatten()]
    ]
    torch.testing.assert_close(patch_covariance(images, size), torch.stack(products).mean(0))


def test_patch_covariance_does_not_depend_on_how_many_images_are_taken_at_once() -> None:
    images = natural_images(n=7, side=5).repeat(300, 1, 1, 1)  # 2,100 images: three portions
    torch.testing.assert_close(patch_covariance(images, 2), patch_covariance(images[:7], 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_whitened_patches_have_unit_covariance(size: int) -> None:
    images = natural_images()
    filters = whitening_filters(images, size, eps=1e-12)
    assert filters.shape == (3 * size**2, 3, size, size)
    torch.testing.assert_close(outputs_covariance(images, filters), torch.eye(3 * size**2).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("eps", [1e-2, 1.0])
def test_eps_holds_each_direction_back_by_its_share(eps: float) -> None:
    images = natural_images()
    eigenvalues = torch.linalg.eigvalsh(patch_covariance(images, 2).double()).flip(0)  # largest first
    covariance = outputs_covariance(images, whitening_filters(images, 2, eps))
    torch.testing.assert_close(covariance, torch.diag(eigenvalues / (eigenvalues + eps)), atol=1e-3, rtol=0)


def test_a_direction_without_any_variance_gives_finite_filters() -> None:
    grey = natural_images()[:, :1].expand(-1, 3, -1, -1)  # two thirds of the eigenvalues are 0
    assert whitening_filters(grey, 2, eps=1e-2).isfinite().all()
