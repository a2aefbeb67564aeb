"""A download ends with the right bytes, from whichever source delivers them, or says why none did."""

from __future__ import annotations

import hashlib
import io
import resource
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_fast.data import download
from cifar_fast.data.layouts import decode, find_layout
from cifar_fast.data.load import load_cifar10
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

    def __call__(self, behaviour: str) -> str:
        return f"{self.url}/{behaviour}/archive.tar.gz"

    def behaviours(self) -> list[str]:
        return [behaviour for behaviour, _ in self.requests]

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        behaviour, wanted = handler.path.split("/")[1], handler.headers["Range"]
        self.requests.append((behaviour, wanted))
        self.clock.pace = 1000.0 if behaviour == "slow" else 0.0
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
        elif behaviour == "silent":
            handler.wfile.write(rest[:5000])
            handler.wfile.flush()
            self.release.wait(20)
        else:
            handler.wfile.write(rest)


@pytest.fixture
def mirror(torchvision_set: Path) -> Iterator[Mirror]:
    """A server with the small data set, packed as the official archive is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(torchvision_set / "cifar-10-batches-py", "cifar-10-batches-py")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                served.respond(self)
            except ConnectionError:  # the client has hung up, as it should
                pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Mirror(f"http://127.0.0.1:{server.server_port}", buffer.getvalue(), Clock(), threading.Event())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(mirror: Mirror, *behaviours: str, timeout: float = 20.0) -> Path:
    """Download from sources with these behaviours: the official host, then a --mirror, then built-in mirrors."""
    official, *rest = [mirror(behaviour) for behaviour in behaviours]
    archive = download._Archive(
        filename="archive.tar.gz",
        size=len(mirror.body),
        md5=hashlib.md5(mirror.body).hexdigest(),
        folder="cifar-10-batches-py",
        official=official,
        mirrors=tuple(rest[1:]),
    )
    patience = download._Patience(timeout=timeout, window=5.0, minimum_rate=2000.0, clock=mirror.clock)
    return download._download(archive, rest[:1], progress=False, patience=patience)


def kept_part(cache: Path) -> Path:
    return cache / "archive.tar.gz.part"


def assert_only_kept(cache: Path, *names: str) -> None:
    """The cache folder holds these files and nothing that looks like a data set."""
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == sorted(names)
    assert find_layout(cache) is None


def test_archive_is_the_one_that_torchvision_knows() -> None:
    from torchvision.datasets import CIFAR10

    archive = download.CIFAR10_ARCHIVE
    assert (archive.filename, archive.md5, archive.folder) == (CIFAR10.filename, CIFAR10.tgz_md5, CIFAR10.base_folder)


def test_download_unpacks_a_set_that_loads(mirror: Mirror, binary: Path, cache: Path) -> None:
    assert fetch(mirror, "good") == cache / "cifar-10-batches-py"
    assert load_cifar10(download=False).fingerprint == load_cifar10(binary).fingerprint
    assert not list(cache.glob("archive.tar.gz*[!k]"))  # only the lock stays


def test_a_set_in_the_cache_is_not_downloaded_again(mirror: Mirror) -> None:
    fetch(mirror, "good")
    fetch(mirror, "good")
    assert mirror.behaviours() == ["good"]


@pytest.mark.parametrize("bad", ["missing", "portal", "slow", "wrong", "broken"])
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
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"nonsense {mirror.url}/good/")  # the last one names a folder
    archive = replace(download.CIFAR10_ARCHIVE, size=len(mirror.body), md5=hashlib.md5(mirror.body).hexdigest())
    monkeypatch.setattr(download, "CIFAR10_ARCHIVE", archive)
    assert download.download_cifar10().name == "cifar-10-batches-py"
    said = capsys.readouterr().err
    assert "giving up on http://127.0.0.1:9/official.tar.gz: no connection" in said
    assert "giving up on nonsense: no connection" in said and f"CIFAR-10 from {mirror.url[7:]}" in said


def test_sources_are_tried_in_the_promised_order(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"{mirror('wrong')} {mirror('portal')}")
    with pytest.raises(DataNotFoundError):
        fetch(mirror, "missing", "broken", "other_size")
    assert list(dict.fromkeys(mirror.behaviours())) == ["missing", "broken", "wrong", "portal", "other_size"]


def test_next_source_resumes_where_the_slow_one_stopped(mirror: Mirror) -> None:
    fetch(mirror, "slow", "good")
    [(_, none), (_, wanted)] = mirror.requests
    assert none is None
    assert wanted is not None and int(wanted.removeprefix("bytes=").rstrip("-")) > 0


def test_rate_is_measured_anew_in_each_window() -> None:
    clock = Clock()
    rate = download._RateCheck(download._Patience(window=10.0, minimum_rate=100.0, clock=clock))
    for clock.now, n_bytes in [(9.0, 5000), (10.0, 0), (19.0, 0)]:
        rate.count(n_bytes)
    clock.now = 20.0
    with pytest.raises(download._SourceError, match=r"too slow: 0\.1 kB/s"):
        rate.count(900)


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
        fetch(mirror, "missing", "portal", "broken", "wrong", "slow")
    message = str(caught.value)
    reasons = {
        "missing": "HTTP 404",
        "portal": "19 bytes",
        "broken": "cut 6 times",
        "wrong": "MD5",
        "slow": "too slow",
    }
    for behaviour, reason in reasons.items():
        [line] = [line for line in message.splitlines() if f"/{behaviour}/" in line]
        assert reason in line
    for advice in ("CIFAR_FAST_DATA", "--mirror URL", "--data synthetic", "resumes there"):
        assert advice in message
    assert_only_kept(cache, "archive.tar.gz.part")


@pytest.mark.parametrize("bad", ["missing", "portal", "wrong", "broken"])
def test_nothing_but_right_bytes_are_kept_after_a_failure(mirror: Mirror, cache: Path, bad: str) -> None:
    with pytest.raises(DataNotFoundError):
        fetch(mirror, bad)
    assert_only_kept(cache, *(["archive.tar.gz.part"] if bad == "broken" else []))
    assert file_size(kept_part(cache)) == 0


def test_interrupted_download_is_resumed_by_the_next(mirror: Mirror, cache: Path) -> None:
    ticks = iter([0.0, 0.0])

    def interrupt() -> float:
        try:
            return next(ticks)
        except StopIteration:
            raise KeyboardInterrupt from None

    patience = download._Patience(clock=interrupt)
    archive = replace(
        download.CIFAR10_ARCHIVE, size=len(mirror.body), official=mirror("good"), filename="archive.tar.gz"
    )
    with pytest.raises(KeyboardInterrupt):
        download._download(archive, [], progress=False, patience=patience)
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
