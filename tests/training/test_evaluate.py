"""Evaluation is compared with a loop over images, and leaves the network as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.training.evaluate import calibration, evaluate, margins, predict_logits, predict_probabilities, views
from cifar_fast.training.model import Network, build_model

TTA = ["none", "flip", "flip_shift"]


@pytest.fixture(scope="module")
def model() -> Network:
    recipe = replace(recipes.smoke(), widths=(8, 8, 8), n_shards=1, global_batch_size=16)
    model = build_model(recipe, 5, torch.tensor([100.0, 120.0, 140.0]), torch.tensor([50.0, 60.0, 70.0]))
    model(
        torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    )  # running statistics unlike the start's
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (23, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tta", TTA)
def test_accuracy_loss_and_confusion_are_those_of_a_loop_over_images(
    model: Network, images: Tensor, labels: Tensor, tta: str
) -> None:
    found = evaluate(model, images, labels, tta=tta)
    confusion, right, losses = torch.zeros(5, 5, dtype=torch.int64), 0, []
    for image, label in zip(images, labels, strict=True):
        logits = predict_logits(model, image[None], tta=tta)[0]
        taken_for = int(logits.argmax())
        confusion[label, taken_for] += 1
        right += taken_for == int(label)
        losses.append(-logits.log_softmax(0)[label])
    assert torch.equal(found.confusion, confusion) and found.confusion.dtype == torch.int64
    assert found.accuracy == right / 23 == found.confusion.trace().item() / found.confusion.sum().item()
    assert found.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_confusion_has_the_label_as_row_and_the_prediction_as_column(model: Network, images: Tensor) -> None:
    labels = torch.full((23,), 3)
    confusion = evaluate(model, images, labels).confusion
    assert confusion[3].sum() == 23 and confusion.sum() == 23


@pytest.mark.parametrize("tta", TTA)
def test_the_weights_of_the_views_sum_to_one(tta: str) -> None:
    seen = list(views(torch.randn(2, 3, 8, 8), tta))
    assert sum(weight for weight, _ in seen) == 1
    assert all(view.shape == (2, 3, 8, 8) for _, view in seen)
    assert len(seen) == {"none": 1, "flip": 2, "flip_shift": 6}[tta]


def test_the_views_are_the_image_its_mirror_and_both_shifted() -> None:
    images = torch.randn(2, 3, 8, 8)
    seen = [view for _, view in views(images, "flip_shift")]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    first, last = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
    for view, expected in zip(seen, [images, images.flip(-1), first, first.flip(-1), last, last.flip(-1)], strict=True):
        assert torch.equal(view, expected)


@pytest.mark.parametrize("tta", TTA)
def test_logits_are_the_weighted_mean_over_the_views(model: Network, images: Tensor, tta: str) -> None:
    with torch.no_grad():
        expected = sum(weight * model(view) for weight, view in views(model.normalise(images), tta))
    torch.testing.assert_close(predict_logits(model, images, tta=tta), expected, rtol=1e-4, atol=1e-5)


def test_with_a_margin_only_unsure_images_are_seen_again(model: Network, images: Tensor) -> None:
    once, often = predict_logits(model, images), predict_logits(model, images, tta="flip_shift")
    first, second = once.softmax(1).sort(descending=True).values[:, :2].unbind(1)
    margin = (first - second).median().item()  # of the images: half are unsure
    found = predict_logits(model, images, tta="flip_shift", tta_margin=margin)
    unsure = first - second <= margin
    assert 5 < unsure.sum() < 18
    assert torch.equal(found[~unsure], once[~unsure])
    torch.testing.assert_close(found[unsure], often[unsure], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(once[unsure], often[unsure], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tta", TTA)
def test_a_margin_that_holds_all_images_gives_what_none_gives(model: Network, images: Tensor, tta: str) -> None:
    full = predict_logits(model, images, tta=tta)
    assert torch.equal(predict_logits(model, images, tta=tta, tta_margin=1.0), full)
    nearly = predict_logits(model, images, tta=tta, tta_margin=0.999999)  # the other way, with all images in it
    torch.testing.assert_close(nearly, full, rtol=1e-4, atol=1e-5)


def test_a_margin_of_zero_gives_single_views(model: Network, images: Tensor) -> None:
    once = predict_logits(model, images)
    assert torch.equal(predict_logits(model, images, tta="flip", tta_margin=0.0), once)


@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_a_margin_decides_on_each_image_by_itself(model: Network, images: Tensor, batch_size: int) -> None:
    margin = margins(predict_logits(model, images)).sort().values[11:13].mean().item()  # between two images
    whole, parts = (
        predict_logits(model, images, tta="flip", tta_margin=margin, batch_size=size) for size in (23, batch_size)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_with_flip_an_image_and_its_mirror_have_the_same_logits(model: Network, images: Tensor) -> None:
    there, back = (predict_logits(model, some, tta="flip") for some in (images, images.flip(-1)))
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-5)
    without = [predict_logits(model, some) for some in (images, images.flip(-1))]
    assert not torch.allclose(*without, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 500])
def test_the_batch_size_does_not_matter(model: Network, images: Tensor, labels: Tensor, batch_size: int) -> None:
    whole, parts = (evaluate(model, images, labels, batch_size=size) for size in (23, batch_size))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert torch.equal(parts.confusion, whole.confusion)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(model: Network, images: Tensor, labels: Tensor, training: bool) -> None:
    model = copy.deepcopy(model).train(training)
    before = copy.deepcopy(model.state_dict())
    in_training = evaluate(model, images, labels, tta="flip_shift")
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert in_training.loss == evaluate(model.eval(), images, labels, tta="flip_shift").loss


def test_it_is_left_as_it_was_when_evaluation_fails(model: Network, images: Tensor) -> None:
    model = copy.deepcopy(model).train()
    with pytest.raises(RuntimeError):
        predict_logits(model, images[:, :2])
    assert model.training


def test_half_precision_gives_nearly_the_same_logits_in_float32(model: Network, images: Tensor) -> None:
    half, full = predict_logits(model, images, dtype=torch.bfloat16), predict_logits(model, images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05 * full.abs().max().item())
    assert not torch.equal(half, full)


@pytest.mark.parametrize("tta", TTA)
def test_probabilities_are_the_softmax_of_the_mean_logits(model: Network, images: Tensor, tta: str) -> None:
    probabilities = predict_probabilities(model, images, tta=tta)
    assert probabilities.shape == (23, 5) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(23))
    torch.testing.assert_close(probabilities, predict_logits(model, images, tta=tta).softmax(1))


@pytest.mark.gpu
@pytest.mark.parametrize("tta", TTA)
def test_a_gpu_finds_what_a_cpu_finds(model: Network, images: Tensor, tta: str) -> None:
    on_gpu = predict_logits(copy.deepcopy(model).cuda(), images, tta=tta)
    assert on_gpu.is_cuda
    # cuDNN may convolve in TF32: three decimal digits.
    torch.testing.assert_close(on_gpu.cpu(), predict_logits(model, images, tta=tta), rtol=1e-2, atol=1e-2)


def test_a_network_that_is_right_as_often_as_it_says_is_calibrated():
    probabilities = torch.tensor([[0.75, 0.25]] * 4 + [[0.0, 1.0]] * 2)
    found = calibration(probabilities, torch.tensor([0, 0, 0, 1, 1, 1]), n_bins=5)
    assert found.count.tolist() == [0, 0, 0, 4, 2]
    assert found.confidence[3:].tolist() == found.accuracy[3:].tolist() == [0.75, 1.0]
    assert found.confidence[:3].isnan().all() and found.error == 0


def test_the_calibration_error_weighs_each_bin_by_its_images():
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.4, 0.6]])
    found = calibration(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found.error == pytest.approx((3 * (0.9 - 1 / 3) + 1 * (1 - 0.6)) / 4)
