"""Finds the data set on this machine or downloads it, and keeps a decoded copy so that the next start is quick."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from cifar_fast.data.dataset import IMAGE_SIZE, SYNTHETIC, Dataset, read_decoded, write_decoded
from cifar_fast.data.download import download_cifar10, download_cifar100, megabytes, unfinished_bytes, what_next
from cifar_fast.data.layouts import Layout, decode, file_states, find_layout, nothing_in
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import DataError, DataNotFoundError
from cifar_fast.files import cache_folder

_CACHE_FORMAT = 2  # raised by one whenever the format of the decoded file changes, so that older files are not read


def load_cifar10(
    root: str | Path | None = None,
    download: bool = True,
    mirrors: Sequence[str] = (),
    *,
    image_size: int = IMAGE_SIZE,
) -> Dataset:
    """Load CIFAR-10, or a folder of your own pictures; download CIFAR-10 if there is neither.

    Args:
        root: the folder to read. Default: the folder that CIFAR_FAST_DATA names, else the user's cache folder. It may
            hold torchvision's cifar-10-batches-py, the binary cifar-10-batches-bin, CIFAR-100 in either layout, or
            train/<class>/ and test/<class>/ with pictures of any size and mode.
        download: whether to download CIFAR-10 when no folder is named and the cache folder is empty.
        mirrors: further URLs of cifar-10-python.tar.gz, tried before the built-in ones.
        image_size: side in pixels, from 32 to 256, to which the centre squares of an image folder's pictures are
            resized.

    Returns:
        The data set, memory-mapped from its decoded copy in the cache folder. The images of an image folder are in a
        fixed shuffled order.

    Raises:
        DataError: a named folder does not hold a usable data set, or the cache folder is damaged or cannot be written.
        DataNotFoundError: no folder is named, the cache folder is empty, and nothing was downloaded.
    """
    for origin, folder in _named_roots(root):
        layout = find_layout(folder)
        if layout is None:
            raise DataError(f"{nothing_in(folder)} It was named by {origin}. {what_next('CIFAR-10')}")
        return _load(layout, image_size)
    layout = find_layout(cache_folder(), "CIFAR-10")
    if layout is None and download:
        layout = find_layout(download_cifar10(mirrors), "CIFAR-10")
    if layout is None:
        raise DataNotFoundError(f"{nothing_in(cache_folder())} Downloading is switched off. {what_next('CIFAR-10')}")
    return _load(layout, image_size)


def load_cifar100(root: str | Path | None = None, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """Load CIFAR-100 with its 100 fine classes; download it if it is not there.

    Args:
        root: the folder to read. Default: the folder that CIFAR_FAST_DATA names, if CIFAR-100 is in it, else the
            user's cache folder. It may hold torchvision's cifar-100-python, the binary cifar-100-binary, or
            train/<class>/ and test/<class>/ with pictures.
        download: whether to download CIFAR-100 when no folder is named and the cache folder is empty.
        mirrors: further URLs of cifar-100-python.tar.gz, tried before the built-in ones.

    Returns:
        The data set, memory-mapped from its decoded copy in the cache folder.

    Raises:
        DataError: the named folder does not hold CIFAR-100, or the cache folder is damaged or cannot be written.
        DataNotFoundError: no folder is named, the cache folder is empty, and nothing was downloaded.
    """
    if root:
        layout = find_layout(Path(root).expanduser(), "CIFAR-100")
        if layout is None:
            raise DataError(f"{nothing_in(Path(root), 'CIFAR-100')} {what_next('CIFAR-100')}")
        return _load(layout)
    # CIFAR_FAST_DATA usually names CIFAR-10's folder, which is no reason to stop.
    folders = [folder for _, folder in _named_roots(None)] + [cache_folder()]
    layouts = [find_layout(folder, "CIFAR-100", pictures=False) for folder in folders]
    layout = next((layout for layout in layouts if layout), None)
    if layout is None and download:
        layout = find_layout(download_cifar100(mirrors), "CIFAR-100")
    if layout is None:
        raise DataNotFoundError(
            f"{nothing_in(cache_folder(), 'CIFAR-100')} Downloading is switched off. {what_next('CIFAR-100')}"
        )
    return _load(layout)


NAMED = (SYNTHETIC, "cifar100")
"""The words that `load_named` knows; a folder of that name is `./cifar100`."""


def load_named(name: str, mirrors: Sequence[str] = (), image_size: int = IMAGE_SIZE) -> Dataset:
    """Load the data set that a person named: `synthetic`, `cifar100`, or a folder.

    Args:
        name: one of these words, or the path of a folder as in `load_cifar10`.
        mirrors: as in `load_cifar10` and `load_cifar100`.
        image_size: as in `load_cifar10`.

    Raises:
        DataError: it cannot be used, or an official or synthetic set was asked for at a size other than 32.
        DataNotFoundError: it is not on this machine and was not downloaded.
    """
    if name in NAMED and image_size != IMAGE_SIZE:
        raise DataError(
            f"The images of {name} have {IMAGE_SIZE} pixels; an image size of {image_size} is for folders of your own "
            "pictures. Leave it out."
        )
    if name == SYNTHETIC:
        return synthetic()
    if name == "cifar100":
        return load_cifar100(mirrors=mirrors)
    return load_cifar10(name, mirrors=mirrors, image_size=image_size)


def load_or_synthetic(
    root: str | Path | None = None,
    download: bool = True,
    mirrors: Sequence[str] = (),
    *,
    image_size: int = IMAGE_SIZE,
) -> Dataset:
    """Load real data as `load_cifar10` does; if there is none, say so loudly and return the synthetic set.

    A named folder that cannot be used is still an error: someone who names a data set does not want another.

    Args:
        root: as in `load_cifar10`.
        download: as in `load_cifar10`.
        mirrors: as in `load_cifar10`.
        image_size: as in `load_cifar10`.

    Returns:
        The real data set, or `synthetic()`.

    Raises:
        DataError: a named folder does not hold a usable data set, or the cache folder is damaged or cannot be written.
    """
    try:
        return load_cifar10(root, download, mirrors, image_size=image_size)
    except DataNotFoundError as error:
        rule = "!" * 100
        print(
            f"{rule}\nNO REAL DATA: using synthetic images instead (data set: synthetic). Their accuracies say nothing "
            f"about CIFAR-10.\n{error}\n{rule}",
            file=sys.stderr,
            flush=True,
        )
        return synthetic()


def _named_roots(root: str | Path | None) -> list[tuple[str, Path]]:
    """Return the folders that the user named, each with what named it; the first one counts."""
    named = [("the argument", root), ("CIFAR_FAST_DATA", os.environ.get("CIFAR_FAST_DATA"))]
    return [(origin, Path(folder).expanduser()) for origin, folder in named if folder]


# --- the decoded copy ---


def _load(layout: Layout, image_size: int = IMAGE_SIZE) -> Dataset:
    """Return the decoded copy of a layout; write it first if it is missing or older than the files."""
    decoded = _decoded_file(layout, image_size)
    if (kept := _decoded_copy(decoded)) is not None:
        return kept
    data = decode(layout, image_size)
    try:
        write_decoded(data, decoded)
        return read_decoded(decoded)  # mapped, so that processes share it and the system may drop its pages
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"The decoded data set could not be stored in {decoded.parent} ({error}), so every start decodes it again. "
            "Set CIFAR_FAST_CACHE to a folder with 200 MB of free space.",
            stacklevel=3,
        )
        return data


def _decoded_copy(decoded: Path) -> Dataset | None:
    """Map a decoded file; None where it is not there yet, or was cut short when the system crashed."""
    with suppress(OSError, SafetensorError):
        return read_decoded(decoded)
    return None


def _decoded_file(layout: Layout, image_size: int = IMAGE_SIZE) -> Path:
    """Name the decoded copy after the folder (symbolic links resolved), the image size, and each file's state."""
    place = f"{layout.folder.resolve()}" + (f" at {image_size}" if image_size != IMAGE_SIZE else "")
    where = hashlib.sha256(place.encode()).hexdigest()[:16]
    state = json.dumps([_CACHE_FORMAT, layout.kind, file_states(layout)])
    what = hashlib.sha256(state.encode()).hexdigest()[:16]
    return cache_folder() / "decoded" / f"{where}-{what}.safetensors"


# --- what is on this machine ---


@dataclass(frozen=True)
class Place:
    """A place to look for data, and what was found there."""

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


def status(root: str | Path | None = None, *, data_set: str = "CIFAR-10", check: bool = True) -> list[Place]:
    """Look in every place where data may be, in the order of the search, and check what is there completely.

    Args:
        root: as in `load_cifar10` and `load_cifar100`.
        data_set: what to look for, "CIFAR-10" (or whatever is in a named folder) or "CIFAR-100".
        check: False trusts a decoded copy, and assumes that whatever else is there is usable, which takes no time.

    Returns:
        The places; data is taken from the first, whether usable or not.
    """
    places = (*_named_roots(root), ("the cache folder", cache_folder()))
    return [_look_at(origin, folder, data_set, check) for origin, folder in places]


def _look_at(origin: str, folder: Path, data_set: str, check: bool) -> Place:
    decoded = None
    is_free = data_set == "CIFAR-10" and origin != "the cache folder"  # to hold anything
    try:
        layout = find_layout(folder) if is_free else find_layout(folder, data_set, pictures=data_set == "CIFAR-10")
        if layout is None:
            n_kept = unfinished_bytes(folder)
            kept = f" An interrupted download left {megabytes(n_kept)} there." if n_kept else ""
            return Place(origin, folder, False, nothing_in(folder, data_set) + kept, None)
        decoded = _decoded_file(layout)
        data = decode(layout) if check else _decoded_copy(decoded)
    except DataError as error:
        return Place(origin, folder, False, str(error), decoded if decoded is not None and decoded.exists() else None)
    if data is None:
        return Place(origin, folder, True, f"{layout.folder}, not yet read; `cifar-fast data` checks every file", None)
    state = "complete and undamaged" if check else "decoded before"
    finding = (
        f"{data.name}, {layout.kind} layout, {state}: {len(data.train_labels):,} training and "
        f"{len(data.test_labels):,} test images of {data.n_classes} classes, fingerprint {data.fingerprint}"
    )
    return Place(origin, folder, True, finding, decoded if decoded.exists() else None)
