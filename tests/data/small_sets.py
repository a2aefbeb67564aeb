"""Small data sets with known content, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch

from cifar_fast.data.dataset import Dataset

N_RECORDS = 20  # in each of the six files


def batch_pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (N_RECORDS, 3072), np.uint8)


def batch_labels(index: int) -> np.ndarray:
    return np.random.default_rng(100 + index).integers(0, 10, N_RECORDS, np.uint8)


def batch_records(index: int) -> bytes:
    """The content of a binary file: a label and its pixels, record by record."""
    return np.concatenate([batch_labels(index)[:, None], batch_pixels(index)], axis=1).tobytes()


def fine_labels(index: int) -> np.ndarray:
    """CIFAR-100's classes: of the training set each twice, of the test set each once."""
    return np.random.default_rng(200 + index).permutation(np.arange(100).repeat(2 - index)).astype(np.uint8)


def fine_records(index: int) -> bytes:
    """The content of one of CIFAR-100's binary files: superclass, class and pixels, record by record."""
    fine = fine_labels(index)
    pixels = np.random.default_rng(300 + index).integers(0, 256, (len(fine), 3072), np.uint8)
    return np.concatenate([(fine % 20)[:, None], fine[:, None], pixels], axis=1).tobytes()


def same(one: Dataset, other: Dataset) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    tensors_agree = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return tensors_agree and repr(one) == repr(other)  # repr has everything but the tensors
