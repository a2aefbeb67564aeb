"""Turns a downloaded archive into the folder of an official layout, or finds that its content is not the official one.

fast.ai offers CIFAR-10 as PNG files in one folder per class. PNG keeps every pixel, but the numbers of the files do not
give the official order, which decides what a seed trains. `cifar10_order.bin` does: when the images are sorted by the
BLAKE2b digest of their pixels, image number k of the training set belongs in the official position `order[k]`, and
likewise for the test set. The files written here are therefore identical to the official binary ones, as their SHA-256
proves.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zlib
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np

from cifar_fast.data import layouts
from cifar_fast.data.dataset import IMAGE_SIZE

_PARTS = ("train", "test")


class WrongContent(Exception):
    """An archive does not hold the official data; the message says why."""


def unpack_tar(archive: Path, scratch: Path) -> None:
    """Unpack an official archive, whose checksum is right, into the folder `scratch`."""
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")


def unpack_pictures(archive: Path, scratch: Path) -> None:
    """Write fast.ai's PNG archive of CIFAR-10 into `scratch` as the official binary layout.

    Raises `WrongContent` if the archive is damaged or any picture is not the official one.
    """
    try:
        records = _read_records(archive)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise WrongContent(f"the archive is damaged: {error}") from error
    ordered = dict(zip(_PARTS, map(_in_official_order, _PARTS, records), strict=True))
    folder = scratch / layouts.CIFAR10.binary_folder
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("".join(f"{name}\n" for name in layouts.CIFAR10.classes))
    start = 0
    for name, file in layouts.CIFAR10.binary_files.items():
        is_test = name == list(layouts.CIFAR10.binary_files)[-1]
        content = ordered["test"] if is_test else ordered["train"][start : start + file.n_records]
        start += file.n_records
        if hashlib.sha256(content.data).hexdigest() != file.sha256:
            raise WrongContent(f"its pictures are not the official ones: the SHA-256 of {name} is not {file.sha256}")
        (folder / name).write_bytes(content.data)


def pixel_digest(pixels: bytes) -> bytes:
    """Return the digest by which `cifar10_order.bin` sorts an image; `pixels` are its red, green and blue planes."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


def _read_records(archive: Path) -> list[np.ndarray]:
    """Return the official records, uint8 (N, 3073), of the training and of the test images, in the archive's order."""
    from PIL import Image  # here, because only this archive needs it
    from tqdm.auto import tqdm

    sizes = [len(order) for order in official_order()]
    records: dict[str, list[bytes]] = {part: [] for part in _PARTS}
    bar = tqdm(desc="reading the pictures", total=sum(sizes), unit="image", disable=not sys.stderr.isatty())
    with bar, tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.suffix != ".png" or path.name.startswith("."):
                continue
            part, class_name = path.parts[-3:-1] if len(path.parts) >= 3 else ("", "")
            if part not in _PARTS or class_name not in layouts.CIFAR10.classes:
                raise WrongContent(f"it has {path}, which is not in train/<class>/ or test/<class>/ of CIFAR-10")
            file = tar.extractfile(member)
            assert file is not None  # because it is a regular file
            try:
                with Image.open(io.BytesIO(file.read())) as picture:
                    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
                        raise WrongContent(f"{path} is {picture.width}x{picture.height} pixels")
                    pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1).tobytes()
            except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise WrongContent(f"{path} cannot be read: {error}") from error
            records[part].append(bytes([layouts.CIFAR10.classes.index(class_name)]) + pixels)
            bar.update()
    for (part, found), size in zip(records.items(), sizes, strict=True):
        if len(found) != size:
            raise WrongContent(f"it has {len(found):,} {part} pictures instead of {size:,}")
    return [np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1) for found in records.values()]


def _in_official_order(part: str, records: np.ndarray) -> np.ndarray:
    """Return `records`, uint8 (N, 3073), of one part in the order of the official files."""
    order = official_order()[_PARTS.index(part)]
    digests = [pixel_digest(record[1:].tobytes()) for record in records]
    ordered = np.empty_like(records)
    ordered[order] = records[sorted(range(len(records)), key=digests.__getitem__)]
    return ordered


def official_order() -> tuple[np.ndarray, np.ndarray]:
    """Return the official positions of the training and of the test images, (50000,) and (10000,), by pixel digest."""
    content = resources.files("cifar_fast.data").joinpath("cifar10_order.bin").read_bytes()
    positions = np.frombuffer(content, "<u2").astype(np.int64)
    return positions[:50_000], positions[50_000:]
