"""A data set in memory, and the decoded file that it can be written to and mapped from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
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
class Selection:
    """The training images that `Dataset.subset` has kept of a full training set."""

    indices: Tensor = field(repr=False)
    """int64, (n_train,), ascending: their positions in the full training set."""
    full_size: int
    """Number of training images in the full set."""
    full_fingerprint: str
    """Fingerprint of the full data set."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, different if any index differs."""
        return _digest(self.indices)

    def describe(self) -> dict[str, Any]:
        """Return it as plain values, for results: all but the indices themselves."""
        return {"fingerprint": self.fingerprint, "of": self.full_fingerprint, "n_full": self.full_size}


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
    selection: Selection | None = field(default=None, repr=False)
    """Which images of a full training set these are; None for all of them."""

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Width and height of the images in pixels."""
        return self.train_images.shape[-1]

    def describe(self) -> dict[str, Any]:
        """Return what a run records about its data set, as plain values; for a subset, also which one it is."""
        # Results that were saved before other sizes existed do not name the size.
        size = {} if self.image_size == IMAGE_SIZE else {"image_size": self.image_size}
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "n_train": len(self.train_labels),
            "n_test": len(self.test_labels),
            "classes": list(self.classes),
            **({"subset": self.selection.describe()} if self.selection else {}),
            **size,
        }

    def subset(self, indices: Sequence[int] | Tensor) -> Dataset:
        """Return the data set with some of its training images, in their order here, and the whole test set.

        A run on it keeps the indices in its folder. A subset of a subset counts as one of the full set, and equal
        subsets have equal fingerprints, however they were made.

        Args:
            indices: positions in this training set, in any order, each at most once; or a bool mask (n_train,).

        Raises:
            DataError: there is no index, one is out of range or occurs twice, or they are not whole numbers.
        """
        chosen = _checked_indices(indices, len(self.train_labels))
        full = self.selection
        before = full.indices if full else torch.arange(len(self.train_labels))
        kept = Selection(
            before[chosen],
            full.full_size if full else len(self.train_labels),
            full.full_fingerprint if full else self.fingerprint,
        )
        return replace(
            self,
            train_images=self.train_images[chosen],
            train_labels=self.train_labels[chosen],
            source=f"{self.source}, {len(chosen):,} of {len(self.train_labels):,} training images",
            fingerprint=hashlib.sha256((kept.full_fingerprint + kept.fingerprint).encode()).hexdigest()[:16],
            selection=kept,
        )


def build_dataset(
    name: str,
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    source: str,
) -> Dataset:
    """Build a data set and its fingerprint from `train` and `test`, each a pair of images and labels."""
    return Dataset(name, tuple(classes), *train, *test, source=source, fingerprint=_digest(*train, *test))


def _digest(*tensors: Tensor) -> str:
    """Return 16 hexadecimal digits, different if any number in the tensors differs."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def _checked_indices(indices: Sequence[int] | Tensor, size: int) -> Tensor:
    """Return the indices of a subset, int64 and ascending; `DataError` unless they can be those of `size` images."""
    given = torch.as_tensor(indices)
    if given.dim() != 1 or len(given) == 0:
        raise DataError(f"a subset needs a list of at least one index, not a tensor of shape {tuple(given.shape)}")
    if given.dtype == torch.bool:
        if len(given) != size:
            raise DataError(f"the mask of a subset has {len(given)} entries for {size:,} training images")
        given = given.nonzero().flatten()
        if len(given) == 0:
            raise DataError("the mask of a subset keeps no training image")
    if given.is_floating_point() or given.is_complex():
        raise DataError(f"the indices of a subset must be whole numbers or a bool mask, not {given.dtype}")
    chosen = given.cpu().long().sort().values
    if chosen[0] < 0 or chosen[-1] >= size:
        wrong = int(chosen[0] if chosen[0] < 0 else chosen[-1])
        raise DataError(f"index {wrong} of a subset is out of range: the {size:,} training images are 0 to {size - 1}")
    if (twice := chosen[1:][chosen[1:] == chosen[:-1]]).numel():
        raise DataError(f"index {int(twice[0])} occurs more than once in a subset; give each image at most once")
    return chosen


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
    if data.selection:
        tensors["train_indices"] = data.selection.indices
        text["subset"] = json.dumps([data.selection.full_size, data.selection.full_fingerprint])
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
    full = text.pop("subset", None)
    selection = Selection(tensors.pop("train_indices"), *full) if full else None
    data = Dataset(**{**text, "classes": tuple(text["classes"])}, **tensors, selection=selection)
    object.__setattr__(data, "decoded", path)  # not an argument, so that `replace` with other images drops it
    return data
