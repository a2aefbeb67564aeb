"""The Winograd convolution and its gradients equal PyTorch's, for every edge and channel count it accepts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cifar_fast import winograd

needs_compiler = pytest.mark.skipif(not winograd.available()[0], reason=winograd.available()[1])


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
@given(
    n=st.integers(2, 9),
    cin=st.sampled_from([16, 17, 24, 40, 64, 300]),
    cout=st.sampled_from([16, 24, 33, 64, 96]),
    height=st.integers(3, 17),
    width=st.integers(3, 17),
)
def test_equals_conv2d_in_double_precision(n: int, cin: int, cout: int, height: int, width: int) -> None:
    x, weight, dy = example(n, cin, cout, height, width)
    assert winograd._suits(x, weight)
    got = forward_and_gradients(winograd.winograd_conv2d, x, weight, dy)
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = forward_and_gradients(lambda a, b: F.conv2d(a, b, padding=1), x, weight, dy.double())
    assert [relative_error(a, b) < 1e-4 for a, b in zip(got, want, strict=True)] == [True] * 3


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("channels", [(64, 64), (256, 256)])  # partial sums for each thread, shared panels
def test_number_of_threads_changes_rounding_only_and_repeats_are_identical(
    threads: int, channels: tuple[int, int]
) -> None:
    tensors = example(5, *channels, 15, 15)
    before = torch.get_num_threads()
    reference = forward_and_gradients(winograd.winograd_conv2d, *tensors)
    torch.set_num_threads(threads)
    try:
        first, second = (forward_and_gradients(winograd.winograd_conv2d, *tensors) for _ in range(2))
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
    assert torch.equal(winograd.winograd_conv2d(x, weight), F.conv2d(x, weight, padding=1))


def test_without_a_compiler_the_reason_is_given_and_conv2d_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    forget = winograd.available.cache_clear, winograd._library.cache_clear
    [clear() for clear in forget]
    try:
        usable, reason = winograd.available()
        x, weight, _ = example(2, 16, 16, 8, 8)
        y = winograd.winograd_conv2d(x, weight)
    finally:
        monkeypatch.undo()
        [clear() for clear in forget]
    assert not usable
    assert "no-such-compiler" in reason
    assert torch.equal(y, F.conv2d(x, weight, padding=1))


@needs_compiler
def test_one_openmp_runtime_is_loaded() -> None:
    """Two would compete for the same cores."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(paths) <= 1
