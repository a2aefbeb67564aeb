"""The folder layouts that a data set comes in, two official ones and folders of pictures, and how to read each.

Sources: CIFAR-10 and CIFAR-100 are by Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html; that page describes the two official layouts.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_fast.data.dataset import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    IMAGE_SIZE,
    MAX_IMAGE_SIZE,
    Dataset,
    build_dataset,
)
from cifar_fast.data.pictures import SUFFIXES, Conversions, is_picture, read_picture
from cifar_fast.errors import DataError
from cifar_fast.files import file_size

_PIXEL_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE  # the red, green and blue planes, row by row
_N_COARSE = 20  # CIFAR-100's superclasses
_ORDER_SEED = 0  # of the order of an image folder


@dataclass(frozen=True)
class BinaryFile:
    """A file of an official binary layout: records of labels and pixels."""

    n_records: int
    """How many images it holds."""
    sha256: str | None
    """The hash of the whole file; None if it is not known."""


@dataclass(frozen=True)
class Official:
    """An official data set and what its two layouts are called."""

    name: str
    """"CIFAR-10" or "CIFAR-100"."""
    classes: tuple[str, ...]
    """The class names; a label is an index into them."""
    python_folder: str
    """Folder of pickled batches, which torchvision reads."""
    binary_folder: str
    """Folder of binary files."""
    binary_files: Mapping[str, BinaryFile]
    """By name; the test file is last."""
    n_labels: int
    """Label bytes before the pixels of a record; the last one is the class."""

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each kind of layout."""
        return {"torchvision": self.python_folder, "binary": self.binary_folder}


CIFAR10 = Official(
    name="CIFAR-10",
    classes=CIFAR10_CLASSES,
    python_folder="cifar-10-batches-py",
    binary_folder="cifar-10-batches-bin",
    binary_files={
        "data_batch_1.bin": BinaryFile(10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        "data_batch_2.bin": BinaryFile(10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        "data_batch_3.bin": BinaryFile(10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        "data_batch_4.bin": BinaryFile(10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        "data_batch_5.bin": BinaryFile(10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        "test_batch.bin": BinaryFile(10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    },
    n_labels=1,
)
CIFAR100 = Official(
    name="CIFAR-100",
    classes=CIFAR100_CLASSES,
    python_folder="cifar-100-python",
    binary_folder="cifar-100-binary",
    # Only the archive's MD5 is published (03b5dce01913d631647c71ecec9e9cb8), so the labels have to prove the files.
    binary_files={"train.bin": BinaryFile(50_000, None), "test.bin": BinaryFile(10_000, None)},
    n_labels=2,
)


def official(name: str) -> Official:
    """Return the official data set of that name, "CIFAR-10" or "CIFAR-100"."""
    return {"CIFAR-10": CIFAR10, "CIFAR-100": CIFAR100}[name]


# --- recognising a layout ---


@dataclass(frozen=True)
class Layout:
    """A folder, and how it stores its images."""

    kind: str
    """"torchvision", "binary" or "image folder"."""
    folder: Path
    """The folder that holds the files."""
    data_set: str | None = "CIFAR-10"
    """Which official data set it is; None for an image folder."""


def find_layout(root: Path, *data_sets: str, pictures: bool = True) -> Layout | None:
    """Recognise the layout of `root`, either the folder that holds the files or the one around it.

    Args:
        root: a folder that may hold several data sets.
        data_sets: names of the official data sets to look for, the preferred one first; default: both, CIFAR-10 first.
        pictures: whether to recognise an image folder, too. An official data set beside it comes first.

    Raises:
        DataError: the folder cannot be read.
    """
    root = root.absolute()
    try:
        for name in data_sets or ("CIFAR-10", "CIFAR-100"):
            for kind, folder_name in official(name).folders.items():
                for folder in (root / folder_name, root):
                    if folder.name == folder_name and folder.is_dir():
                        return Layout(kind, folder, name)
        if pictures and ((root / "train").is_dir() or (root / "test").is_dir()):
            return Layout("image folder", root, None)
    except OSError as error:
        raise _unreadable(error) from error
    return None


def nothing_in(folder: Path, *data_sets: str) -> str:
    """Say that a folder does not exist, or that it holds none of these data sets (default: CIFAR-10)."""
    if not folder.exists():
        return f"There is no folder {folder}."
    names = [name for data_set in data_sets or ("CIFAR-10",) for name in official(data_set).folders.values()]
    return f"{folder} holds no data set: neither {', nor '.join(names)}, nor train/<class>/ and test/<class>/."


def file_states(layout: Layout) -> list[tuple[str, int, int]]:
    """Return each file's path in the folder, bytes and time of change (ns): they change when the data set does."""
    try:
        folders = [layout.folder]
        if layout.kind == "image folder":
            folders = [path for part in ("train", "test") for path in layout.folder.glob(f"{part}/*") if path.is_dir()]
        entries = [entry for folder in folders for entry in os.scandir(folder)]  # an entry asks the system only once
        n = len(str(layout.folder))
        return sorted((entry.path[n:], entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError(
        f"Cannot read {error.filename or 'the data'}: {error.strerror or error}. Check the folder and its permissions."
    )


# --- decoding it ---


def decode(layout: Layout, image_size: int = IMAGE_SIZE) -> Dataset:
    """Read and check all files of a layout; raise `DataError` if one is missing, damaged or not what it should be.

    `image_size`: side in pixels to which the pictures of an image folder are resized; official images have 32 pixels.
    """
    if not IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(
            f"image_size={image_size} must be from {IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels; smaller pictures are "
            "enlarged."
        )
    try:
        if layout.data_set is None:
            return _decode_image_folder(layout.folder, image_size)
        if image_size != IMAGE_SIZE:
            raise DataError(
                f"The images of {layout.data_set} have {IMAGE_SIZE} pixels; image_size={image_size} is for folders of "
                "your own pictures. Leave it out."
            )
        if layout.kind == "torchvision":
            return _decode_torchvision(layout.folder, official(layout.data_set))
        return _decode_binary(layout.folder, official(layout.data_set))
    except OSError as error:
        raise _unreadable(error) from error


def _decode_torchvision(folder: Path, data_set: Official) -> Dataset:
    """Read pickled batches with torchvision, which checks the MD5 of every file before it unpickles it."""
    from torchvision import datasets  # here, because the import takes seconds and is needed only once
    from torchvision.datasets.utils import check_integrity

    reader = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[data_set.name]
    try:
        sets = [reader(folder.parent, train=train) for train in (True, False)]
    except RuntimeError as error:
        checksums = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
        damaged = [name for name, md5 in checksums if not check_integrity(folder / name, md5)]
        raise DataError(
            f"{folder} is damaged; missing or altered: {', '.join(damaged)}. Delete that folder and download it again."
        ) from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in sets
    )
    return build_dataset(data_set.name, sets[0].classes, train, test, "official Python batches, read by torchvision")


def _decode_binary(folder: Path, data_set: Official) -> Dataset:
    *train, test = (_decode_binary_file(folder / name, file, data_set) for name, file in data_set.binary_files.items())
    images, labels = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return build_dataset(data_set.name, data_set.classes, (images, labels), test, "official binary batches")


def _decode_binary_file(path: Path, file: BinaryFile, data_set: Official) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 3, 32, 32), and the labels, int64 (N,), of one file."""
    advice = f"Delete {path.parent} and unpack the official archive again."
    if not path.exists():
        raise DataError(f"{path} is missing. {advice}")
    n_labels = data_set.n_labels
    expected = file.n_records * (n_labels + _PIXEL_BYTES)
    if file_size(path) != expected:
        raise DataError(
            f"{path} has {file_size(path):,} bytes instead of {expected:,}: it is cut short or altered. {advice}"
        )
    records = np.fromfile(path, np.uint8).reshape(file.n_records, n_labels + _PIXEL_BYTES)
    labels, n_classes = records[:, n_labels - 1], len(data_set.classes)
    if labels.max() >= n_classes:
        record = int(labels.argmax())
        raise DataError(
            f"{path} has the label {labels[record]} in record {record}; {data_set.name} has labels 0 to "
            f"{n_classes - 1}. {advice}"
        )
    if file.sha256 is not None and hashlib.sha256(records.data).hexdigest() != file.sha256:
        raise DataError(f"{path} is not the official file: its SHA-256 is not {file.sha256}. {advice}")
    if n_labels == 2 and not _superclasses_fit(records[:, 0], labels, n_classes):
        raise DataError(
            f"{path} is not the official file: its classes are not equally frequent, or their superclasses do not fit. "
            f"{advice}"
        )
    images = torch.from_numpy(records[:, n_labels:].copy()).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return images, torch.from_numpy(labels.astype(np.int64))


def _superclasses_fit(coarse: np.ndarray, fine: np.ndarray, n_classes: int) -> bool:
    """Say whether all classes are equally frequent, and each belongs to one of 20 superclasses, five to each."""
    counts = np.bincount(fine, minlength=n_classes)
    pairs = np.unique(np.stack([coarse, fine]), axis=1)  # (2, one for each class)
    sizes = np.bincount(pairs[0], minlength=_N_COARSE)
    return bool((counts == counts[0]).all() and pairs.shape[1] == n_classes and (sizes == n_classes // _N_COARSE).all())


def _decode_image_folder(folder: Path, image_size: int) -> Dataset:
    """Read train/<class>/* and test/<class>/*; the classes are the names of the folders, in alphabetical order."""
    classes = _class_names(folder / "train")
    test_classes = _class_names(folder / "test")
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{folder}/train and {folder}/test must have the same classes; only one of them has: {', '.join(odd)}."
        )
    if len(classes) < 2:
        raise DataError(
            f"{folder}/train has {len(classes)} class folders ({', '.join(classes) or 'none'}); training needs "
            f"at least two: put the pictures of each class into {folder}/train/<class>/ and {folder}/test/<class>/."
        )
    conversions = Conversions()
    train, test = (_decode_pictures(folder / part, classes, image_size, conversions) for part in ("train", "test"))
    if changed := conversions.in_words(image_size):
        print(f"cifar_fast: {folder.name}: {changed}", file=sys.stderr, flush=True)
    return build_dataset(folder.name, classes, train, test, f"image folder {folder.name}")


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: an image folder needs train/<class>/ and test/<class>/.")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _decode_pictures(
    folder: Path, classes: list[str], image_size: int, conversions: Conversions
) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 3, H, H), and the labels, int64 (N,), of all classes, in a fixed shuffled order.

    In class order, the first images would all be of one class: whitening and every subset would see only that one.
    """
    labelled = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if is_picture(path))
        if not files:
            raise DataError(
                f"{folder / name} holds no picture ({', '.join(suffix[1:] for suffix in SUFFIXES)}). Add some, or "
                "remove the folder from train and test."
            )
        labelled += [(path, label) for path in files]
    images = torch.empty(len(labelled), 3, image_size, image_size, dtype=torch.uint8)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(_ORDER_SEED)).tolist()
    for position, index in enumerate(order):
        images[position] = read_picture(labelled[index][0], image_size, conversions)
    return images, torch.tensor([labelled[index][1] for index in order])
