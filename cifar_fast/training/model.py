"""The networks, built from a `Recipe`: `resnet9` and `convnet6`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from cifar_fast.recipe import Recipe
from cifar_fast.training.layers import Block, Conv3x3, GhostBatchNorm, Normalise, Scale, whitening_filters


def activation(recipe: Recipe) -> nn.Module:
    """Return the recipe's nonlinearity."""
    if recipe.activation == "celu":
        return nn.CELU(recipe.celu_alpha)
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[recipe.activation]()


def norm(recipe: Recipe, n_channels: int) -> GhostBatchNorm:
    """Return the recipe's batch norm for `n_channels`."""
    return GhostBatchNorm(
        n_channels,
        recipe.norm_group_size,
        eps=recipe.bn_eps,
        momentum=recipe.bn_momentum,
        freeze_scale=recipe.freeze_bn_scale,
    )


def conv_block(recipe: Recipe, n_in: int, n_out: int, *, pool: bool = False, convolution: str = "direct") -> Block:
    """Return convolution, norm and activation; with `pool` a max-pool by 2, where the recipe puts it."""
    conv_pools = pool and recipe.pool_position == "before_norm"
    layers: list[tuple[str, nn.Module]] = [
        ("conv", Conv3x3(n_in, n_out, init=recipe.conv_init, pool=conv_pools, convolution=convolution)),
        ("norm", norm(recipe, n_out)),
        ("activation", activation(recipe)),
    ]
    if pool and not conv_pools:
        place = {"before_activation": 2, "after_activation": 3}[recipe.pool_position]
        layers.insert(place, ("pool", nn.MaxPool2d(2)))
    return Block(OrderedDict(layers))


class Residual(nn.Module):
    """Two blocks whose output is added to their input."""

    def __init__(self, recipe: Recipe, width: int, *, convolution: str = "direct") -> None:
        super().__init__()
        self.block1 = conv_block(recipe, width, width, convolution=convolution)
        self.block2 = conv_block(recipe, width, width, convolution=convolution)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return x + self.block2(self.block1(x))


class Network(nn.Module):
    """Layers in a row, from normalised images to scaled logits; `normalise` prepares the images from pixel values."""

    def __init__(self, normalise: Normalise, layers: OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        self.normalise = normalise
        self.layers = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, H, W), normalised -> (N, classes)
        return self.layers(images)


def build_model(
    recipe: Recipe,
    n_classes: int,
    mean: Tensor,
    std: Tensor,
    *,
    convolution: str = "direct",
    fuse_norm: bool = False,
    seed: int = 0,
) -> Network:
    """Build the recipe's network for `n_classes`; its weights are drawn from `seed` on the CPU, so any device gets the
    same ones.

    `mean`, `std`: float32 (3,), in pixel values. `convolution`: the algorithm of the 3x3 convolutions. `fuse_norm`:
    whether a norm and the activation after it are fused. `whiten_first_layer` fills the whitening layer, if there is
    one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (_resnet9 if recipe.network == "resnet9" else _convnet6)(recipe, n_classes, convolution)
    network = Network(Normalise(mean, std), OrderedDict(layers))
    for module in network.modules():
        if isinstance(module, Block):
            module.fuse = fuse_norm
    return network


def _resnet9(recipe: Recipe, n_classes: int, convolution: str) -> list[tuple[str, nn.Module]]:
    # Source: David Page, "How to train your ResNet", 2018; with whitening as in part 8, 2019, and Apple's
    # ml-cifar-10-faster.
    first, second, third, fourth = recipe.widths
    size = recipe.whitening_size
    if size:
        # The whitening filters are fixed; a learned 1x1 convolution mixes their outputs.
        whiten = nn.Conv2d(3, 3 * size**2, size, padding=size // 2, bias=False)
        mix = [
            ("conv", nn.Conv2d(3 * size**2, first, 1, bias=False)),
            ("norm", norm(recipe, first)),
            ("activation", activation(recipe)),
        ]
        head: list[tuple[str, nn.Module]] = [("whiten", whiten), ("mix", Block(OrderedDict(mix)))]
    else:
        head = [("prepare", conv_block(recipe, 3, first))]
    return [
        *head,
        ("block1", conv_block(recipe, first, second, pool=True, convolution=convolution)),
        ("residual1", Residual(recipe, second, convolution=convolution)),
        ("block2", conv_block(recipe, second, third, pool=True, convolution=convolution)),
        ("block3", conv_block(recipe, third, fourth, pool=True, convolution=convolution)),
        ("residual3", Residual(recipe, fourth, convolution=convolution)),
        ("pool", nn.AdaptiveMaxPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(fourth, n_classes, bias=False)),
        ("scale", Scale(recipe.logit_scale)),
    ]


def _convnet6(recipe: Recipe, n_classes: int, convolution: str) -> list[tuple[str, nn.Module]]:
    # Source: Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498.
    size = recipe.whitening_size or 2  # without whitening a learned convolution of the same shape
    # Each direction and its opposite, because the activation that follows cuts off one half of each.
    n_in = 2 * 3 * size**2
    layers: list[tuple[str, nn.Module]] = [
        ("whiten" if recipe.whitening_size else "first", nn.Conv2d(3, n_in, size, bias=True)),
        ("activation", activation(recipe)),
    ]
    for number, width in enumerate(recipe.widths, start=1):
        layers.append((f"block{number}a", conv_block(recipe, n_in, width, pool=True, convolution=convolution)))
        layers.append((f"block{number}b", conv_block(recipe, width, width, convolution=convolution)))
        n_in = width
    linear = nn.Linear(n_in, n_classes, bias=False)
    # The head's weights start with unit variance; logit_scale compensates for that.
    linear.weight.data /= linear.weight.data.std()
    return [
        *layers,
        ("pool", nn.AdaptiveMaxPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", linear),
        ("scale", Scale(recipe.logit_scale)),
    ]


def whiten_first_layer(model: Network, recipe: Recipe, images: Tensor) -> None:
    """Fill the whitening layer, if there is one, from the patches of uint8 `images` (N, 3, H, W), and freeze it."""
    if not recipe.whitening_size:
        return
    layer = model.layers.get_submodule("whiten")
    assert isinstance(layer, nn.Conv2d)
    filters = whitening_filters(model.normalise(images), recipe.whitening_size, recipe.whitening_eps)
    if len(layer.weight) == 2 * len(filters):
        filters = torch.cat([filters, -filters])
    layer.weight.data.copy_(filters)
    layer.weight.requires_grad = False
