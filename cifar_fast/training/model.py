"""The networks, built from a `Recipe`: `resnet9` and `convnet6`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cifar_fast.errors import TricksError
from cifar_fast.recipe import Recipe
from cifar_fast.training.layers import (
    Block,
    Conv3x3,
    GhostBatchNorm,
    Normalise,
    Scale,
    Whitening,
    whitening_filters,
    whitening_layer,
)

ModelFunction = Callable[[Recipe, int], nn.Module]
"""From a recipe and the number of classes to a module that turns normalised images (N, 3, H, W) into logits."""


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
    """Any module from normalised images to logits, as `layers`; `normalise` prepares the images from pixel values."""

    def __init__(
        self,
        normalise: Normalise,
        layers: nn.Module,
        n_classes: int,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        """Join the two; `memory_format` is how `layers` expects the images in an evaluation."""
        super().__init__()
        self.normalise = normalise
        self.layers = layers
        self.n_classes = n_classes
        self.memory_format = memory_format

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, H, W), normalised -> (N, classes)
        logits = self.layers(images)
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.n_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TricksError(
                f"the model returned {got} for {len(images)} images; ({len(images)}, {self.n_classes}) was expected: "
                "a logit for each image and class"
            )
        return logits


def tensors(model: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of `model`, each once however many modules share it."""
    return [*model.parameters(), *model.buffers()]


def build_network(
    function: ModelFunction,
    recipe: Recipe,
    n_classes: int,
    mean: Tensor,
    std: Tensor,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    seed: int = 0,
) -> Network:
    """Call `function` with torch's generator at `seed`, on the CPU, so that any device gets the same weights.

    `mean`, `std`: float32 (3,), in pixel values. `memory_format`: as for `Network`. `whiten_first_layer` fills the
    whitening layer, if there is one. Raises `TricksError` if `function` returns no module that can be trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = function(recipe, n_classes)
    return Network(Normalise(mean, std), require_trainable(layers), n_classes, memory_format)


def require_trainable(model: object) -> nn.Module:
    """Return what a `model` function returned; raise `TricksError` unless it is a module that can be trained."""
    if not isinstance(model, nn.Module):
        raise TricksError(f"`model` returned {type(model).__name__}; it must return an nn.Module")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise TricksError(f"`model` returned layers whose sizes are not known yet: {', '.join(lazy)}; give their sizes")
    if not any(p.requires_grad for p in model.parameters()):
        raise TricksError("`model` returned a module without a parameter to learn (requires_grad)")
    return model


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
    """Build the recipe's own network: `build_network` of `recipe_layers`, with their arguments."""
    layers = partial(recipe_layers, convolution=convolution, fuse_norm=fuse_norm)
    return build_network(layers, recipe, n_classes, mean, std, seed=seed)


def recipe_layers(
    recipe: Recipe, n_classes: int, *, convolution: str = "direct", fuse_norm: bool = False
) -> nn.Sequential:
    """Return the layers of the recipe's network.

    `convolution`: the algorithm of the 3x3 convolutions. `fuse_norm`: whether a norm and the activation after it are
    fused.
    """
    named = (_resnet9 if recipe.network == "resnet9" else _convnet6)(recipe, n_classes, convolution)
    layers = nn.Sequential(OrderedDict(named))
    for module in layers.modules():
        if isinstance(module, Block):
            module.fuse = fuse_norm
    return layers


def _resnet9(recipe: Recipe, n_classes: int, convolution: str) -> list[tuple[str, nn.Module]]:
    # Source: David Page, "How to train your ResNet", 2018; with whitening as in part 8, 2019, and Apple's
    # ml-cifar-10-faster.
    first, second, third, fourth = recipe.widths
    size = recipe.whitening_size
    if size:
        # The whitening filters are fixed; a learned 1x1 convolution mixes their outputs.
        whiten = Whitening(3, 3 * size**2, size, padding=size // 2, bias=False)
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
    first = Whitening if recipe.whitening_size else nn.Conv2d
    layers: list[tuple[str, nn.Module]] = [
        ("whiten" if recipe.whitening_size else "first", first(3, n_in, size, bias=True)),
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
    layer = whitening_layer(model)
    if layer is None:
        return
    filters = whitening_filters(model.normalise(images), recipe.whitening_size, recipe.whitening_eps)
    if len(layer.weight) == 2 * len(filters):
        filters = torch.cat([filters, -filters])
    layer.weight.data.copy_(filters)
    layer.weight.requires_grad = False
