"""A data set in memory, and the decoded file it is mapped from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cifar_fast.errors import DataError
from cifar_fast.files import written_whole

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32  # pixels, height and width
SYNTHETIC = "synthetic"  # the name that marks every table, log and file of a run without real data


class DataNotFoundError(DataError):
    """No data set is here and none could be downloaded: the one failure that the synthetic set may replace."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of 32x32 RGB images."""

    name: str
    """"CIFAR-10", "synthetic", or the directory name of an image folder."""
    classes: tuple[str, ...]
    """The class names; a label is an index into them."""
    train_images: Tensor = field(repr=False)
    """uint8, (n_train, 3, 32, 32)."""
    train_labels: Tensor = field(repr=False)
    """int64, (n_train,)."""
    test_images: Tensor = field(repr=False)
    """uint8, (n_test, 3, 32, 32)."""
    test_labels: Tensor = field(repr=False)
    """int64, (n_test,)."""
    source: str
    """Where the images came from, in words, without a path of this machine."""
    fingerprint: str
    """16 hexadecimal digits that change with any pixel or label."""
    decoded: Path | None = field(default=None, init=False, repr=False)
    """The file that the images are mapped from, which other processes can map too; None: they are in memory alone."""

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def is_synthetic(self) -> bool:
        """Whether this is the embedded set instead of real pictures."""
        return self.name == SYNTHETIC

    def describe(self) -> dict[str, Any]:
        """Return what a result says of its data set, as plain values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "n_train": len(self.train_labels),
            "n_test": len(self.test_labels),
            "classes": list(self.classes),
        }


def build_dataset(
    name: str,
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    source: str,
) -> Dataset:
    """Put the parts together; train and test are (images, labels)."""
    digest = hashlib.sha256()
    for tensor in (*train, *test):
        digest.update(tensor.numpy().data)
    return Dataset(name, tuple(classes), *train, *test, source=source, fingerprint=digest.hexdigest()[:16])


def write_decoded(data: Dataset, path: Path) -> None:
    """Write the decoded file completely or not at all, and remove copies of earlier states of the same data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    text = {name: json.dumps(getattr(data, name)) for name in ("name", "classes", "source", "fingerprint")}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=text)
    for other in path.parent.glob(f"{path.name.split('-')[0]}-*.safetensors"):
        if other != path:
            with suppress(OSError):  # Windows keeps a file that another process has mapped; the next change removes it
                other.unlink()


def read_decoded(path: Path) -> Dataset:
    """Map a decoded file into memory: pages are read when they are first touched."""
    with safe_open(path, framework="pt") as file:
        text = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    data = Dataset(**{**text, "classes": tuple(text["classes"])}, **tensors)
    object.__setattr__(data, "decoded", path)  # not an argument, so that `replace` does not carry it to other images
    return data


def require_variation(data: Dataset) -> None:
    """TEMP."""
