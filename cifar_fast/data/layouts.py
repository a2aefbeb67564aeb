"""The folder layouts that a data set comes in, two official ones and folders of pictures, and how to read each.

Sources: CIFAR-10 is by Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html; that page describes the two official layouts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_fast.data.dataset import CIFAR10_CLASSES, IMAGE_SIZE, Dataset, build_dataset
from cifar_fast.errors import DataError
from cifar_fast.files import file_size

TORCHVISION_FOLDER = "cifar-10-batches-py"
_BINARY_FOLDER = "cifar-10-batches-bin"
_BINARY_RECORDS = 10_000  # per file
_BINARY_RECORD_BYTES = 1 + 3 * IMAGE_SIZE * IMAGE_SIZE  # the label, then the red, green and blue planes
_BINARY_SHA256 = {  # the test file is last
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


# --- recognising a layout ---


@dataclass(frozen=True)
class Layout:
    """A folder, and how it stores its images."""

    kind: str
    """"torchvision", "binary" or "image folder"."""
    folder: Path
    """The folder that holds the files."""


def find_layout(root: Path) -> Layout | None:
    """Recognise the layout of `root`, either the folder that holds the files or the one around it."""
    root = root.absolute()
    try:
        for folder_name, kind in ((TORCHVISION_FOLDER, "torchvision"), (_BINARY_FOLDER, "binary")):
            for folder in (root / folder_name, root):
                if folder.name == folder_name and folder.is_dir():
                    return Layout(kind, folder)
        if (root / "train").is_dir() or (root / "test").is_dir():
            return Layout("image folder", root)
    except OSError as error:
        raise _unreadable(error) from error
    return None


def nothing_in(folder: Path) -> str:
    """Say that a folder does not exist, or that it holds no data set."""
    if not folder.exists():
        return f"There is no folder {folder}."
    return (
        f"{folder} holds no data set: neither {TORCHVISION_FOLDER}, nor {_BINARY_FOLDER}, nor train/<class>/ and "
        "test/<class>/."
    )


def file_states(layout: Layout) -> list[tuple[str, int, int]]:
    """Return path in the folder, bytes and time of change (ns) of each file: they change when the data set does."""
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


def decode(layout: Layout) -> Dataset:
    """Read and check all files of a layout; raise `DataError` if one is missing, damaged or not what it should be."""
    try:
        if layout.kind == "torchvision":
            return _decode_torchvision(layout.folder)
        if layout.kind == "binary":
            return _decode_binary(layout.folder)
        return _decode_image_folder(layout.folder)
    except OSError as error:
        raise _unreadable(error) from error


def _decode_torchvision(folder: Path) -> Dataset:
    """Read cifar-10-batches-py with torchvision, which checks the MD5 of every file before it unpickles it."""
    from torchvision.datasets import CIFAR10  # here, because the import takes seconds and is needed only once
    from torchvision.datasets.utils import check_integrity

    try:
        sets = [CIFAR10(folder.parent, train=train) for train in (True, False)]
    except RuntimeError as error:
        checksums = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        damaged = [name for name, md5 in checksums if not check_integrity(folder / name, md5)]
        raise DataError(
            f"{folder} is damaged; missing or altered: {', '.join(damaged)}. Delete that folder and download it again."
        ) from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in sets
    )
    return build_dataset("CIFAR-10", sets[0].classes, train, test, "official Python batches, read by torchvision")


def _decode_binary(folder: Path) -> Dataset:
    *train, test = (_decode_binary_file(folder / name, sha256) for name, sha256 in _BINARY_SHA256.items())
    images, labels = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return build_dataset("CIFAR-10", CIFAR10_CLASSES, (images, labels), test, "official binary batches")


def _decode_binary_file(path: Path, sha256: str) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (10000, 3, 32, 32), and the labels, int64 (10000,), of one file."""
    advice = f"Delete {path.parent} and unpack the official archive again."
    if not path.exists():
        raise DataError(f"{path} is missing. {advice}")
    expected = _BINARY_RECORDS * _BINARY_RECORD_BYTES
    if file_size(path) != expected:
        raise DataError(
            f"{path} has {file_size(path):,} bytes instead of {expected:,}: it is cut short or altered. {advice}"
        )
    records = np.fromfile(path, np.uint8).reshape(_BINARY_RECORDS, _BINARY_RECORD_BYTES)
    if records[:, 0].max() >= len(CIFAR10_CLASSES):
        record = int(records[:, 0].argmax())
        raise DataError(
            f"{path} has the label {records[record, 0]} in record {record}; CIFAR-10 has labels 0 to 9. {advice}"
        )
    if hashlib.sha256(records.data).hexdigest() != sha256:
        raise DataError(f"{path} is not the official file: its SHA-256 is not {sha256}. {advice}")
    images = torch.from_numpy(records[:, 1:].copy()).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def _decode_image_folder(folder: Path) -> Dataset:
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
    train, test = (_decode_pictures(folder / part, classes) for part in ("train", "test"))
    return build_dataset(folder.name, classes, train, test, f"image folder {folder.name}")


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: an image folder needs train/<class>/ and test/<class>/.")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _decode_pictures(folder: Path, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 3, 32, 32), and the labels, int64 (N,), of all classes."""
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not files:
            raise DataError(
                f"{folder / name} holds no picture (png, jpg). Add some, or remove the folder from train and test."
            )
        images += [_decode_picture(path) for path in files]
        labels += [label] * len(files)
    stacked = torch.from_numpy(np.stack(images))  # (N, 32, 32, 3)
    return stacked.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _decode_picture(path: Path) -> np.ndarray:
    """Return one picture as uint8 (32, 32, 3)."""
    from PIL import Image  # here, because only image folders need it

    try:
        with Image.open(path) as picture:
            if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
                width, height = picture.size
                raise DataError(
                    f"{path} is {width}x{height} pixels; every picture must be {IMAGE_SIZE}x{IMAGE_SIZE}. Resize it."
                )
            return np.asarray(picture.convert("RGB"))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}). Replace or remove it.") from error
