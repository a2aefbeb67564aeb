"""Fused norm and activation equal PyTorch's, one after the other, in double precision."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar_fast.kernels import fused
from cifar_fast.recipes import named
from cifar_fast.training.layers import Block, GhostBatchNorm
from cifar_fast.training.model import build_model

needs_compiler = pytest.mark.skipif(not fused.available()[0], reason=fused.available()[1])
ACTIVATIONS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "celu": nn.CELU(0.3)}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def images(n: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels-last, each channel with a mean far from 0, which a careless variance would drown in."""
    generator = torch.Generator().manual_seed(n * channels + height)
    x = 2 * torch.randn(n, channels, height, width, generator=generator)
    x += 20 * torch.randn(1, channels, 1, 1, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def ghost_norm(channels: int, group_size: int, *, freeze_scale: bool = False) -> GhostBatchNorm:
    norm = GhostBatchNorm(channels, group_size, eps=1e-5, momentum=0.1, freeze_scale=freeze_scale)
    if not freeze_scale:
        norm.weight.data.copy_(torch.linspace(0.5, 2, channels))
    norm.bias.data.copy_(torch.linspace(-2, 2, channels))
    return norm


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference in units of b's largest value, or of 0.1 where an activation leaves nothing."""
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)).item()


def trained(norm: GhostBatchNorm, activation: nn.Module, x: Tensor, dy: Tensor, *, fuse: bool) -> list[Tensor]:
    """y, dx and the gradients of the parameters that have one."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm.then(activation, x) if fuse else activation(norm(x))
    wanted = [x, *(p for p in norm.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@settings(max_examples=15, deadline=None)
@given(
    group_size=st.integers(2, 5),  # of few values a gradient is what rounding leaves of it
    groups=st.integers(1, 4),
    channels=st.sampled_from([1, 5, 16, 24, 64, 100, 130]),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    threads=st.integers(1, 3),
    freeze_scale=st.booleans(),
)
def test_equals_one_after_the_other_in_double_precision(
    activation: nn.Module,
    dtype: torch.dtype,
    group_size: int,
    groups: int,
    channels: int,
    height: int,
    width: int,
    threads: int,
    freeze_scale: bool,
) -> None:
    norm, x = (
        ghost_norm(channels, group_size, freeze_scale=freeze_scale),
        images(group_size * groups, channels, height, width, dtype),
    )
    double, dy = copy.deepcopy(norm).double(), images(len(x), channels, height, width, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert fused.suits(x, norm, activation)
        found = trained(norm, activation, x, dy, fuse=True)
        expected = trained(double, activation, x.double(), dy.double(), fuse=False)
        with torch.no_grad():
            evaluated = norm.eval().then(activation, x)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 3 + (not freeze_scale)
    assert found[0].dtype == found[1].dtype == evaluated.dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    y, dx = (relative_error(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    rounded = 1e-4 if dtype == torch.float32 else 2e-2
    assert y < rounded and dx < rounded
    # The others are sums of what is not rounded to bfloat16. They may cancel, so an error counts beside what is summed.
    summed = torch.linalg.vector_norm(dy.double(), dim=(0, 2, 3)).max()
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert (a.double() - b).abs().max() < 1e-4 * torch.maximum(b.abs().max(), summed)
    assert relative_error(evaluated, activation(double.eval()(x.double()))) < rounded
    for name in STATISTICS:
        torch.testing.assert_close(norm.get_buffer(name), double.get_buffer(name), check_dtype=False, rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_far_from_zero_are_what_torch_has(activation: nn.Module) -> None:
    values = torch.tensor([-1e30, -300, -90, -20, -5, -1e-3, 0, 1e-3, 5, 20, 90, 300, 1e30, torch.nan])
    x = values.view(-1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    zeros, ones = torch.zeros(1), torch.ones(1)
    y = fused.apply_and_activate(x, zeros, ones, zeros, activation)
    torch.testing.assert_close(y, activation(x), rtol=1e-6, atol=1e-6, equal_nan=True)


@needs_compiler
def test_the_same_threads_give_the_same_bits() -> None:
    x, activation = images(12, 40, 7, 7), nn.SiLU()
    first, second = (trained(ghost_norm(40, 4), activation, x, x, fuse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_compiler
def test_gradients_that_come_in_another_layout_or_format_are_taken() -> None:
    x, activation = images(4, 24, 5, 5), nn.SiLU()
    dy = images(4, 24, 5, 5, torch.bfloat16).float()
    expected = trained(ghost_norm(24, 4), activation, x, dy, fuse=True)
    found = trained(ghost_norm(24, 4), activation, x, dy.contiguous(), fuse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tanh_gelu(x: Tensor) -> tuple[Tensor, nn.Module]:
    return x, nn.GELU("tanh")


def unknown(x: Tensor) -> tuple[Tensor, nn.Module]:
    return x, nn.MaxPool2d(2)


def in_double(x: Tensor) -> tuple[Tensor, nn.Module]:
    return x.double(), nn.ReLU()


def channels_first(x: Tensor) -> tuple[Tensor, nn.Module]:
    return x.contiguous(), nn.ReLU()


@pytest.mark.parametrize("change", [tanh_gelu, unknown, in_double, channels_first])
def test_what_the_loops_do_not_support_is_not_fused(change) -> None:
    x, activation = change(images(4, 24, 5, 5))
    norm = ghost_norm(24, 4).to(x.dtype)
    assert not fused.suits(x, norm, activation)
    assert torch.equal(copy.deepcopy(norm).then(activation, x), activation(norm(x)))


def test_in_evaluation_a_gradient_that_is_asked_for_is_there() -> None:
    x, norm = images(4, 24, 5, 5).requires_grad_(), ghost_norm(24, 4).eval()
    (gradient,) = torch.autograd.grad(norm.then(nn.SiLU(), x).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("n", "side"), [(5, 3), (1, 1)])
def test_what_batch_norm_refuses_is_refused_in_its_words(n: int, side: int) -> None:
    """Images that are no whole number of groups are no error to batch norm of pytorch, but a lone value is."""
    norm, x = ghost_norm(3, 4 if n > 1 else 1), images(n, 3, side, side)
    outcomes = []
    for call in (lambda: norm.then(nn.ReLU(), x), lambda: nn.ReLU()(norm(x))):
        try:
            outcomes.append(call().shape)
        except (ValueError, RuntimeError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


# --- in a network ---


@needs_compiler
@pytest.mark.parametrize("name", ["smoke", "apple_8gpu"])
def test_a_network_is_the_same_with_and_without(name: str) -> None:
    recipe = replace(named(name), ghost_batch_size=4)
    recipe = replace(recipe, widths=(8,) * len(recipe.widths))
    mean, std = torch.full((3,), 128.0), torch.full((3,), 64.0)
    separate, together = (build_model(recipe, 10, mean, std, fuse_norm=fuse) for fuse in (False, True))
    separate.load_state_dict(together.state_dict())
    separate, together = (each.to(memory_format=torch.channels_last) for each in (separate, together))
    x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    outputs, nodes = [], []
    for network in (separate, together):
        y = network(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        nodes.append(names_of_nodes(y))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-5)
    blocks = sum(isinstance(module, Block) for module in separate.modules())
    assert nodes[0].count("NormActivationBackward") == 0 and nodes[1].count("NormActivationBackward") == blocks
    for (key, a), b in zip(separate.named_parameters(), together.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm() + 1e-6, key
    for key, a in separate.state_dict().items():
        torch.testing.assert_close(a, together.state_dict()[key], rtol=1e-3, atol=1e-4)


def names_of_nodes(y: Tensor) -> list[str]:
    """All of autograd's nodes behind `y`."""
    met, to_see = set(), [y.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is not None and node not in met:
            met.add(node)
            to_see += [following for following, _ in node.next_functions]
    return [node.name() for node in met]


def test_a_hook_on_a_norm_sees_its_output() -> None:
    block = Block()
    block.fuse = True
    norm, activation = ghost_norm(24, 4), nn.SiLU()
    block.add_module("norm", norm)
    block.add_module("activation", activation)
    seen: list[Tensor] = []
    x = images(4, 24, 5, 5)
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    watched = block(x)
    handle.remove()
    assert len(seen) == 1 and torch.equal(activation(seen[0]), watched.detach())
    block(x)
    assert len(seen) == 1
