"""A step's gradients, statistics and updates are those of the formula, in one buffer or in parts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.hardware.device import OTHER_GPUS, count_other_gpus, why_no_other_gpu
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import Alone
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.loop import train
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.setup import Setup, choose_execution, set_up
from cifar_fast.training.step import forward_backward

CPU = torch.device("cpu")
SMOKE = replace(recipes.smoke(), n_shards=1, widths=(8, 8, 8), global_batch_size=40)
RESNET9 = replace(recipes.page_2019(), widths=(4, 4, 8, 8), ghost_batch_size=20, global_batch_size=40)


def small_model(recipe: Recipe, data: Dataset) -> Network:
    model = build_model(recipe, 10, *pixel_statistics(data.train_images))
    whiten_first_layer(model, recipe, data.train_images)
    return model


def gradients(
    recipe: Recipe, data: Dataset, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], float, float]:
    """The gradients of one batch, its mean loss and its hits."""
    model = small_model(recipe, data)
    images, labels = next(TrainBatches(data.train_images, data.train_labels, recipe, device=CPU).epoch(0))
    if dtype == torch.float64:
        model, images = model.double(), images.double()
    loss, hits = forward_backward(model, images, labels, recipe, dtype)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.item(), hits.item()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=rtol * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("recipe", [SMOKE, RESNET9], ids=["convnet6", "resnet9"])
@pytest.mark.parametrize("micro_batch_size", [10, 20])
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    recipe: Recipe, micro_batch_size: int, data: Dataset
) -> None:
    recipe = replace(recipe, ghost_batch_size=10)
    # In float32 each processor adds up these small gradients with rounding of its own.
    whole, loss, hits = gradients(recipe, data, torch.float64)
    parts, *rest = gradients(replace(recipe, micro_batch_size=micro_batch_size), data, torch.float64)
    assert rest == [pytest.approx(loss, rel=1e-12), hits]
    assert_same_gradients(parts, whole, rtol=1e-9)


@pytest.mark.parametrize("recipe", [SMOKE, RESNET9], ids=["convnet6", "resnet9"])
def test_the_gradients_are_those_of_the_mean_smoothed_loss(recipe: Recipe, data: Dataset) -> None:
    model = small_model(recipe, data)
    images, labels = next(TrainBatches(data.train_images, data.train_labels, recipe, device=CPU).epoch(0))
    target = (1 - recipe.label_smoothing) * F.one_hot(labels, 10) + recipe.label_smoothing / 10
    loss = -(target * model(images).log_softmax(1)).sum(1).mean()
    loss.backward()
    found, found_loss, _ = gradients(recipe, data)
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(
        found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, rtol=1e-4
    )


def test_micro_batches_move_the_running_statistics_as_the_whole_batch_does(data: Dataset) -> None:
    recipe = replace(SMOKE, ghost_batch_size=10)
    images, labels = next(TrainBatches(data.train_images, data.train_labels, recipe, device=CPU).epoch(0))
    whole, parts = small_model(recipe, data), small_model(recipe, data)
    for _ in range(2):
        forward_backward(whole, images, labels, recipe, torch.float32)
        forward_backward(parts, images, labels, replace(recipe, micro_batch_size=10), torch.float32)
    norms = {name for name, module in whole.named_modules() if isinstance(module, GhostBatchNorm)}
    assert norms
    for name in (f"{norm}.running_{kind}" for norm in norms for kind in ("mean", "var")):
        torch.testing.assert_close(parts.get_buffer(name), whole.get_buffer(name), rtol=1e-3, atol=1e-4, msg=name)


def test_the_factor_on_the_loss_in_float16_is_undone(data: Dataset) -> None:
    whole, loss, _ = gradients(RESNET9, data)
    half, half_loss, _ = gradients(RESNET9, data, torch.float16)
    assert half_loss == pytest.approx(loss, rel=1e-2)
    for name in ("layers.linear.weight", "layers.residual3.block2.norm.bias"):
        torch.testing.assert_close(half[name], whole[name], rtol=0, atol=0.05 * whole[name].abs().max().item())


# --- Gradients in one buffer ---

# float64, and the whitening bias is learned in the first epoch, then frozen.
MUON = replace(SMOKE, whitening_bias_epochs=1.0, precision="float64")
SGD = replace(RESNET9, precision="float64")


def prepared(recipe: Recipe, data: Dataset, ranks: Alone) -> Setup:
    return set_up(recipe, data, choose_execution(recipe, CPU), device=CPU, ranks=ranks)


@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_gradients_in_one_buffer_equal_separate_ones(recipe: Recipe, data: Dataset) -> None:
    ours, other = prepared(recipe, data, Alone(backend="nccl")), prepared(recipe, data, Alone())
    buffer = ours.gradients
    assert buffer is not None and other.gradients is None
    images, labels = next(ours.batches.epoch(0))
    for _ in range(2):  # they add up, in place
        forward_backward(ours.model, images, labels, recipe, torch.float64)
        forward_backward(other.model, images, labels, recipe, torch.float64)
    assert buffer.any()
    for (name, p), q in zip(ours.model.named_parameters(), other.model.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None and p.grad.stride() == p.stride()
            assert p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    ours.update().clear_gradients()
    assert not buffer.any() and all(p.grad is not None for p in ours.model.parameters() if p.requires_grad)


def test_a_frozen_whitening_bias_stays_although_the_buffer_keeps_a_zero_gradient_for_it(data: Dataset) -> None:
    setup = prepared(MUON, data, Alone(backend="nccl"))
    step, bias = setup.step(), setup.model.get_parameter("layers.whiten.bias")
    start = bias.detach().clone()
    for images, labels in setup.batches.epoch(0):
        step(images, labels)
    learned = bias.detach().clone()
    assert not torch.equal(learned, start)
    step(*next(setup.batches.epoch(1)))
    assert bias.grad is not None and torch.equal(bias, learned)


# --- Devices without float64 ---


class NoFloat64(TorchDispatchMode):
    """Fails where anything on the device `meta`, which stands for one without float64, is float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.device.type == "meta":
                self.seen += 1
                assert value.dtype != torch.float64, function
        return found

    seen = 0


def test_no_float64_is_asked_of_a_device_that_lacks_it(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cifar_fast.training.setup")
    monkeypatch.setattr(module, "has_float64", lambda device: device.type != "meta")
    recipe, meta = SMOKE, torch.device("meta")
    execution = choose_execution(recipe, torch.device("cpu"))
    with NoFloat64() as watched:
        setup = set_up(recipe, data, execution, device=meta)
        setup.batches.make(16, *setup.batches.example_choices())
    assert watched.seen and all(value.is_meta for value in setup.model.state_dict().values())


def test_statistics_and_evaluation_are_the_same_without_float64(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, cpu = SMOKE, torch.device("cpu")
    execution = choose_execution(recipe, cpu)
    found = []
    for float64 in (True, False):
        for name in ("setup", "evaluate", "alone"):
            module = importlib.import_module(f"cifar_fast.training.{name}")
            monkeypatch.setattr(module, "has_float64", lambda device, float64=float64: float64)
        model = set_up(recipe, data, execution, device=cpu).model
        evaluation = evaluate(model, data.test_images, data.test_labels)
        found.append((model.state_dict(), evaluation, Alone().sum(torch.ones(3))))
    (weights, first, total), (others, second, other_total) = found
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert first.loss == second.loss and torch.equal(first.confusion, second.confusion)
    assert torch.equal(total, other_total) and other_total.dtype == torch.float64


@pytest.mark.parametrize("kind", sorted(OTHER_GPUS))
def test_other_gpus_train(kind: str, data: Dataset) -> None:
    if not count_other_gpus(kind):
        pytest.skip(f"needs an {OTHER_GPUS[kind]}: {why_no_other_gpu(kind)}")
    result = train(SMOKE, data, device=kind, progress=False)
    assert result.environment["device"] == kind and result.environment["step_mode"] == "eager"
    assert 0 <= result.accuracy <= 1
