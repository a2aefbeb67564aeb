"""What number formats and memory layouts are worth on a device, and what a short format leaves of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cifar_fast.kernels import amx, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.layers import Conv3x3
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.step import forward_backward


def training_step(
    recipe: Recipe,
    model: Network,
    images: Tensor,
    labels: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> Callable[[], None]:
    """Return a function that computes `forward_backward` of one batch in `dtype`, always the same, on `device`.

    `images`: uint8 (N, 3, H, W); `labels`: int64 (N,). The copies on the device are made here, outside of any clock.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, torch.float32).to(memory_format=layout)
    batch = model.normalise(images.to(device)).contiguous(memory_format=layout)
    labels = labels.to(device)

    def step() -> None:
        forward_backward(model, batch, labels, recipe, dtype)
        model.zero_grad()

    return step


def step_ways(
    recipe: Recipe, images: Tensor, labels: Tensor, *, device: torch.device, float16: bool = True
) -> dict[str, Callable[[], None]]:
    """Return, by name, training steps of one network on one batch that differ in format, layout and algorithm.

    The first is float32 with the channels outermost, which PyTorch does unless told otherwise. `images`: uint8
    (N, 3, H, W); `labels`: int64 (N,). `float16`: whether to have it too; CPUs can be very slow at it.
    """
    recipe = replace(recipe, micro_batch_size=0)
    ways = [("float32", False, "direct"), ("float32", True, "direct")]
    if device.type == "cpu" and winograd.available()[0]:
        ways.append(("float32", True, "winograd"))
    ways += [("bfloat16", False, "direct"), ("bfloat16", True, "direct")]
    if device.type == "cpu" and amx.available()[0]:
        ways.append(("bfloat16", True, "amx"))
    if float16:
        ways.append(("float16", True, "direct"))
    steps = {}
    for name, channels_last, convolution in ways:
        model = build_model(recipe, int(labels.max()) + 1, *pixel_statistics(images), convolution=convolution)
        whiten_first_layer(model, recipe, images)
        named = {"direct": "", "winograd": ", Winograd", "amx": ", AMX"}[convolution]
        title = f"{name}, channels {'last' if channels_last else 'first'}{named}"
        steps[title] = training_step(
            recipe,
            model,
            images,
            labels,
            device=device,
            dtype=getattr(torch, name),
            channels_last=channels_last,
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
        most: gradients kept of each layer, evenly taken of all that are not exactly 0.

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
        # A short format would round on the way; what it would round is wanted.
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

    The loss is multiplied by `loss_scale` before, and the gradients are divided by it after the rounding.
    """
    wanted = gradients.double()
    rounded = (wanted * loss_scale).to(dtype).double() / loss_scale
    return ((rounded - wanted).norm() / wanted.norm()).item()
