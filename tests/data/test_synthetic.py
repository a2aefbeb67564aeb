"""The synthetic set is drawn from its seed alone, and takes a network to learn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.data.dataset import SYNTHETIC
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import DataError


@pytest.fixture
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_synthetic_set_has_the_shape_of_a_data_set() -> None:
    drawn = synthetic(600, 50)
    assert drawn.name == SYNTHETIC and drawn.n_classes == 10
    assert drawn.train_images.shape == (600, 3, 32, 32) and drawn.train_images.dtype == torch.uint8
    assert drawn.test_labels.shape == (50,) and drawn.test_labels.dtype == torch.int64
    assert drawn.train_labels.bincount().tolist() == [60] * 10


def test_synthetic_set_depends_on_its_seed_alone() -> None:
    n_threads = torch.get_num_threads()
    first = synthetic(520, 20, seed=3)
    torch.set_num_threads(2 if n_threads == 1 else 1)
    torch.rand(7)  # moves the global generator, which must not matter
    again, other = synthetic(520, 20, seed=3), synthetic(520, 20, seed=4)
    torch.set_num_threads(n_threads)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_synthetic_test_images_are_other_draws_of_the_same_distribution(one_thread: None) -> None:
    drawn = synthetic(1000, 1000)
    assert not torch.equal(drawn.train_images, drawn.test_images)
    train, test = (images.float().mean(dim=(0, 2, 3)) for images in (drawn.train_images, drawn.test_images))
    assert torch.allclose(train, test, atol=4.0)


def test_colour_says_nothing_about_the_class(one_thread: None) -> None:
    drawn = synthetic(2000, 1)
    means = drawn.train_images.float().mean(dim=(2, 3))  # (N, 3)
    of_class = torch.stack([means[drawn.train_labels == label].mean(0) for label in range(10)])
    assert (of_class - means.mean(0)).abs().max() < 0.35 * means.std(0).min()


@pytest.mark.parametrize("sizes", [(0, 10), (10, 0), (-1, 10)])
def test_synthetic_set_needs_images(sizes: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"n_train={sizes[0]}, n_test={sizes[1]}"):
        synthetic(*sizes)


def test_linear_model_fails_on_the_synthetic_set(one_thread: None) -> None:
    drawn = synthetic(2000, 1000)
    train, test = (images.flatten(1).float() / 255 - 0.5 for images in (drawn.train_images, drawn.test_images))
    targets = F.one_hot(drawn.train_labels).float() - 0.1
    kernel = train @ train.T
    for ridge in (10.0, 1000.0):
        weights = train.T @ torch.linalg.solve(kernel + ridge * torch.eye(len(train)), targets)  # (3072, 10)
        assert accuracy(test @ weights, drawn.test_labels) < 0.25


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def test_small_network_learns_the_synthetic_set(one_thread: None) -> None:
    drawn = synthetic(2500, 1000)
    train, test = (
        (images.float() / 64 - 2).contiguous(memory_format=torch.channels_last)
        for images in (drawn.train_images, drawn.test_images)
    )
    torch.manual_seed(0)

    def block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    network = nn.Sequential(
        *(block(3, 16, 2), block(16, 24), nn.MaxPool2d(2), block(24, 32), nn.MaxPool2d(2), block(32, 64)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ).to(memory_format=torch.channels_last)
    n_epochs, batch_size = 6, 50
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    n_steps = n_epochs * len(train) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=n_steps)
    for _ in range(n_epochs):
        for batch in torch.randperm(len(train)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(train[batch]), drawn.train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        assert accuracy(network(test), drawn.test_labels) > 0.35  # chance is 0.1, a linear model stays below 0.25
