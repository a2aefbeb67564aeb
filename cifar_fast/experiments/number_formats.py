"""How fast a device computes in each number format and memory layout, and what a short format does to gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cifar_fast.data.dataset import Dataset
from cifar_fast.experiments.step_costs import steady_step, with_batch_size
from cifar_fast.hardware.numerics import DTYPES, Numerics
from cifar_fast.kernels import amx, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.training.layers import Conv3x3
from cifar_fast.training.model import Network
from cifar_fast.training.setup import Execution, set_up
from cifar_fast.training.step import forward_backward


def training_step(recipe: Recipe, data: Dataset, numerics: Numerics, *, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one eager training step, always on the first batch of `data`, on `device`.

    Set-up happens here, outside of any clock.
    """
    setup = set_up(recipe, data, Execution(numerics), device=device)
    step = steady_step(setup)
    images, labels = next(setup.batches.epoch(0))

    def step_again() -> None:
        step(images, labels)

    return step_again


def step_ways(
    recipe: Recipe, images: Tensor, labels: Tensor, *, device: torch.device, float16: bool = True
) -> dict[str, Callable[[], None]]:
    """Return, by name, training steps of one network on one batch that differ in format, layout and algorithm.

    The first is float32 with the channels outermost, which is PyTorch's default. `images`: uint8 (N, 3, H, W);
    `labels`: int64 (N,). `float16`: whether to include it; CPUs can be very slow at it.
    """
    recipe = replace(with_batch_size(recipe, len(labels)), micro_batch_size=0, resolutions=())
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    data = Dataset("one batch", classes, images, labels, images[:0], labels[:0], "the caller", "")
    ways = [("float32", False, "direct"), ("float32", True, "direct")]
    if device.type == "cpu" and winograd.available()[0]:
        ways.append(("float32", True, "winograd"))
    ways += [("bfloat16", False, "direct"), ("bfloat16", True, "direct")]
    if device.type == "cpu" and amx.available()[0]:
        ways.append(("bfloat16", True, "amx"))
    if float16:
        ways.append(("float16", True, "direct"))
    steps = {}
    for precision, channels_last, convolution in ways:
        algorithm = {"direct": "", "winograd": ", Winograd", "amx": ", AMX"}[convolution]
        numerics = Numerics(DTYPES[precision], convolution, "one of several that are compared")
        steps[f"{precision}, channels {'last' if channels_last else 'first'}{algorithm}"] = training_step(
            replace(recipe, channels_last=channels_last), data, numerics, device=device
        )
    return steps


def output_gradients(
    model: Network, images: Tensor, labels: Tensor, recipe: Recipe, *, most: int = 100_000
) -> dict[str, Tensor]:
    """Return by layer the gradients of a batch's mean loss for the outputs of the 3x3 convolutions, in float32.

    Args:
        model: a network on the CPU or a GPU; its parameters and its running statistics stay as they are.
        images: normalised (N, 3, H, W), on the same device.
        labels: int64 (N,).
        recipe: label smoothing and norm groups.
        most: gradients to keep of each layer, spread evenly over those that are not exactly 0.

    Returns:
        By the layer's name, in the order of the network: float32 (n,), on the CPU.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(gradient: Tensor) -> None:
            found[name] = gradient.detach().float().flatten()

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(keep)

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Conv3x3)}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    before, training = {name: value.clone() for name, value in model.named_buffers()}, model.training
    try:
        # In float32, since a short format would round the very gradients that are to be studied.
        forward_backward(model.train(), images, labels, replace(recipe, micro_batch_size=0), torch.float32)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        model.zero_grad()
        for name, value in model.named_buffers():
            value.copy_(before[name])
    return {name.removeprefix("layers.").removesuffix(".conv"): _evenly(found[name], most).cpu() for name in layers}


def _evenly(values: Tensor, most: int) -> Tensor:
    values = values[values != 0]
    return values[:: max(1, -(-len(values) // most))]


def lost(gradients: Tensor, loss_scale: float = 1.0, dtype: torch.dtype = torch.float16) -> float:
    """Return the share of `gradients`, none of them 0, that become 0 in `dtype` when the loss is multiplied first."""
    return (gradients.double() * loss_scale).to(dtype).eq(0).double().mean().item()


def rounding_error(gradients: Tensor, loss_scale: float = 1.0, dtype: torch.dtype = torch.float16) -> float:
    """Return how far rounding to `dtype` moves `gradients`, relative to their length.

    The loss is multiplied by `loss_scale` first, and the gradients are divided by it after rounding.
    """
    exact = gradients.double()
    rounded = (exact * loss_scale).to(dtype).double() / loss_scale
    return ((rounded - exact).norm() / exact.norm()).item()
