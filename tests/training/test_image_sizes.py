"""Both networks, and the recipes as they are but for their widths, train on images larger than CIFAR's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset, build_dataset
from cifar_fast.kernels import amx, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.training.evaluate import predict_logits
from cifar_fast.training.loop import train
from cifar_fast.training.result import RunResult


def colours(side: int) -> Dataset:
    """Noise with more red or more green, `side` pixels wide."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randint(0, 120, (48, 3, side, side), dtype=torch.uint8, generator=generator)
    images[torch.arange(48), labels] += 120
    return build_dataset("colours", ["red", "green"], (images, labels), (images[:16], labels[:16]), "drawn")


LAPTOP = replace(
    recipes.laptop(), widths=(8, 8, 8), epochs=5.0, global_batch_size=16, ghost_batch_size=8, micro_batch_size=8,
    flat_epochs=0.0, precision="float32",
)  # fmt: skip
PAGE = replace(
    recipes.page_2019(), widths=(8, 8, 8, 8), epochs=15.0, bn_momentum=0.5, flat_epochs=0.0, global_batch_size=16,
    ghost_batch_size=8, cutout=8, ema_decay=0.0, precision="float32",
)  # fmt: skip


def train_with(recipe: Recipe, data: Dataset, convolution: str) -> RunResult:
    return train(replace(recipe, convolution=convolution), data, device="cpu", progress=False)


@pytest.mark.parametrize(("recipe", "side"), [(LAPTOP, 48), (LAPTOP, 96), (PAGE, 64)])
def test_recipes_train_on_larger_images(recipe: Recipe, side: int) -> None:
    data = colours(side)
    direct = train_with(recipe, data, "direct")
    assert direct.accuracy > 0.8
    assert predict_logits(direct.model, data.test_images, tta="flip_shift").shape == (16, 2)
    if winograd.available()[0]:  # with fused norms, which both take where there is a compiler
        fast = train_with(recipe, data, "winograd")
        assert fast.epochs[0].train_loss == pytest.approx(direct.epochs[0].train_loss, rel=1e-3)
        assert fast.accuracy > 0.8


@pytest.mark.parametrize("side", [48, 63, 95])
@pytest.mark.usefixtures("amx_everywhere")
def test_amx_convolves_larger_images(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, side, side, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 8, 3, 3, generator=generator)
    expected = F.conv2d(x.float(), weight.bfloat16().float(), padding=1)
    torch.testing.assert_close(amx.amx_conv2d(x, weight).float(), expected, rtol=2e-2, atol=5e-2)
    pooled = amx.amx_conv2d_max_pool(x, weight).float()
    torch.testing.assert_close(pooled, F.max_pool2d(expected, 2), rtol=2e-2, atol=5e-2)
