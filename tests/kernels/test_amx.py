"""Convolution with AMX and its gradients equal PyTorch's, to the last bit where nothing has to be rounded.

Every test computes with emulated instructions, on any machine, and once more with those of the processor if it has AMX.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cifar_fast.kernels import amx
from cifar_fast.kernels.compile import Library

ON_THE_PROCESSOR = amx.LIBRARY
HAS_AMX, WHY_NOT = amx.available()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason=WHY_NOT)
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


@pytest.fixture(scope="module", autouse=True, params=["emulated", *["processor"] * HAS_AMX])
def instructions(request: pytest.FixtureRequest, emulated_amx: Library) -> Iterator[str]:
    """Whose AMX instructions compute in this test."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "emulated":
            patch.setattr(amx, "LIBRARY", emulated_amx)
            patch.setattr(amx, "available", emulated_amx.available)
        yield request.param


def images_like(values: Tensor) -> Tensor:
    """Convert to bfloat16 and channels-last, as in training."""
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def example(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, filters (float32, their values bfloat16's) and output gradient."""
    generator = torch.Generator().manual_seed(n * cin + cout)
    shapes = (n, cin, height, width), (cout, cin, 3, 3), (n, cout, height, width)
    x, weight, dy = (images_like(torch.randn(shape, generator=generator)) for shape in shapes)
    return x.requires_grad_(), weight.float().requires_grad_(), dy


def whole_numbers(n: int, cin: int, cout: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers so small that bfloat16 holds each sum of their products exactly."""
    generator = torch.Generator().manual_seed(n * cin + cout)
    shapes = (n, cin, height, width), (cout, cin, 3, 3), (n, cout, height, width)
    x, weight, dy = (
        images_like(torch.randint(-limit, limit + 1, shape, generator=generator))
        for limit, shape in zip((2, 1, 2), shapes, strict=True)
    )
    return x.requires_grad_(), weight.float().requires_grad_(), dy


def pooled(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same images and filters with a gradient of the pooled output."""
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


@contextmanager
def n_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- The same convolution ---


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


def test_the_layout_of_the_gradient_does_not_matter() -> None:
    for convolve, tensors in (
        (amx.amx_conv2d, example(5, 20, 40, 7, 6)),
        (amx.amx_conv2d_max_pool, pooled(example(5, 20, 40, 7, 6))),
    ):
        found = forward_and_gradients(convolve, *tensors[:2], tensors[2].contiguous())
        assert equal(found, forward_and_gradients(convolve, *tensors)) == [True] * 3


# --- Fused max-pool ---


@settings(max_examples=20)
@given(**(SHAPES | {"height": st.integers(2, 17), "width": st.integers(2, 17)}))
def test_fused_pooling_is_pooling_afterwards(n: int, cin: int, cout: int, height: int, width: int) -> None:
    x, weight, _ = example(n, cin, cout, height, width)
    with torch.no_grad():  # the largest, rounded, is the largest of the rounded
        y, afterwards = amx.amx_conv2d_max_pool(x, weight), F.max_pool2d(amx.amx_conv2d(x, weight), 2)
    assert torch.equal(y, afterwards)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("n", "channels", "height", "width"),
    [
        (3, (16, 16), 31, 31),
        (33, (24, 33), 15, 15),
        (3, (70, 150), 7, 7),
        (33, (16, 16), 3, 3),
        (3, (24, 33), 2, 2),
        (33, (70, 150), 8, 8),
        (33, (24, 33), 3, 8),
        (3, (16, 16), 16, 16),
        (33, (70, 150), 5, 4),
    ],
)
def test_pooled_sums_of_whole_numbers_are_exact_and_the_first_of_equal_maxima_is_taken(
    n: int, channels: tuple[int, int], height: int, width: int
) -> None:
    tensors = pooled(whole_numbers(n, *channels, height, width))
    y = conv2d(*(value.detach().float() for value in tensors[:2]))
    windows = F.unfold(y[:, :, : height // 2 * 2, : width // 2 * 2].flatten(0, 1)[:, None], 2, stride=2)
    largest = windows.sort(dim=1).values[:, -2:]
    assert (largest[:, 0] == largest[:, 1]).any()  # ties are among them
    expected = in_double_precision(conv2d_max_pool, *tensors)
    assert expected[0].abs().max() <= 256 and expected[1].abs().max() <= 256
    assert equal(forward_and_gradients(amx.amx_conv2d_max_pool, *tensors), expected) == [True] * 3


def test_of_four_equal_values_the_first_is_the_maximum_as_in_torch() -> None:
    x, weight, dy = pooled(whole_numbers(2, 16, 16, 9, 9))
    x.data.zero_()
    expected = in_double_precision(conv2d_max_pool, x, weight, dy)
    assert expected[1].any()
    assert equal(forward_and_gradients(amx.amx_conv2d_max_pool, x, weight, dy), expected) == [True] * 3


# --- NaN and infinity ---


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_reaches_the_pixels_that_see_it_and_no_others(place: tuple[int, int]) -> None:
    x, weight, _ = example(35, 20, 40, 8, 8)
    x.data[33, 0, 4 + place[0], 4 + place[1]] = torch.nan
    with torch.no_grad():
        y, window = amx.amx_conv2d(x, weight), amx.amx_conv2d_max_pool(x, weight)
        expected = conv2d(x.double(), weight.double())
    assert torch.equal(y.isnan(), expected.isnan()) and y[33, :, 4, 4].isnan().all()
    assert torch.equal(window.isnan(), F.max_pool2d(expected, 2).isnan()) and window[33, :, 2, 2].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_filters_and_gradients_reach_the_result(value: float) -> None:
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


# --- The same numbers every time ---


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pool", [False, True])
def test_the_number_of_threads_changes_only_the_rounding_of_the_filters_gradients_and_repeats_are_identical(
    threads: int, pool: bool
) -> None:
    tensors = example(130, 40, 33, 7, 7)  # five blocks of images, for up to three threads
    convolve, tensors = (amx.amx_conv2d_max_pool, pooled(tensors)) if pool else (amx.amx_conv2d, tensors)
    reference = forward_and_gradients(convolve, *tensors)
    with n_threads(threads):
        first, second = (forward_and_gradients(convolve, *tensors) for _ in range(2))
    assert equal(first, second) == [True] * 3
    assert equal(first[:2], reference[:2]) == [True] * 2
    assert relative_error(first[2], reference[2].double()) < 1e-5


@pytest.mark.parametrize("pool", [False, True])
def test_an_image_gives_the_same_numbers_in_every_batch(pool: bool) -> None:
    x, weight, dy = example(70, 40, 33, 7, 7)
    convolve, (x, weight, dy) = (
        (amx.amx_conv2d_max_pool, pooled((x, weight, dy))) if pool else (amx.amx_conv2d, (x, weight, dy))
    )
    y, dx, _ = forward_and_gradients(convolve, x, weight, dy)
    for part in (slice(40), slice(1), slice(13, 70)):
        some = x.detach()[part].requires_grad_()
        assert equal(forward_and_gradients(convolve, some, weight, dy[part])[:2], [y[part], dx[part]]) == [True] * 2


def test_the_threads_earlier_tile_configuration_is_restored(emulated_amx: Library) -> None:
    functions = emulated_amx.functions
    theirs = bytes([1, *[0] * 15, *[48, 0] * 8, *[0] * 16, *[12] * 8, *[0] * 8])  # 12 rows of 48 bytes each
    tensors, found = example(3, 5, 6, 4, 4), ctypes.create_string_buffer(64)
    for before in (theirs, bytes(64)):  # none: the tiles are free again
        for compute in (lambda: forward_and_gradients(amx.amx_conv2d, *tensors), lambda: amx.multiply_in_registers(4)):
            with n_threads(1):  # this one
                functions.configure(before)
                compute()
                functions.read_configuration(found)
            assert found.raw == before
    functions.configure(bytes(64))


@needs_amx
def test_onednn_computes_the_same_before_and_after() -> None:
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
            assert torch.equal(a @ b, before)  # the same call again, for which it need not configure anew
    for _ in range(3):
        assert equal(theirs(), expected) == [True] * len(expected)
        assert equal(ours(), own) == [True] * len(own)


@needs_amx
def test_emulated_instructions_give_the_processors_bits(emulated_amx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example(40, 70, 33, 7, 6)
    for convolve, some in ((amx.amx_conv2d, tensors), (amx.amx_conv2d_max_pool, pooled(tensors))):
        found = []
        for library in (emulated_amx, ON_THE_PROCESSOR):
            monkeypatch.setattr(amx, "LIBRARY", library)
            found.append(forward_and_gradients(convolve, *some))
        assert equal(*found) == [True] * 3


# --- What is computed, and what is left to torch ---


def test_only_the_requested_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = example(4, 16, 16, 8, 8)
    _, dx, dw = forward_and_gradients(amx.amx_conv2d, x, weight, dy)
    for_weight, for_x = amx.amx_conv2d(x.detach(), weight), amx.amx_conv2d(x, weight.detach())
    with monkeypatch.context() as patch:
        patch.setattr(amx, "_convolve", None)  # the images' gradient would call it
        assert torch.equal(torch.autograd.grad(for_weight, weight, dy)[0], dw)
    monkeypatch.setattr(amx, "_weight_gradient", None)
    assert torch.equal(torch.autograd.grad(for_x, x, dy)[0], dx)
    assert not amx.amx_conv2d(x.detach(), weight.detach()).requires_grad


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
    ids=["float32", "float64", "channels first", "5x5 filters", "strided", "no images"],
)
def test_unsuitable_arguments_go_to_conv2d(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    x, weight = change(x.detach(), weight.detach().bfloat16())
    assert not amx._suits(x, weight)
    assert torch.equal(amx.amx_conv2d(x, weight), conv2d(x, weight))
    assert torch.equal(amx.amx_conv2d_max_pool(x, weight), conv2d_max_pool(x, weight))


def test_autocast_to_another_format_goes_to_conv2d() -> None:
    x, weight, _ = example(2, 16, 16, 8, 8)
    with torch.autocast("cpu", torch.float16):
        assert not amx._suits(x, weight) and not amx._suits(x.float(), weight)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_rate_counts_every_product(threads: int) -> None:
    with n_threads(threads):
        assert amx.multiply_in_registers(8) == 2 * 16 * 16 * 32 * 8 * threads
