"""Convolution on matrix tiles and its gradients equal PyTorch's, to the last bit where nothing has to be rounded."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cifar_fast.kernels import amx, fused
from cifar_fast.kernels import compile as native

needs_amx = pytest.mark.skipif(not amx.available()[0], reason=amx.available()[1])
needs_compiler = pytest.mark.skipif(not fused.available()[0], reason=fused.available()[1])
SHAPES = {
    "n": st.integers(1, 70),
    "cin": st.integers(1, 100),
    "cout": st.integers(1, 100),
    "height": st.integers(1, 17),
    "width": st.integers(1, 17),
}
# More channels, pixels, or images than are packed at a time for the filters' gradient.
LARGE = [(3, 70, 150, 5, 5), (40, 40, 33, 31, 31), (300, 17, 40, 3, 3), (2, 3, 5, 2, 70)]
Convolve = Callable[[Tensor, Tensor], Tensor]


def images_like(values: Tensor) -> Tensor:
    """As they are in training: bfloat16 and channels-last."""
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def example(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, filters (float32, their values bfloat16's) and output gradient."""
    generator = torch.Generator().manual_seed(n * cin + cout)
    shapes = (n, cin, height, width), (cout, cin, 3, 3), (n, cout, height, width)
    x, weight, dy = (images_like(torch.randn(shape, generator=generator)) for shape in shapes)
    return x.requires_grad_(), weight.float().requires_grad_(), dy


def whole_numbers(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As example, but so small whole numbers that bfloat16 holds each sum of their products exactly."""
    generator = torch.Generator().manual_seed(n * cin + cout)
    shapes = (n, cin, height, width), (cout, cin, 3, 3), (n, cout, height, width)
    x, weight, dy = (
        images_like(torch.randint(-limit, limit + 1, shape, generator=generator))
        for limit, shape in zip((2, 1, 2), shapes, strict=True)
    )
    return x.requires_grad_(), weight.float().requires_grad_(), dy


def pooled(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a gradient of the pooled output."""
    x, weight, dy = tensors
    return x, weight, dy[:, :, : dy.shape[2] // 2, : dy.shape[3] // 2].contiguous(memory_format=torch.channels_last)


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def conv2d_max_pool(x: Tensor, weight: Tensor) -> Tensor:
    return F.max_pool2d(conv2d(x, weight), 2)


def forward_and_gradients(convolve: Convolve, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dw."""
    y = convolve(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def in_double_precision(convolve: Convolve, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dw."""
    x, weight = (value.detach().double().requires_grad_() for value in (x, weight))
    return forward_and_gradients(convolve, x, weight, dy.double())


def relative_error(a: Tensor, b: Tensor) -> float:
    """Distance of a from b in units of b's length."""
    return ((a.double() - b).norm() / b.norm()).item()


def equal(found: list[Tensor], expected: list[Tensor]) -> list[bool]:
    return [torch.equal(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]


def on_threads(threads: int, *arguments: object) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return forward_and_gradients(*arguments)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


# --- The same convolution ---


@needs_amx
@settings(max_examples=20)
@given(**SHAPES)
def test_equals_conv2d_in_double_precision(n: int, cin: int, cout: int, height: int, width: int) -> None:
    tensors = example(n, cin, cout, height, width)
    assert amx._suits(*tensors[:2])
    found = forward_and_gradients(amx.amx_conv2d, *tensors)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    expected = in_double_precision(conv2d, *tensors)
    # y and dx are rounded once, by at most 2^-9 of each value; dw is summed in float32.
    limits = (3e-3, 3e-3, 1e-5)
    assert [relative_error(a, b) < c for a, b, c in zip(found, expected, limits, strict=True)] == [True] * 3


@needs_amx
@settings(max_examples=20)
@given(**SHAPES)
@with_example(*LARGE[0])
@with_example(*LARGE[1])
@with_example(*LARGE[2])
@with_example(*LARGE[3])
def test_sums_of_whole_numbers_are_exact(n: int, cin: int, cout: int, height: int, width: int) -> None:
    tensors = whole_numbers(n, cin, cout, height, width)
    expected = in_double_precision(conv2d, *tensors)
    assert max(value.abs().max() for value in expected[:2]) <= 256  # beyond, bfloat16 has every other number only
    assert equal(forward_and_gradients(amx.amx_conv2d, *tensors), expected) == [True] * 3


@needs_amx
def test_the_layout_of_the_gradient_does_not_matter() -> None:
    for convolve, tensors in (
        (amx.amx_conv2d, example(5, 20, 40, 7, 6)),
        (amx.amx_conv2d_max_pool, pooled(example(5, 20, 40, 7, 6))),
    ):
        found = forward_and_gradients(convolve, *tensors[:2], tensors[2].contiguous())
        assert equal(found, forward_and_gradients(convolve, *tensors)) == [True] * 3


# --- Max-pool at once ---


@needs_amx
@settings(max_examples=20)
@given(**(SHAPES | {"height": st.integers(2, 17), "width": st.integers(2, 17)}))
def test_pooling_at_once_is_pooling_afterwards(n: int, cin: int, cout: int, height: int, width: int) -> None:
    x, weight, _ = example(n, cin, cout, height, width)
    with torch.no_grad():  # the largest, rounded, is the largest of the rounded
        y, apart = amx.amx_conv2d_max_pool(x, weight), F.max_pool2d(amx.amx_conv2d(x, weight), 2)
    assert torch.equal(y, apart)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_amx
@pytest.mark.parametrize(
    ("height", "width"), [(31, 31), (15, 15), (7, 7), (3, 3), (2, 2), (8, 8), (3, 8), (16, 16), (5, 4)]
)
@pytest.mark.parametrize("channels", [(16, 16), (24, 33), (70, 150)])
@pytest.mark.parametrize("n", [3, 33])
def test_pooled_sums_of_whole_numbers_are_exact_and_of_equal_ones_the_first_is_the_maximum(
    height: int, width: int, channels: tuple[int, int], n: int
) -> None:
    tensors = pooled(whole_numbers(n, *channels, height, width))
    y = conv2d(*(value.detach().float() for value in tensors[:2]))
    windows = F.unfold(y[:, :, : height // 2 * 2, : width // 2 * 2].flatten(0, 1)[:, None], 2, stride=2)
    largest = windows.sort(dim=1).values[:, -2:]
    assert (largest[:, 0] == largest[:, 1]).any()  # ties are among them
    expected = in_double_precision(conv2d_max_pool, *tensors)
    assert expected[0].abs().max() <= 256 and expected[1].abs().max() <= 256
    assert equal(forward_and_gradients(amx.amx_conv2d_max_pool, *tensors), expected) == [True] * 3


@needs_amx
def test_where_all_are_equal_the_first_is_the_maximum_as_in_torch() -> None:
    x, weight, dy = pooled(whole_numbers(2, 16, 16, 9, 9))
    x.data.zero_()
    expected = in_double_precision(conv2d_max_pool, x, weight, dy)
    assert expected[1].any()
    assert equal(forward_and_gradients(amx.amx_conv2d_max_pool, x, weight, dy), expected) == [True] * 3


# --- What is not a number, and what is infinite ---


@needs_amx
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_reaches_the_pixels_that_see_it_and_no_others(place: tuple[int, int]) -> None:
    x, weight, _ = example(35, 20, 40, 8, 8)
    x.data[33, 0, 4 + place[0], 4 + place[1]] = torch.nan
    with torch.no_grad():
        y, window = amx.amx_conv2d(x, weight), amx.amx_conv2d_max_pool(x, weight)
        expected = conv2d(x.double(), weight.double())
    assert torch.equal(y.isnan(), expected.isnan()) and y[33, :, 4, 4].isnan().all()
    assert torch.equal(window.isnan(), F.max_pool2d(expected, 2).isnan()) and window[33, :, 2, 2].isnan().all()


@needs_amx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_filters_and_gradients_that_are_no_finite_numbers_go_through(value: float) -> None:
    x, weight, dy = whole_numbers(3, 5, 40, 4, 4)
    weight.data[7, 2, 1, 1] = value
    x.data[:] = 1
    with torch.no_grad():
        torch.testing.assert_close(
            amx.amx_conv2d(x, weight).double(), conv2d(x.double(), weight.double()), equal_nan=True, rtol=0, atol=0
        )
    x, weight, dy = whole_numbers(3, 5, 40, 4, 4)
    x.data[:], weight.data[:] = 1, 1
    dy[1, 7, 2, 2] = value
    found, expected = forward_and_gradients(amx.amx_conv2d, x, weight, dy), in_double_precision(conv2d, x, weight, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, equal_nan=True, rtol=0, atol=0)


# --- Always the same ---


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pool", [False, True])
def test_number_of_threads_changes_rounding_of_filters_gradients_only_and_repeats_are_identical(
    threads: int, pool: bool
) -> None:
    tensors = example(150, 40, 70, 9, 9)
    convolve, tensors = (amx.amx_conv2d_max_pool, pooled(tensors)) if pool else (amx.amx_conv2d, tensors)
    reference = forward_and_gradients(convolve, *tensors)
    first, second = (on_threads(threads, convolve, *tensors) for _ in range(2))
    assert equal(first, second) == [True] * 3
    assert equal(first[:2], reference[:2]) == [True] * 2
    assert relative_error(first[2], reference[2].double()) < 1e-5


@needs_amx
@pytest.mark.parametrize("pool", [False, True])
def test_an_image_gives_the_same_in_every_batch(pool: bool) -> None:
    x, weight, dy = example(70, 40, 33, 7, 7)
    convolve, (x, weight, dy) = (
        (amx.amx_conv2d_max_pool, pooled((x, weight, dy))) if pool else (amx.amx_conv2d, (x, weight, dy))
    )
    y, dx, _ = forward_and_gradients(convolve, x, weight, dy)
    for part in (slice(40), slice(1), slice(13, 70)):
        some = x.detach()[part].requires_grad_()
        assert equal(forward_and_gradients(convolve, some, weight, dy[part])[:2], [y[part], dx[part]]) == [True] * 2


@needs_amx
def test_onednns_own_use_of_the_tiles_is_not_disturbed() -> None:
    """It may remember what it configured, by thread: what we configure in between must not stay.

    The oneDNN of torch 2.14 configures anew for each call, and would not notice.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [torch.randn(shape, generator=generator).bfloat16() for shape in ((m, k), (k, n))]
        for m, k, n in ((70, 90, 50), (7, 200, 24), (256, 256, 256), (33, 65, 129))
    ]
    tensors, pooled_tensors = example(40, 24, 40, 9, 9), pooled(example(40, 24, 40, 9, 9))
    half = tensors[1].detach().bfloat16()

    def theirs() -> list[Tensor]:
        with torch.no_grad():
            return [*(a @ b for a, b in pairs), conv2d(tensors[0], half)]

    def ours() -> list[Tensor]:
        return [
            *forward_and_gradients(amx.amx_conv2d, *tensors),
            *forward_and_gradients(amx.amx_conv2d_max_pool, *pooled_tensors),
        ]

    expected, own = theirs(), ours()
    for a, b in pairs:
        before = a @ b
        for between in (ours, lambda: amx.multiply_in_registers(8)):
            between()
            assert torch.equal(a @ b, before)  # twice the same call: nothing would be configured again
    for _ in range(3):
        assert equal(theirs(), expected) == [True] * len(expected)
        assert equal(ours(), own) == [True] * len(own)


# --- What is computed, and what is left to torch ---


@needs_amx
def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = example(4, 16, 16, 8, 8)
    _, dx, dw = forward_and_gradients(amx.amx_conv2d, x, weight, dy)
    for_weight, for_x = amx.amx_conv2d(x.detach(), weight), amx.amx_conv2d(x, weight.detach())
    with monkeypatch.context() as patch:
        patch.setattr(amx, "_convolve", None)  # the images' gradient would call it
        assert torch.equal(torch.autograd.grad(for_weight, weight, dy)[0], dw)
    monkeypatch.setattr(amx, "_weight_gradient", None)
    assert torch.equal(torch.autograd.grad(for_x, x, dy)[0], dx)
    assert not amx.amx_conv2d(x.detach(), weight.detach()).requires_grad


@needs_amx
@pytest.mark.parametrize("pool", [False, True])
def test_under_autocast_float32_is_rounded_and_gets_float32_gradients(pool: bool) -> None:
    x, weight, dy = example(4, 20, 40, 8, 8)
    convolve, (x, weight, dy) = (
        (amx.amx_conv2d_max_pool, pooled((x, weight, dy))) if pool else (amx.amx_conv2d, (x, weight, dy))
    )
    long = (x.detach().float() * (1 + 2**-12)).requires_grad_()  # rounds to x
    assert torch.equal(long.bfloat16(), x) and not torch.equal(long, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = forward_and_gradients(convolve, long, weight, dy)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert equal(found, forward_and_gradients(convolve, x, weight, dy)) == [True] * 3


@needs_amx
def test_filters_are_rounded_to_the_nearest_and_their_gradient_has_their_format() -> None:
    x, weight, dy = example(4, 20, 40, 8, 8)
    weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight.data.view(-1)[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway: to the even neighbour
    short = weight.detach().bfloat16().requires_grad_()
    found, expected = (forward_and_gradients(amx.amx_conv2d, x, w, dy) for w in (weight, short))
    assert found[2].dtype == torch.float32 and expected[2].dtype == torch.bfloat16
    assert equal([*found[:2], found[2].bfloat16()], expected) == [True] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.float(), w.float()),
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (x, F.pad(w, (1, 1, 1, 1), value=1.0)),
        lambda x, w: (x[:, :, ::2, ::2], w),
        lambda x, w: (x[:0], w),
    ],
    ids=["float32", "float64", "channels first", "5x5 filters", "with gaps", "no images"],
)
def test_what_does_not_suit_goes_to_conv2d(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    x, weight = change(x.detach(), weight.detach().bfloat16())
    assert not amx._suits(x, weight)
    assert torch.equal(amx.amx_conv2d(x, weight), conv2d(x, weight))
    assert torch.equal(amx.amx_conv2d_max_pool(x, weight), conv2d_max_pool(x, weight))


def test_autocast_to_another_format_goes_to_conv2d() -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    with torch.autocast("cpu", torch.float16):
        assert not amx._suits(x, weight) and not amx._suits(x.float(), weight)


@needs_amx
@pytest.mark.parametrize("threads", [1, 2])
def test_the_rate_that_nothing_can_pass_counts_every_product(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert amx.multiply_in_registers(8) == 2 * 16 * 16 * 32 * 8 * threads
    finally:
        torch.set_num_threads(before)


# --- Machines without ---


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Whether it is available is found out again in this test, and again after it."""
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path))
    forget = amx.available.cache_clear, amx._library.cache_clear
    [clear() for clear in forget]
    yield
    monkeypatch.undo()
    [clear() for clear in forget]


def require_conv2d() -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    weight = weight.detach().bfloat16()
    assert torch.equal(amx.amx_conv2d(x, weight), conv2d(x, weight))
    assert torch.equal(amx.amx_conv2d_max_pool(x, weight), conv2d_max_pool(x, weight))


@pytest.mark.usefixtures("asked_anew")
def test_without_a_compiler_the_reason_is_given_and_conv2d_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    usable, reason = amx.available()
    assert not usable and "no-such-compiler" in reason
    require_conv2d()


@pytest.mark.usefixtures("asked_anew")
def test_without_the_systems_permission_the_reason_is_given_and_conv2d_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda name: SimpleNamespace(permit=lambda: -1))
    usable, reason = amx.available()
    assert not usable and "AMX" in reason
    require_conv2d()


@needs_compiler
@pytest.mark.usefixtures("asked_anew")
def test_compiled_for_a_processor_without_tiles_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-fopenmp", "-fPIC"))
    monkeypatch.setattr(native, "FILES", ("amx.c",))
    usable, reason = amx.available()
    assert not usable and "AMX" in reason
    require_conv2d()
