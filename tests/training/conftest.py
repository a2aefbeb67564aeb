"""Data for short training runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cifar_fast.data.dataset import Dataset


@pytest.fixture(scope="session")
def data(tiny_data: Dataset) -> Dataset:
    """160 training and 40 test images."""
    return replace(
        tiny_data,
        train_images=tiny_data.train_images[:160],
        train_labels=tiny_data.train_labels[:160],
        test_images=tiny_data.test_images[:40],
        test_labels=tiny_data.test_labels[:40],
    )
