"""A download ends with the right bytes, from whichever source delivers them, or says why none did."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import batch_labels, batch_pixels

from cifar_fast.data import download, layouts, unpack
from cifar_fast.data.dataset import CIFAR10_CLASSES
from cifar_fast.data.layouts import decode, find_layout
from cifar_fast.data.load import load_cifar10, load_cifar100
from cifar_fast.errors import DataError, DataNotFoundError
from cifar_fast.files import file_size


class Clock:
    """A clock that stands still unless a slow server sets its pace, so that no test has to wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = 0.0  # seconds from one reading to the next

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


@dataclass
class Mirror:
    """A local web server; the first part of a path says how it behaves."""

    url: str
    body: bytes
    clock: Clock
    release: threading.Event  # lets silent connections end
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (behaviour, Range header)

    def __call__(self, behaviour: str, filename: str = "archive.tar.gz") -> str:
        return f"{self.url}/{behaviour}/{filename}"

    def behaviours(self) -> list[str]:
        return [behaviour for behaviour, _ in self.requests]

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        behaviour, wanted = handler.path.split("/")[1], handler.headers["Range"]
        self.requests.append((behaviour, wanted))
        # Whatever the size of the chunks, each of these is slow, and slower than the one before it.
        self.clock.pace = {"slow": 1e2, "slower": 1e5, "slowest": 1e8}.get(behaviour, 0.0)
        if behaviour == "missing":
            handler.send_error(404)
            return
        body = {
            "wrong": self.body[:-1] + bytes([self.body[-1] ^ 1]),
            "other_size": self.body + b"more",
            "portal": b"<html>log in</html>",
        }.get(behaviour, self.body)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and behaviour != "no_range" else 0
        handler.send_response(206 if begin else 200)
        if begin:
            first = 0 if behaviour == "other_range" else begin
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if behaviour != "no_length":
            handler.send_header("Content-Length", str(len(body) - begin))
        handler.end_headers()
        rest = body[begin:]
        if behaviour == "cutting":  # closes each connection too early
            handler.wfile.write(rest[: len(rest) // 2 + 1])
        elif behaviour == "broken":  # closes each connection before it sends anything
            return
        elif behaviour == "throttled":
            for begin in range(0, len(rest), 2000):
                handler.wfile.write(rest[begin : begin + 2000])
                time.sleep(0.05)
        elif behaviour == "silent":
            handler.wfile.write(rest[:5000])
            handler.wfile.flush()
            self.release.wait(20)
        else:
            handler.wfile.write(rest)


def packed(folder: Path) -> bytes:
    """A folder as an official archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return buffer.getvalue()


@pytest.fixture
def mirror(torchvision_set: Path) -> Iterator[Mirror]:
    """A server with the small data set, packed as the official archive is."""
    body = packed(torchvision_set / "cifar-10-batches-py")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                served.respond(self)
            except ConnectionError:  # the client has hung up, as it should
                pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Mirror(f"http://127.0.0.1:{server.server_port}", body, Clock(), threading.Event())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def archive_of(mirror: Mirror, *behaviours: str) -> download.Archive:
    """The archive as built-in sources with these behaviours offer it."""
    return download.Archive(
        filename="archive.tar.gz",
        size=len(mirror.body),
        md5=hashlib.md5(mirror.body).hexdigest(),
        urls=tuple(mirror(behaviour) for behaviour in behaviours),
        folder="cifar-10-batches-py",
        unpack=unpack.unpack_tar,
    )


def patience_of(mirror: Mirror, timeout: float = 20.0) -> download.Patience:
    return download.Patience(timeout=timeout, window=5.0, minimum_rate=2000.0, clock=mirror.clock)


def fetch(
    mirror: Mirror, *behaviours: str, mirrors: Sequence[str] = (), timeout: float = 20.0, progress: bool = False
) -> Path:
    """Download from the mirrors of the user, then from built-in sources with these behaviours."""
    known = download.Download("CIFAR-10", (archive_of(mirror, *behaviours),))
    return download.run_download(known, mirrors, progress, patience_of(mirror, timeout))


def kept_part(cache: Path) -> Path:
    return cache / "archive.tar.gz.part"


def assert_only_kept(cache: Path, *names: str) -> None:
    """The cache folder holds these files and nothing that looks like a data set."""
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == sorted(names)
    assert find_layout(cache) is None


def test_archives_are_those_that_torchvision_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.undo()  # the real sources
    for known, theirs in ((download.CIFAR10, datasets.CIFAR10), (download.CIFAR100, datasets.CIFAR100)):
        archive = known.official
        assert (archive.filename, archive.md5, archive.folder) == (theirs.filename, theirs.tgz_md5, theirs.base_folder)
        assert archive.urls[-1] == theirs.url  # the official host, which is slow
        for each in known.archives:
            for url in each.urls:
                assert url.startswith("https://") and f"/{each.filename}" in url


def test_download_unpacks_a_set_that_loads(mirror: Mirror, binary: Path, cache: Path) -> None:
    assert fetch(mirror, "good") == cache / "cifar-10-batches-py"
    assert load_cifar10(download=False).fingerprint == load_cifar10(binary).fingerprint
    assert not list(cache.glob("archive.tar.gz*[!k]"))  # only the lock stays


def test_a_set_in_the_cache_is_not_downloaded_again(mirror: Mirror) -> None:
    fetch(mirror, "good")
    fetch(mirror, "good")
    assert mirror.behaviours() == ["good"]


@pytest.mark.parametrize("bad", ["missing", "portal", "wrong", "broken"])
def test_bad_source_is_followed_by_the_next(mirror: Mirror, cache: Path, bad: str) -> None:
    fetch(mirror, bad, "good")
    assert set(mirror.behaviours()) == {bad, "good"}
    assert load_cifar10(download=False).n_classes == 10


def test_source_that_falls_silent_is_followed_by_the_next(mirror: Mirror) -> None:
    fetch(mirror, "silent", "good", timeout=2.0)
    assert mirror.requests == [("silent", None), ("good", "bytes=5000-")]


def test_dead_host_is_followed_by_the_next(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last one names a folder, the first one a file of another data set.
    other = mirror("good", "cifar-100-python.tar.gz")
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"{other} nonsense http://127.0.0.1:9/x.tar.gz {mirror.url}/good/")
    known = download.Download("CIFAR-10", (archive_of(mirror),))
    monkeypatch.setattr(download, "CIFAR10", known)
    assert download.download_cifar10().name == "cifar-10-batches-py"
    said = capsys.readouterr().err
    assert "giving up on http://127.0.0.1:9/x.tar.gz: no connection" in said
    assert "giving up on nonsense: no connection" in said and "cifar-100" not in said
    assert f"CIFAR-10 came from {mirror.url[7:]} at" in said


def test_cifar100_is_downloaded_checked_and_loaded(
    mirror: Mirror, torchvision100: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.body = packed(torchvision100 / "cifar-100-python")
    archive = replace(
        download.CIFAR100.official, size=len(mirror.body), md5=hashlib.md5(mirror.body).hexdigest(),
        urls=(mirror("wrong"), mirror("good")),
    )  # fmt: skip
    monkeypatch.setattr(download, "CIFAR100", download.Download("CIFAR-100", (archive,)))
    assert load_cifar100().fingerprint == load_cifar100(torchvision100).fingerprint
    assert mirror.behaviours() == ["wrong", "good"]


# --- speed ---


def test_sources_are_tried_in_the_promised_order(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"{mirror('wrong')} {mirror('portal')}")
    with pytest.raises(DataNotFoundError):
        fetch(mirror, "broken", "other_size", mirrors=[mirror("missing")])
    assert list(dict.fromkeys(mirror.behaviours())) == ["missing", "wrong", "portal", "broken", "other_size"]


def test_slow_source_is_left_and_the_next_resumes_there(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(mirror, "slow", "good", "missing", progress=True)
    [(slow, none), (good, wanted)] = mirror.requests
    assert (slow, good, none) == ("slow", "good", None)
    assert wanted is not None and int(wanted.removeprefix("bytes=").rstrip("-")) > 0
    said, host = capsys.readouterr().err, mirror.url[7:]
    assert re.search(rf"leaving {host}: 0\.\d kB/s is less than 2\.0 kB/s", said)
    assert re.search(rf"CIFAR-10 came from {host} at [\d.]+ MB/s", said)


@pytest.mark.parametrize("order", list(itertools.permutations(["slow", "slower", "slowest"])))
def test_if_all_are_slow_the_fastest_goes_on(
    mirror: Mirror, order: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(mirror, *order, progress=True)
    assert mirror.behaviours() == [*order, "slow"]
    said = capsys.readouterr().err
    assert said.count("leaving") == 3
    assert re.search(rf"no source is faster than 2\.0 kB/s; going on with {mirror.url[7:]} at 0\.\d kB/s, for", said)


def test_slow_source_that_then_dies_is_followed_by_the_next_slow_one(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond = mirror.respond

    def die_at_second_request(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.startswith("/slow/") and "slow" in mirror.behaviours():
            handler.path = handler.path.replace("slow", "missing")
        respond(handler)

    monkeypatch.setattr(mirror, "respond", die_at_second_request)
    fetch(mirror, "missing", "slow", "slower")
    assert mirror.behaviours() == ["missing", "slow", "slower", "missing", "slower"]


def test_truly_throttled_server_is_left(mirror: Mirror) -> None:
    """With the real clock: the throttled server cannot exceed 40 kB/s, however fast or slow the machine is."""
    known = download.Download("CIFAR-10", (archive_of(mirror, "throttled", "good"),))
    patience = download.Patience(timeout=20.0, window=0.2, minimum_rate=100_000.0)
    download.run_download(known, [], progress=False, patience=patience)
    assert mirror.behaviours()[:2] == ["throttled", "good"] and mirror.behaviours()[-1] == "good"


def test_rate_is_measured_anew_in_each_window() -> None:
    clock = Clock()
    meter = download._Meter(download.Patience(window=10.0, clock=clock), minimum_rate=100.0)
    for clock.now, n_bytes in [(9.0, 5000), (10.0, 0), (19.0, 0)]:
        meter.count(n_bytes)
    clock.now = 20.0
    with pytest.raises(download._TooSlow) as caught:
        meter.count(900)
    assert caught.value.rate == 90.0 and meter.rate() == 5900 / 20


# --- what comes, and what does not ---


def test_cut_connection_is_resumed_at_the_same_source(mirror: Mirror, cache: Path) -> None:
    kept_bytes = len(mirror.body) - 20  # so few are missing that halving them ends before patience does
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:kept_bytes])
    fetch(mirror, "cutting")
    begins = [int(wanted.removeprefix("bytes=").rstrip("-")) for _, wanted in mirror.requests if wanted]
    assert begins[0] == kept_bytes
    assert begins == sorted(set(begins)) and len(begins) > 2


def test_source_without_ranges_starts_over(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:1234])
    fetch(mirror, "no_range")
    assert mirror.requests == [("no_range", "bytes=1234-")]


def test_source_that_does_not_send_the_length(mirror: Mirror) -> None:
    fetch(mirror, "no_length")
    assert load_cifar10(download=False).n_classes == 10


def test_source_that_sends_another_range_is_followed_by_the_next(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:1234])
    fetch(mirror, "other_range", "good")
    assert mirror.requests == [("other_range", "bytes=1234-"), ("good", "bytes=1234-")]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the server keeps no state
@given(drawn=st.data())
def test_download_succeeds_whatever_was_kept(mirror: Mirror, drawn: st.DataObject) -> None:
    size = len(mirror.body)
    right = st.integers(0, size).map(lambda length: mirror.body[:length])
    wrong = st.tuples(st.binary(max_size=50), st.integers(0, size + 100)).map(lambda pair: pair[0] + bytes(pair[1]))
    kept = drawn.draw(right | wrong)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FAST_CACHE", folder)
        kept_part(Path(folder)).write_bytes(kept)
        layout = find_layout(fetch(mirror, drawn.draw(st.sampled_from(["good", "no_range", "no_length"]))))
        assert layout is not None and decode(layout).n_classes == 10


def test_complete_archive_in_the_cache_folder_needs_no_source(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    (cache / "archive.tar.gz").write_bytes(mirror.body)
    fetch(mirror, "missing")
    assert mirror.requests == []


def test_failure_names_every_source_its_reason_and_what_to_do(mirror: Mirror, cache: Path) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        fetch(mirror, "missing", "portal", "broken", "wrong", "other_size")
    message = str(caught.value)
    reasons = {
        "missing": "HTTP 404",
        "portal": "19 bytes",
        "broken": "cut 6 times",
        "wrong": "MD5",
        "other_size": f"{len(mirror.body) + 4:,} bytes instead of",
    }
    for behaviour, reason in reasons.items():
        [line] = [line for line in message.splitlines() if f"/{behaviour}/" in line]
        assert reason in line
    for advice in ("CIFAR_FAST_DATA", "--mirror URL", "--data synthetic"):
        assert advice in message
    assert_only_kept(cache)
    with pytest.raises(DataNotFoundError, match=r"keeps 0\.4 MB; the next download resumes there"):
        fetch(mirror, "cutting")
    assert_only_kept(cache, "archive.tar.gz.part")


@pytest.mark.parametrize("bad", ["missing", "portal", "wrong", "broken"])
def test_nothing_but_right_bytes_are_kept_after_a_failure(mirror: Mirror, cache: Path, bad: str) -> None:
    with pytest.raises(DataNotFoundError):
        fetch(mirror, bad)
    assert_only_kept(cache, *(["archive.tar.gz.part"] if bad == "broken" else []))
    assert file_size(kept_part(cache)) == 0


def test_interrupted_download_is_resumed_by_the_next(mirror: Mirror, cache: Path) -> None:
    ticks = iter([0.0, 0.0, 0.0])

    def interrupt() -> float:
        try:
            return next(ticks)
        except StopIteration:
            raise KeyboardInterrupt from None

    known = download.Download("CIFAR-10", (archive_of(mirror, "good"),))
    with pytest.raises(KeyboardInterrupt):
        download.run_download(known, [], progress=False, patience=download.Patience(clock=interrupt))
    assert_only_kept(cache, "archive.tar.gz.part")
    n_kept = file_size(kept_part(cache))
    assert mirror.body.startswith(kept_part(cache).read_bytes()) and 0 < n_kept < len(mirror.body)
    fetch(mirror, "good")
    assert mirror.requests[-1] == ("good", f"bytes={n_kept}-")


def test_interrupted_unpacking_leaves_no_data_set(mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(tar: tarfile.TarFile, path: str, **_: object) -> None:
        (Path(path) / "cifar-10-batches-py").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", interrupt)
        fetch(mirror, "good")
    assert_only_kept(cache, "archive.tar.gz")
    fetch(mirror, "missing")  # the archive is complete, so no source is needed
    assert find_layout(cache) is not None


def test_archive_cannot_write_outside_its_folder(mirror: Mirror, cache: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    mirror.body = buffer.getvalue()
    with pytest.raises(tarfile.FilterError):
        fetch(mirror, "good")
    assert_only_kept(cache, "archive.tar.gz")
    assert not (cache.parent / "escaped").exists()


def test_full_disk_is_reported_as_such_not_as_a_dead_source(mirror: Mirror, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match="cannot be stored in") as caught:
            fetch(mirror, "good", "good")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, DataNotFoundError)
    assert_only_kept(cache, "archive.tar.gz.part")
    fetch(mirror, "good")


def test_cache_folder_that_cannot_be_written_is_reported(mirror: Mirror, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="CIFAR_FAST_CACHE") as caught:
        fetch(mirror, "good")
    assert not isinstance(caught.value, DataNotFoundError)
    assert mirror.requests == []


# --- the pictures of fast.ai ---


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def small_pictures() -> dict[str, bytes]:
    """The small data set as PNG files, numbered within each class, in an order that is not the official one."""
    files = {}
    for part, indices in (("train", range(5)), ("test", range(5, 6))):
        pixels = np.concatenate([batch_pixels(index) for index in indices])
        labels = np.concatenate([batch_labels(index) for index in indices])
        for number in np.random.default_rng(0).permutation(len(labels)):
            files[f"cifar10/{part}/{CIFAR10_CLASSES[labels[number]]}/{len(files):04}.png"] = png(pixels[number])
    return files


def in_archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"cifar10/labels.txt": b"airplane", **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def small_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the small data set in place of CIFAR-10's."""
    order = []
    for indices in (range(5), range(5, 6)):
        digests = [unpack.pixel_digest(pixels.tobytes()) for index in indices for pixels in batch_pixels(index)]
        order.append(np.array(sorted(range(len(digests)), key=digests.__getitem__)))
    monkeypatch.setattr(unpack, "official_order", lambda: tuple(order))


def fetch_pictures(mirror: Mirror, body: bytes, *behaviours: str) -> Path:
    """Download from a source of pictures, then from sources of the official archive with these behaviours."""
    official = archive_of(mirror, *behaviours)
    mirror.body = body
    pictures = replace(
        download.Archive("pictures.tgz", len(body), None, (mirror("good", "pictures.tgz"),), "cifar-10-batches-bin",
                         unpack.unpack_pictures)
    )  # fmt: skip
    known = download.Download("CIFAR-10", (pictures, official))
    return download.run_download(known, [], progress=False, patience=patience_of(mirror))


def test_pictures_become_the_official_binary_files(
    mirror: Mirror, binary: Path, small_order: None, cache: Path
) -> None:
    folder = fetch_pictures(mirror, in_archive(small_pictures()))
    for name in layouts.CIFAR10.binary_files:
        assert (folder / name).read_bytes() == (binary / "cifar-10-batches-bin" / name).read_bytes()
    assert load_cifar10(download=False).fingerprint == load_cifar10(binary).fingerprint
    assert {path.name for path in cache.iterdir()} == {"cifar-10-batches-bin", "decoded", "archive.tar.gz.lock"}


def another_pixel(files: dict[str, bytes]) -> bytes:
    first = next(iter(files))
    with Image.open(io.BytesIO(files[first])) as picture:
        pixels = np.array(picture).transpose(2, 0, 1)
    pixels[0, 0, 0] ^= 1
    return in_archive(files | {first: png(pixels)})


def another_class(files: dict[str, bytes]) -> bytes:
    first = next(iter(files))
    folder = "cat" if "/dog/" in first else "dog"
    return in_archive({f"cifar10/train/{folder}/moved.png": files.pop(first), **files})


BAD_PICTURES: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "pixel": (another_pixel, "the SHA-256 of data_batch_"),
    "class": (another_class, "the SHA-256 of data_batch_"),
    "missing": (lambda files: in_archive(dict(list(files.items())[1:])), "99 train pictures instead of 100"),
    "size": (lambda files: in_archive(files | {next(iter(files)): b"no picture"}), "damaged"),
    "folder": (lambda files: in_archive(files | {"cifar10/train/plane/1.png": b""}), "train/plane/1.png"),
    "cut": (lambda files: in_archive(files)[:-5000], "damaged"),
    "no archive": (lambda files: b"<html>" * 1000, "damaged"),
}


@pytest.mark.parametrize("fault", BAD_PICTURES)
def test_wrong_pictures_are_followed_by_the_official_archive(
    mirror: Mirror, small_order: None, binary: Path, cache: Path, fault: str
) -> None:
    spoil, words = BAD_PICTURES[fault]
    with pytest.raises(DataNotFoundError, match=re.escape(words)):
        fetch_pictures(mirror, spoil(small_pictures()))
    assert_only_kept(cache)


def test_official_archive_comes_after_wrong_pictures(mirror: Mirror, small_order: None) -> None:
    right, wrong = mirror.body, b"<html>" * 1000
    respond = mirror.respond

    def two_files(handler: BaseHTTPRequestHandler) -> None:
        mirror.body = wrong if handler.path.endswith(".tgz") else right
        respond(handler)

    mirror.respond = two_files  # type: ignore[method-assign]
    official = archive_of(mirror, "good")
    pictures = replace(
        official, filename="pictures.tgz", size=len(wrong), md5=None, urls=(mirror("first", "pictures.tgz"),),
        unpack=unpack.unpack_pictures,
    )  # fmt: skip
    known = download.Download("CIFAR-10", (pictures, official))
    assert download.run_download(known, [], False, patience_of(mirror)).name == "cifar-10-batches-py"
    assert mirror.behaviours() == ["first", "good"]


def test_archive_that_has_begun_to_arrive_is_resumed_first(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:1234])
    official = archive_of(mirror, "good")
    pictures = replace(official, filename="pictures.tgz", urls=(mirror("first", "pictures.tgz"),))
    download.run_download(download.Download("CIFAR-10", (pictures, official)), [], False, patience_of(mirror))
    assert mirror.requests == [("good", "bytes=1234-")]


def test_order_belongs_to_the_official_pictures(user_data_root: Path | None) -> None:
    train, test = unpack.official_order()
    assert sorted(train) == list(range(50_000)) and sorted(test) == list(range(10_000))
    if user_data_root is None:
        pytest.skip("needs CIFAR-10: set CIFAR_FAST_DATA to the folder that holds it")
    layout = find_layout(user_data_root)
    assert layout is not None
    images = decode(layout).test_images
    digests = [unpack.pixel_digest(image.numpy().tobytes()) for image in images[test]]
    assert digests == sorted(digests)
