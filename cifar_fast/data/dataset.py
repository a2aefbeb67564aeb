"""A data set in memory, and the decoded file that it can be written to and mapped from."""

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
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)
IMAGE_SIZE = 32  # pixels, height and width, of both CIFAR sets; the default for image folders
MAX_IMAGE_SIZE = 256  # pixels; larger pictures belong to other networks
SYNTHETIC = "synthetic"  # marks every table, log and file of a run without real data
_CHUNK = 1000  # images compared at once, so that the working set stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of square RGB images. H is 32, unless an image folder was read at another size."""

    name: str
    """"CIFAR-10", "CIFAR-100", "synthetic", or the name of an image folder."""
    classes: tuple[str, ...]
    """The class names; a label is an index into them."""
    train_images: Tensor = field(repr=False)
    """uint8, (n_train, 3, H, H)."""
    train_labels: Tensor = field(repr=False)
    """int64, (n_train,)."""
    test_images: Tensor = field(repr=False)
    """uint8, (n_test, 3, H, H)."""
    test_labels: Tensor = field(repr=False)
    """int64, (n_test,)."""
    source: str
    """Where the images came from, in words, without any path on this machine."""
    fingerprint: str
    """16 hexadecimal digits, different if any pixel or label differs."""
    decoded: Path | None = field(default=None, init=False, repr=False)
    """The file that the images are mapped from, which other processes can map too; None if they are in memory only."""

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Width and height of the images in pixels."""
        return self.train_images.shape[-1]

    def describe(self) -> dict[str, Any]:
        """Return what a run records about its data set, as plain values."""
        # Results that were saved before there were other sizes do not name it.
        size = {} if self.image_size == IMAGE_SIZE else {"image_size": self.image_size}
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "n_train": len(self.train_labels),
            "n_test": len(self.test_labels),
            "classes": list(self.classes),
            **size,
        }


def build_dataset(
    name: str,
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    source: str,
) -> Dataset:
    """Build a data set and its fingerprint from `train` and `test`, each a pair of images and labels."""
    digest = hashlib.sha256()
    for tensor in (*train, *test):
        digest.update(tensor.numpy().data)
    return Dataset(name, tuple(classes), *train, *test, source=source, fingerprint=digest.hexdigest()[:16])


def require_variation(data: Dataset) -> None:
    """Raise a `DataError` if all training images are the same picture, for instance one plain colour.

    Such a set teaches nothing, and it has no variance: whitening and batch norm would amplify rounding errors.
    """
    images = data.train_images.numpy()  # (n_train, 3, H, H)
    first = images[0]
    # In chunks, so that ordinary data passes at the first one.
    if not all((images[start : start + _CHUNK] == first).all() for start in range(0, len(images), _CHUNK)):
        return
    what = "are all the same picture"
    if (first == first[:, :1, :1]).all():
        red, green, blue = first[:, 0, 0]
        what = f"all have the same single colour (red {red}, green {green}, blue {blue})"
    raise DataError(
        f"No network can learn from the data set {data.name} ({data.source}): its {len(images):,} training images "
        f"{what}. Check how these images were made or converted, or train on another data set."
    )


# --- the decoded file ---


def write_decoded(data: Dataset, path: Path) -> None:
    """Write the decoded file completely or not at all, and remove the copies of earlier states of the same data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    text = {name: json.dumps(getattr(data, name)) for name in ("name", "classes", "source", "fingerprint")}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=text)
    for other in path.parent.glob(f"{path.name.split('-')[0]}-*.safetensors"):
        if other != path:
            with suppress(OSError):  # Windows does not delete a file that another process has mapped
                other.unlink()


def read_decoded(path: Path) -> Dataset:
    """Map a decoded file into memory: the system reads each page when it is first used."""
    with safe_open(path, framework="pt") as file:
        text = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    data = Dataset(**{**text, "classes": tuple(text["classes"])}, **tensors)
    object.__setattr__(data, "decoded", path)  # not an argument, so that `replace` with other images drops it
    return data
