"""The Winograd convolution and its gradients equal PyTorch's, for every edge and channel count it accepts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar_fast.data.dataset import Dataset
from cifar_fast.kernels import winograd
from cifar_fast.recipes import smoke
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.layers import Conv3x3
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.step import forward_backward

needs_compiler = pytest.mark.skipif(not winograd.available()[0], reason=winograd.available()[1])
SHAPES = {
    "n": st.integers(2, 9),
    "cin": st.sampled_from([16, 17, 24, 40, 64, 300]),
    "cout": st.sampled_from([16, 24, 33, 64, 96]),
    "height": st.integers(3, 17),
    "width": st.integers(3, 17),
}


def example(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, filters and output gradient, channels-last as in training."""
    generator = torch.Generator().manual_seed(n * cin + cout)
    shapes = (n, cin, height, width), (cout, cin, 3, 3), (n, cout, height, width)
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    x, weight, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))
    return x.requires_grad_(), weight.requires_grad_(), dy


def forward_and_gradients(convolve, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dw."""
    y = convolve(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def relative_error(a: Tensor, b: Tensor) -> float:
    """Distance of a from b in units of b's length."""
    return ((a.double() - b).norm() / b.norm()).item()


@needs_compiler
@settings(max_examples=12, deadline=None)
@given(**SHAPES)
def test_equals_conv2d_in_double_precision(n: int, cin: int, cout: int, height: int, width: int) -> None:
    x, weight, dy = example(n, cin, cout, height, width)
    assert winograd._suits(x, weight)
    got = forward_and_gradients(winograd.winograd_conv2d, x, weight, dy)
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = forward_and_gradients(lambda a, b: F.conv2d(a, b, padding=1), x, weight, dy.double())
    assert [relative_error(a, b) < 1e-4 for a, b in zip(got, want, strict=True)] == [True] * 3


@needs_compiler
@pytest.mark.parametrize("size", [(5, 5), (9, 5), (5, 8), (8, 13), (17, 17)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_images_that_share_tiles_do_not_touch_each_other(n: int, size: tuple[int, int]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, weight, dy = example(n, 17, 24, *size)
        got = forward_and_gradients(winograd.winograd_conv2d, x, weight, dy)
        pooled = F.max_pool2d(dy, 2)
        fused = forward_and_gradients(winograd.winograd_conv2d_max_pool, x, weight, pooled)
        apart = forward_and_gradients(winograd_then_max_pool, x, weight, pooled)
        assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))
    finally:
        torch.set_num_threads(threads)
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = forward_and_gradients(lambda a, b: F.conv2d(a, b, padding=1), x, weight, dy.double())
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-4
    for one in range(n):  # an image that leaked into its neighbour would leave more than rounding on a black one
        lit = (torch.arange(n) == one)[:, None, None, None]
        with torch.no_grad():
            alone = (x * lit).float().contiguous(memory_format=torch.channels_last)
            y = winograd.winograd_conv2d(alone, weight.float())
        assert (y * ~lit).abs().max() < 1e-5 * y.abs().max()


@needs_compiler
@pytest.mark.parametrize(
    ("size", "images", "tiles"),
    [((5, 5), 4, 9), ((5, 5), 5, 18), ((5, 8), 2, 6), ((8, 8), 4, 16), ((17, 17), 4, 81), ((7, 31), 3, 48)],
)
def test_two_images_in_a_line_share_tiles_where_that_saves_some(size: tuple[int, int], images: int, tiles: int) -> None:
    assert winograd.LIBRARY.functions.count_tiles(images, *size) == tiles


def winograd_then_max_pool(x: Tensor, weight: Tensor) -> Tensor:
    """What fused pooling must equal to the last bit."""
    return F.max_pool2d(winograd.winograd_conv2d(x, weight), 2)


def pooled_example(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As example, with the gradient of the pooled output."""
    x, weight, dy = example(n, cin, cout, height, width)
    return x, weight, F.max_pool2d(dy, 2)


@needs_compiler
@pytest.mark.parametrize(
    ("height", "width"), [(31, 31), (15, 15), (7, 7), (3, 3), (32, 32), (16, 16), (8, 8), (17, 18), (3, 8), (5, 4)]
)
@pytest.mark.parametrize("channels", [(16, 16), (24, 33), (17, 40)])
def test_fused_pooling_is_pooling_afterwards_to_the_last_bit(
    height: int, width: int, channels: tuple[int, int]
) -> None:
    tensors = pooled_example(3, *channels, height, width)
    got = forward_and_gradients(winograd.winograd_conv2d_max_pool, *tensors)
    want = forward_and_gradients(winograd_then_max_pool, *tensors)
    assert got[0].shape == (3, channels[1], height // 2, width // 2)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * 3


@needs_compiler
@settings(max_examples=12, deadline=None)
@given(**SHAPES)
def test_fused_pooling_equals_conv2d_and_max_pool_in_double_precision(
    n: int, cin: int, cout: int, height: int, width: int
) -> None:
    x, weight, _ = example(n, cin, cout, height, width)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    y = F.conv2d(x64, weight64, padding=1)
    want, indices = F.max_pool2d(y, 2, return_indices=True)
    # Where two candidates nearly tie, rounding may choose either and send the gradient to it: none is sent there.
    second = y.detach().flatten(2).scatter(2, indices.flatten(2), -torch.inf).view_as(y)
    clear = want - F.max_pool2d(second, 2) > 1e-2
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(n)) * clear
    assert clear.float().mean() > 0.9
    got = forward_and_gradients(winograd.winograd_conv2d_max_pool, x, weight, dy)
    gradients = torch.autograd.grad(want, (x64, weight64), dy.double())
    assert [relative_error(a, b) < 1e-4 for a, b in zip(got, (want.detach(), *gradients), strict=True)] == [True] * 3


@needs_compiler
def test_of_equal_values_the_first_is_the_maximum_as_in_torch() -> None:
    x, weight, dy = pooled_example(2, 16, 16, 9, 9)
    x.data.zero_()  # every window a tie, for every number of additions before it
    (dx,) = torch.autograd.grad(winograd.winograd_conv2d_max_pool(x, weight), x, dy)
    (want,) = torch.autograd.grad(F.max_pool2d(F.conv2d(x, weight, padding=1), 2), x, dy)
    assert relative_error(dx, want.double()) < 1e-4


@needs_compiler
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_survives_pooling(place: tuple[int, int]) -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    x.data[0, 0, 4 + place[0], 4 + place[1]] = torch.nan
    with torch.no_grad():
        assert torch.equal(
            winograd.winograd_conv2d_max_pool(x, weight).isnan(), winograd_then_max_pool(x, weight).isnan()
        )
        assert winograd.winograd_conv2d_max_pool(x, weight)[0, :, 2, 2].isnan().all()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("channels", [(64, 64), (256, 256)])  # partial sums for each thread, shared panels
@pytest.mark.parametrize("pool", [False, True])
def test_number_of_threads_changes_rounding_only_and_repeats_are_identical(
    threads: int, channels: tuple[int, int], pool: bool
) -> None:
    tensors = (pooled_example if pool else example)(5, *channels, 15, 15)
    convolve = winograd.winograd_conv2d_max_pool if pool else winograd.winograd_conv2d
    before = torch.get_num_threads()
    reference = forward_and_gradients(convolve, *tensors)
    torch.set_num_threads(threads)
    try:
        first, second = (forward_and_gradients(convolve, *tensors) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, second, reference, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-2)


@needs_compiler
def test_input_gradient_is_skipped_when_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = example(4, 16, 16, 8, 8)
    y = winograd.winograd_conv2d(x.detach(), weight)
    monkeypatch.setattr(winograd, "_convolve", None)  # the input's gradient would call it
    (dw,) = torch.autograd.grad(y, weight, dy)
    assert dw.shape == weight.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (x[:, :8].contiguous(memory_format=torch.channels_last), w[:, :8]),
        lambda x, w: (x[:, :, :2, :2].contiguous(memory_format=torch.channels_last), w),
    ],
    ids=["float64", "channels first", "few channels", "tiny images"],
)
def test_what_does_not_suit_goes_to_conv2d(change) -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    x, weight = change(x.detach(), weight.detach())
    assert not winograd._suits(x, weight)
    y = F.conv2d(x, weight, padding=1)
    assert torch.equal(winograd.winograd_conv2d(x, weight), y)
    assert torch.equal(winograd.winograd_conv2d_max_pool(x, weight), F.max_pool2d(y, 2))


# --- In a network ---


@needs_compiler
def test_a_networks_gradients_are_as_exact_as_those_of_direct_convolution_but_for_near_ties_in_max_pools(
    tiny_data: Dataset,
) -> None:
    """Max-pool sends a gradient to one place; where two values nearly tie, rounding decides which one."""
    exact, places = gradients(tiny_data, "direct", torch.float64), {}
    pinned = {
        (convolution, dtype): gradients(tiny_data, convolution, dtype, places)  # float64 comes first and fills them in
        for convolution, dtype in (("direct", torch.float64), ("direct", torch.float32), ("winograd", torch.float32))
    }
    assert len(places) == 4
    free = gradients(tiny_data, "winograd", torch.float32)
    for name, expected in exact.items():
        assert relative_error(pinned["direct", torch.float64][name], expected) < 1e-12, name
        direct, fast = (relative_error(pinned[c, torch.float32][name], expected) for c in ("direct", "winograd"))
        assert direct < 5e-5 and fast < 5e-5, name
        assert relative_error(free[name], expected) < 0.05, name


def gradients(
    data: Dataset, convolution: str, dtype: torch.dtype, places: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Of all parameters of a small network, over a batch; with `places` max-pools choose those, or fill them in."""
    recipe = replace(smoke(), global_batch_size=80)
    mean, std = pixel_statistics(data.train_images)
    network = build_model(recipe, data.n_classes, mean, std, convolution=convolution)
    whiten_first_layer(network, recipe, data.train_images)
    network = network.to(dtype).to(memory_format=torch.channels_last)
    if places is not None:
        pin_max_pools(network, places)
    images = network.normalise(data.train_images[:80]).to(dtype).contiguous(memory_format=torch.channels_last)
    forward_backward(network, images, data.train_labels[:80], recipe, dtype)
    return {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}


def pin_max_pools(network: Network, places: dict[str, Tensor]) -> None:
    def choose(y: Tensor, name: str, size: int) -> Tensor:
        largest, found = F.max_pool2d(y, size, return_indices=True)
        chosen = y.flatten(2).gather(2, places.setdefault(name, found).flatten(2)).view_as(largest)
        torch.testing.assert_close(chosen, largest, rtol=1e-5, atol=1e-5)  # another place only of a near tie
        return chosen

    for name, module in network.named_modules():
        if isinstance(module, Conv3x3) and module.pool:
            module.pool = False
            module.register_forward_hook(lambda module, inputs, y, name=name: choose(y, name, 2))
        elif isinstance(module, nn.AdaptiveMaxPool2d):
            module.forward = lambda x, name=name: choose(x, name, x.shape[2])


@needs_compiler
def test_one_openmp_runtime_is_loaded() -> None:
    """Two would compete for the same cores."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(paths) <= 1
