"""Formats and layouts are compared on the same step, and float16 loses exactly the gradients that it rounds to 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.data.dataset import Dataset
from cifar_fast.experiments import number_formats
from cifar_fast.experiments.step_costs import steady_step
from cifar_fast.hardware.numerics import Numerics
from cifar_fast.kernels import amx, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import laptop as laptop_recipe
from cifar_fast.recipes import smoke
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.layers import Conv3x3
from cifar_fast.training.model import Network, build_model
from cifar_fast.training.setup import Setup
from cifar_fast.training.step import TrainingStep

CPU = torch.device("cpu")
RECIPE = replace(smoke(), widths=(16, 16, 16), n_shards=1, global_batch_size=16, ghost_batch_size=8)


def network(data: Dataset, recipe: Recipe = RECIPE) -> Network:
    return build_model(recipe, data.n_classes, *pixel_statistics(data.train_images))


def test_the_ways_differ_in_format_layout_and_algorithm(tiny_data: Dataset) -> None:
    images, labels = tiny_data.train_images[:16], tiny_data.train_labels[:16]
    # A recipe for larger batches shrinks to the images that there are.
    laptop = replace(laptop_recipe(), widths=(4, 4, 4))
    with_float16 = number_formats.step_ways(RECIPE, images, labels, device=CPU)
    ways = number_formats.step_ways(laptop, images, labels, device=CPU, float16=False)
    expected = {
        "float32, channels first",
        "float32, channels last",
        "bfloat16, channels first",
        "bfloat16, channels last",
    }
    compiled = {"float32, channels last, Winograd": winograd, "bfloat16, channels last, AMX": amx}
    assert set(ways) == expected | {way for way, loops in compiled.items() if loops.available()[0]}
    assert set(with_float16) - set(ways) == {"float16, channels last"}
    assert next(iter(ways)) == "float32, channels first"


@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_step_computes_in_its_format_and_layout_and_leaves_the_weights_alone(
    tiny_data: Dataset, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups: list[Setup] = []
    outputs: list[Tensor] = []

    def spied(setup: Setup) -> TrainingStep:
        setups.append(setup)
        setup.model.layers.block2a.conv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        return steady_step(setup)

    monkeypatch.setattr(number_formats, "steady_step", spied)
    recipe = replace(RECIPE, channels_last=channels_last)
    step = number_formats.training_step(recipe, tiny_data, Numerics(dtype, "direct", "for a test"), device=CPU)
    step()
    (setup,) = setups
    after_first = [p.clone() for p in setup.model.parameters()]  # in its first step Muon scales the filters
    step()
    assert outputs[0].dtype == dtype
    assert outputs[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert all(p.grad is None for p in setup.model.parameters())
    for before, now in zip(after_first, setup.model.parameters(), strict=True):
        torch.testing.assert_close(now, before)


def test_output_gradients_are_autograds(tiny_data: Dataset) -> None:
    model = network(tiny_data)
    images, labels = model.normalise(tiny_data.train_images[:16]), tiny_data.train_labels[:16]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = number_formats.output_gradients(model.eval(), images, labels, RECIPE)
    assert list(found) == ["block1a", "block1b", "block2a", "block2b", "block3a", "block3b"]
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv3x3):
            module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    loss = F.cross_entropy(model.train()(images), labels, label_smoothing=RECIPE.label_smoothing)
    gradients = torch.autograd.grad(loss, [outputs["layers.block1a.conv"], outputs["layers.block3b.conv"]])
    for name, expected in zip(("block1a", "block3b"), gradients, strict=True):
        expected = expected.flatten()[expected.flatten() != 0]
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-12)


def test_no_more_gradients_are_kept_than_wanted(tiny_data: Dataset) -> None:
    model = network(tiny_data)
    images, labels = model.normalise(tiny_data.train_images[:16]), tiny_data.train_labels[:16]
    found = number_formats.output_gradients(model, images, labels, RECIPE, most=100)
    assert all(50 < len(values) <= 100 for values in found.values())


def test_what_is_lost_is_what_rounds_to_zero() -> None:
    gradients = torch.tensor([2.0**-25, 2.0**-26, 2.0**-24, 1.0])  # float16's smallest number is 2^-24; half of it is 0
    assert number_formats.lost(gradients) == 0.5
    assert number_formats.lost(gradients, 2.0) == 0.25
    assert number_formats.lost(gradients, 4.0) == 0.0
    assert number_formats.lost(gradients, dtype=torch.bfloat16) == 0.0


def test_a_loss_scale_lets_rounding_move_the_gradients_less() -> None:
    gradients = torch.tensor([3 * 2.0**-26, 4 * 2.0**-26])  # of length 5 2^-26; 3 2^-26 is rounded to 4 2^-26
    assert number_formats.rounding_error(gradients) == pytest.approx(1 / 5)
    assert number_formats.rounding_error(gradients, 4.0) == 0.0
    assert number_formats.rounding_error(gradients, dtype=torch.bfloat16) == 0.0
