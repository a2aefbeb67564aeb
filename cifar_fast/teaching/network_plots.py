"""Draws a recipe's network: its layers, the shapes between them, and how many parameters each has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import nn

from cifar_fast.recipe import CIFAR_SIDE, Recipe
from cifar_fast.teaching.result_plots import Picture
from cifar_fast.training.layers import Conv3x3, GhostBatchNorm, Scale, Whitening
from cifar_fast.training.model import Residual, build_model, whiten_first_layer

FILL, FIXED, EDGE = "#9ECAE9", "#DDDDDD", "#1F5A85"
FUNNEL = 17.0  # width of an image's bar, of the 100 that the axes are wide
TEXT, SHAPE, LEARNED = 21.0, 82.0, 100.0  # where the columns begin or, to the right, end


@dataclass
class Stage:
    """One line of the drawing: layers that belong together."""

    name: str
    does: list[str]
    shape: tuple[int, ...]
    """Shape of the output for one image: (C, H, W) or (C,)."""
    learned: int = 0
    """Parameters that training changes."""
    fixed: int = 0
    """Parameters that it does not change: whitening filters, frozen scales."""
    residual: bool = False
    """Whether its output is added to its input."""

    @property
    def side(self) -> int:
        """Width of the feature maps in pixels."""
        return self.shape[-1] if len(self.shape) == 3 else 1


def stages(recipe: Recipe, n_classes: int = 10, side: int = CIFAR_SIDE) -> list[Stage]:
    """Build the recipe's network, send a blank image through it, and return what each part does, gives and learns."""
    no_shift = torch.zeros(3)
    model = build_model(recipe, n_classes, no_shift, no_shift + 1).eval()
    random = torch.Generator().manual_seed(0)
    whiten_first_layer(model, recipe, torch.randint(256, (8, 3, side, side), dtype=torch.uint8, generator=random))
    x = torch.zeros(1, 3, side, side)
    found = [Stage("image", [], tuple(x.shape[1:]))]
    layers = model.layers
    assert isinstance(layers, nn.Sequential)
    for name, layer in layers.named_children():
        with torch.no_grad():
            x = layer(x)
        if isinstance(layer, nn.Flatten):
            found[-1].shape = tuple(x.shape[1:])
            continue
        does = list(_words(layer))
        if isinstance(layer, Scale) or not any(isinstance(part, nn.Conv2d | nn.Linear) for part in layer.modules()):
            if name != "pool":  # an activation or a factor belongs to the layer before it
                found[-1].does += does
                continue
        counts = {True: 0, False: 0}
        for parameter in layer.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        shape = tuple(x.shape[1:])
        found.append(Stage(name, does, shape, counts[True], counts[False], isinstance(layer, Residual)))
    return found


def draw(recipe: Recipe, n_classes: int = 10, side: int = CIFAR_SIDE) -> Picture:
    """Draw the recipe's network from the image to the logits, for images `side` pixels wide."""
    found = stages(recipe, n_classes, side)
    figure = Picture(figsize=(8.6, 0.4 * len(found) + 1.1), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-4, 101), ylim=(len(found) + 0.4, -1.5))
    axis.axis("off")
    heading: dict[str, Any] = {"fontsize": 10, "color": "#555555", "va": "center"}
    axis.text(SHAPE, -1, "output", ha="right", **heading)
    axis.text(LEARNED, -1, "learned", ha="right", **heading)
    for place, stage in enumerate(found):
        _draw_stage(axis, place, stage, side)
    learned, fixed = (sum(getattr(stage, kind) for stage in found) for kind in ("learned", "fixed"))
    axis.axhline(len(found) - 0.5, color="#555555", linewidth=0.8, xmin=0.24)
    total = f"parameters: {learned:,} learned" + f", {fixed:,} fixed" * bool(fixed)
    axis.text(LEARNED, len(found), total, ha="right", va="center", fontsize=11, weight="bold")
    axis.set_title(f"{recipe.network}, widths {', '.join(map(str, recipe.widths))}", fontsize=12, loc="left")
    figure.alt = (
        f"The network {recipe.network} from an image of {_shape(found[0].shape)} values through {len(found) - 1} "
        f"stages to {n_classes} logits; {total}"
    )
    return figure


def _draw_stage(axis: Axes, place: int, stage: Stage, side: int) -> None:
    width = max(1.0, FUNNEL * stage.side / side)
    left = (FUNNEL - width) / 2
    fixed = stage.fixed > stage.learned
    style: dict[str, Any] = {
        "facecolor": FIXED if fixed else FILL,
        "edgecolor": EDGE,
        "linewidth": 1,
        "hatch": "///" * fixed,
    }
    if stage.name == "image":
        style["facecolor"] = "white"
    axis.add_patch(Rectangle((left, place - 0.32), width, 0.64, **style))
    if stage.residual:
        ends: dict[str, Any] = {"posA": (left, place - 0.95), "posB": (left, place + 0.3)}
        bow = "arc3,rad=0.9"
        axis.add_patch(FancyArrowPatch(**ends, connectionstyle=bow, arrowstyle="-|>", color=EDGE, mutation_scale=9))
    text: dict[str, Any] = {"va": "center", "fontsize": 11}
    axis.text(TEXT, place, stage.name, weight="bold", **text)
    axis.text(TEXT + 12.5, place, ", ".join(stage.does), **(text | {"fontsize": 10}))
    axis.text(SHAPE, place, _shape(stage.shape), ha="right", **text)
    if stage.learned or stage.fixed:
        axis.text(LEARNED, place, f"{stage.learned:,}", ha="right", **text)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _words(layer: nn.Module) -> Iterator[str]:
    """Name what a layer does, in the order in which it does it."""
    if isinstance(layer, Residual):
        yield f"input + 2 x ({', '.join(_words(layer.block1))})"
    elif isinstance(layer, Whitening):
        yield f"{layer.kernel_size[0]}x{layer.kernel_size[1]} whitening"
    elif isinstance(layer, nn.Conv2d):
        yield f"{layer.kernel_size[0]}x{layer.kernel_size[1]} conv"
        if isinstance(layer, Conv3x3) and layer.pool:
            yield "max-pool"
    elif isinstance(layer, GhostBatchNorm):
        yield "norm"
    elif isinstance(layer, nn.MaxPool2d):
        yield "max-pool"
    elif isinstance(layer, nn.AdaptiveMaxPool2d):
        yield "largest value of each channel"
    elif isinstance(layer, Scale):
        yield f"times 1/{round(1 / layer.factor)}" if (1 / layer.factor).is_integer() else f"times {layer.factor:.3g}"
    elif isinstance(layer, nn.Linear):
        yield "linear"
    elif isinstance(layer, nn.Sequential):
        for part in layer:
            yield from _words(part)
    else:
        yield type(layer).__name__
