"""Data is found, checked, decoded once and downloaded from whichever source delivers it; what is wrong is said."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import resource
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from cifar_fast.data import load as data
from cifar_fast.data.dataset import DataNotFoundError
from cifar_fast.data.load import load_cifar10, load_or_synthetic
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import DataError

N_RECORDS = 20  # in each file of the small data sets here


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no way to the network: the official archive has no source but what a test gives it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    nowhere = replace(data.CIFAR10_ARCHIVE, official="http://127.0.0.1:9/official.tar.gz", mirrors=())
    monkeypatch.setattr(data, "CIFAR10_ARCHIVE", nowhere)
    return folder


# --- layouts ---


def batch_pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (N_RECORDS, 3072), np.uint8)


def batch_labels(index: int) -> np.ndarray:
    return np.random.default_rng(100 + index).integers(0, 10, N_RECORDS, np.uint8)


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set in the binary layout; the folder is the one around it."""
    folder = tmp_path / "root" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    checksums = {}
    for index, name in enumerate(data._BINARY_SHA256):
        records = np.concatenate([batch_labels(index)[:, None], batch_pixels(index)], axis=1)
        (folder / name).write_bytes(records.tobytes())
        checksums[name] = hashlib.sha256(records.tobytes()).hexdigest()
    monkeypatch.setattr(data, "_BINARY_RECORDS", N_RECORDS)
    monkeypatch.setattr(data, "_BINARY_SHA256", checksums)
    return folder.parent


@pytest.fixture
def batches_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same small data set as torchvision stores it; the folder is the one around it."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "root_py" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    contents: dict[str, object] = {
        name: {"data": batch_pixels(index), "labels": batch_labels(index).tolist()} for index, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": list(data.CIFAR10_CLASSES)}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksums = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in contents]
    monkeypatch.setattr(CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", checksums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": checksums[6][1]})
    return folder.parent


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder with three classes; every picture has one colour of its own."""
    folder = tmp_path / "pets"
    for part, n in (("train", 4), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / part / name).mkdir(parents=True)
            for index in range(n):
                Image.new("RGB", (32, 32), (10 * label, index, 200)).save(folder / part / name / f"{index}.png")
    return folder


def test_binary_layout_gives_its_records_in_order(binary: Path) -> None:
    loaded = load_cifar10(binary)
    pixels = np.concatenate([batch_pixels(index) for index in range(5)]).reshape(-1, 3, 32, 32)
    assert torch.equal(loaded.train_images, torch.from_numpy(pixels))
    assert torch.equal(loaded.test_labels, torch.from_numpy(batch_labels(5).astype(np.int64)))
    assert (loaded.name, loaded.classes, loaded.n_classes) == ("CIFAR-10", data.CIFAR10_CLASSES, 10)
    assert not loaded.is_synthetic


def test_torchvision_layout_equals_binary_layout(binary: Path, batches_py: Path) -> None:
    ours, theirs = load_cifar10(binary), load_cifar10(batches_py)
    assert torch.equal(ours.train_images, theirs.train_images) and torch.equal(ours.test_labels, theirs.test_labels)
    assert ours.fingerprint == theirs.fingerprint and ours.classes == theirs.classes


def test_the_real_files_have_the_published_size() -> None:
    assert data._BINARY_RECORDS * data._BINARY_RECORD_BYTES == 30_730_000
    assert data.CIFAR10_ARCHIVE.md5 == "c58f30108f718f92721af3b95e74349a"


def test_real_set_has_its_published_statistics(user_data_root: Path | None) -> None:
    if user_data_root is None:
        pytest.skip("needs CIFAR-10: set CIFAR_FAST_DATA to the folder that holds it")
    layout = data.find_layout(user_data_root)
    assert layout is not None
    real = data._decode(layout)
    assert real.train_labels.bincount().tolist() == [5000] * 10
    assert real.test_labels.bincount().tolist() == [1000] * 10
    mean = real.train_images.sum(dim=(0, 2, 3)) / (255 * 50_000 * 32 * 32)
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
    assert real.fingerprint == "9048fcbac9c08a64"


def test_image_folder_has_its_own_name_and_classes(pictures: Path) -> None:
    (pictures / "train" / "ant" / "notes.txt").write_text("no picture")
    (pictures / "train" / ".hidden").mkdir()
    loaded = load_cifar10(pictures)
    assert (loaded.name, loaded.classes) == ("pets", ("ant", "bee", "cat"))
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loaded.train_images[5, :, 3, 7].tolist() == [10, 1, 200]
    assert loaded.test_images.shape == (6, 3, 32, 32)


def test_grey_and_palette_pictures_become_rgb(pictures: Path) -> None:
    Image.new("L", (32, 32), 77).save(pictures / "train" / "ant" / "0.png")
    Image.new("RGB", (32, 32), (255, 0, 0)).convert("P").save(pictures / "train" / "ant" / "1.png")
    images = load_cifar10(pictures).train_images
    assert images[0, :, 0, 0].tolist() == [77, 77, 77] and images[1, :, 0, 0].tolist() == [255, 0, 0]


def test_argument_goes_before_environment_before_cache(
    binary: Path, pictures: Path, batches_py: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (batches_py / "cifar-10-batches-py").rename(cache / "cifar-10-batches-py")
    assert "torchvision" in load_cifar10(download=False).source
    monkeypatch.setenv("CIFAR_FAST_DATA", str(binary / "cifar-10-batches-bin"))
    assert "binary" in load_cifar10(download=False).source
    assert load_cifar10(pictures, download=False).name == "pets"


# --- the decoded copy ---


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[data.Layout]:
    calls: list[data.Layout] = []
    decode = data._decode
    monkeypatch.setattr(data, "_decode", lambda layout: (calls.append(layout), decode(layout))[1])
    return calls


def same(one: data.Dataset, other: data.Dataset) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    tensors_agree = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return tensors_agree and repr(one) == repr(other)  # repr has all but the tensors


@pytest.mark.parametrize("layout", ["binary", "pictures", "batches_py"])
def test_second_load_reads_the_decoded_copy(
    layout: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(layout)
    calls = count_decoding(monkeypatch)
    first, second = load_cifar10(root), load_cifar10(root)
    assert len(calls) == 1
    assert same(first, second)


def test_the_same_files_by_way_of_a_link_are_decoded_once(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_decoding(monkeypatch)
    (tmp_path / "link").symlink_to(binary)
    assert same(load_cifar10(binary), load_cifar10(tmp_path / "link")) and len(calls) == 1


def test_decoded_copy_is_mapped_not_read(binary: Path, cache: Path) -> None:
    loaded = load_cifar10(binary)
    [decoded] = (cache / "decoded").iterdir()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(decoded) in line]
    assert any(
        int(start, 16) <= loaded.train_images.data_ptr() < int(end, 16)
        for start, end in (line[0].split("-") for line in maps)
    )


def test_writing_to_loaded_images_does_not_change_the_copy(binary: Path) -> None:
    loaded = load_cifar10(binary)
    before = loaded.train_images.clone()
    loaded.train_images.zero_()
    assert torch.equal(load_cifar10(binary).train_images, before)


def test_changed_files_are_decoded_anew_and_the_old_copy_goes(pictures: Path, cache: Path) -> None:
    before = load_cifar10(pictures)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(pictures / "train" / "ant" / "0.png")
    os.utime(pictures / "train" / "ant" / "0.png", ns=(1, 1))
    after = load_cifar10(pictures)
    assert after.train_images[0, :, 0, 0].tolist() == [1, 2, 3]
    assert after.fingerprint != before.fingerprint
    assert len(list((cache / "decoded").iterdir())) == 1


def test_decoded_copy_that_is_cut_short_is_made_again(binary: Path, cache: Path) -> None:
    first = load_cifar10(binary).fingerprint
    [decoded] = (cache / "decoded").iterdir()
    for size in (0, 5, decoded.stat().st_size // 2):
        os.truncate(decoded, size)
        assert load_cifar10(binary).fingerprint == first


def test_cache_folder_that_cannot_be_written_costs_only_a_warning(binary: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="CIFAR_FAST_CACHE"):
        loaded = load_cifar10(binary)
    assert loaded.train_images.shape == (100, 3, 32, 32)


def test_full_disk_costs_only_a_warning_and_leaves_no_half_file(binary: Path, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a file that grows beyond this many bytes fails
    try:
        with pytest.warns(UserWarning, match="CIFAR_FAST_CACHE"):
            loaded = load_cifar10(binary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert loaded.n_classes == 10
    assert list((cache / "decoded").iterdir()) == []


# --- bad data ---


def assert_refused(root: Path, *words: str) -> None:
    """Both loaders raise a DataError with these words and keep no decoded copy."""
    for load in (load_cifar10, load_or_synthetic):
        with pytest.raises(DataError) as caught:
            load(root)
        assert not isinstance(caught.value, DataNotFoundError)
        for word in words:
            assert word in str(caught.value)
    assert not list(data.cache_folder().glob("decoded/*"))


def test_folder_that_is_missing_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no folder", "--data synthetic")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "holds no data set", "the argument")
    monkeypatch.setenv("CIFAR_FAST_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="named by CIFAR_FAST_DATA"):
        load_or_synthetic()


def test_binary_file_that_is_missing(binary: Path) -> None:
    (binary / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    assert_refused(binary, "data_batch_3.bin", "missing")


def test_binary_file_that_is_cut_short(binary: Path) -> None:
    os.truncate(binary / "cifar-10-batches-bin" / "test_batch.bin", 60_000)
    assert_refused(binary, "test_batch.bin", "60,000", "61,460")


def test_binary_file_with_a_label_out_of_range(binary: Path) -> None:
    with (binary / "cifar-10-batches-bin" / "data_batch_2.bin").open("r+b") as file:
        file.seek(7 * 3073)
        file.write(bytes([10]))
    assert_refused(binary, "data_batch_2.bin", "label 10 in record 7")


@settings(max_examples=20)
@given(position=st.integers(0, N_RECORDS * 3073 - 1), flipped_bits=st.integers(1, 255))
def test_any_altered_byte_is_noticed(position: int, flipped_bits: int) -> None:
    content = bytearray(np.concatenate([batch_labels(0)[:, None], batch_pixels(0)], axis=1).tobytes())
    sha256 = hashlib.sha256(content).hexdigest()
    content[position] ^= flipped_bits
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_BINARY_RECORDS", N_RECORDS)
        path = Path(folder) / "data_batch_1.bin"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data_batch_1\.bin"):
            data._decode_binary_file(path, sha256)


def test_torchvision_files_that_are_missing_or_altered(batches_py: Path) -> None:
    (batches_py / "cifar-10-batches-py" / "data_batch_4").unlink()
    with (batches_py / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"more")
    assert_refused(batches_py, "missing or altered: data_batch_4, test_batch.")


def test_torchvision_meta_file_that_is_altered(batches_py: Path) -> None:
    (batches_py / "cifar-10-batches-py" / "batches.meta").write_bytes(b"other")
    assert_refused(batches_py, "missing or altered: batches.meta.")


def test_picture_of_another_size(pictures: Path) -> None:
    Image.new("RGB", (64, 48)).save(pictures / "test" / "bee" / "1.png")
    assert_refused(pictures, str(Path("test", "bee", "1.png")), "64x48", "32x32")


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_picture_that_is_none(pictures: Path, content: bytes) -> None:
    (pictures / "train" / "bee" / "1.png").write_bytes(content)
    assert_refused(pictures, str(Path("train", "bee", "1.png")), "cannot be read as a picture")


def test_picture_that_is_cut_short(pictures: Path) -> None:
    path = pictures / "train" / "cat" / "0.png"
    os.truncate(path, path.stat().st_size - 30)
    assert_refused(pictures, str(path), "cannot be read as a picture")


@pytest.mark.parametrize(("n_classes", "words"), [(1, "1 class folders (ant)"), (0, "0 class folders (none)")])
def test_one_class_or_none(pictures: Path, n_classes: int, words: str) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee", "cat")[n_classes:]:
            shutil.rmtree(pictures / part / name)
    assert_refused(pictures, words, "at least two")


def test_classes_that_differ_between_train_and_test(pictures: Path) -> None:
    (pictures / "test" / "cat").rename(pictures / "test" / "dog")
    assert_refused(pictures, "only one of them has: cat, dog")


def test_part_or_class_without_pictures(pictures: Path) -> None:
    for path in (pictures / "test" / "bee").iterdir():
        path.unlink()
    assert_refused(pictures, str(Path("test", "bee")), "holds no picture")
    (pictures / "test").rename(pictures / "validation")
    assert_refused(pictures, "There is no folder", "test")


# --- download ---


class Clock:
    """A clock that stands still unless a slow server sets its pace, so that no test waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = 0.0  # seconds that pass between two looks at the clock

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
        if behaviour == "cutting":  # ends each connection too early
            handler.wfile.write(rest[: len(rest) // 2 + 1])
        elif behaviour == "broken":  # ends each connection at once
            return
        elif behaviour == "silent":
            handler.wfile.write(rest[:5000])
            handler.wfile.flush()
            self.release.wait(20)
        else:
            handler.wfile.write(rest)


@pytest.fixture
def mirror(batches_py: Path) -> Iterator[Mirror]:
    """A server with the small data set, packed as the official archive is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(batches_py / "cifar-10-batches-py", "cifar-10-batches-py")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                served.respond(self)
            except ConnectionError:  # the client has left, as it should
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


def fetch(mirror: Mirror, *behaviours: str, timeout: float = 20.0) -> data.Layout:
    """Download from sources that behave so: the official host, then a --mirror, then built-in mirrors."""
    official, *rest = [mirror(behaviour) for behaviour in behaviours]
    archive = data._Archive(
        filename="archive.tar.gz",
        size=len(mirror.body),
        md5=hashlib.md5(mirror.body).hexdigest(),
        folder="cifar-10-batches-py",
        official=official,
        mirrors=tuple(rest[1:]),
    )
    patience = data._Patience(timeout=timeout, window=5.0, minimum_rate=2000.0, clock=mirror.clock)
    return data.download_and_unpack(archive, rest[:1], progress=False, patience=patience)


def kept_part(cache: Path) -> Path:
    return cache / "archive.tar.gz.part"


def assert_only_kept(cache: Path, *names: str) -> None:
    """The cache folder holds these files and nothing that looks like a data set."""
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == sorted(names)
    assert data.find_layout(cache) is None


def test_download_unpacks_a_set_that_loads(mirror: Mirror, binary: Path, cache: Path) -> None:
    layout = fetch(mirror, "good")
    assert layout.folder == cache / "cifar-10-batches-py"
    assert load_cifar10(download=False).fingerprint == load_cifar10(binary).fingerprint
    assert not list(cache.glob("archive.tar.gz*[!k]"))  # the lock alone stays


def test_set_that_is_there_is_not_downloaded_again(mirror: Mirror) -> None:
    fetch(mirror, "good")
    fetch(mirror, "good")
    assert mirror.behaviours() == ["good"]


@pytest.mark.parametrize("bad", ["missing", "portal", "slow", "wrong", "broken"])
def test_bad_source_is_left_for_the_next(mirror: Mirror, cache: Path, bad: str) -> None:
    fetch(mirror, bad, "good")
    assert set(mirror.behaviours()) == {bad, "good"}
    assert load_cifar10(download=False).n_classes == 10


def test_source_that_falls_silent_is_left_for_the_next(mirror: Mirror) -> None:
    fetch(mirror, "silent", "good", timeout=2.0)
    assert mirror.requests == [("silent", None), ("good", "bytes=5000-")]


def test_dead_host_is_left_for_the_next(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"nonsense {mirror('good')}")
    archive = replace(data.CIFAR10_ARCHIVE, size=len(mirror.body), md5=hashlib.md5(mirror.body).hexdigest())
    monkeypatch.setattr(data, "CIFAR10_ARCHIVE", archive)
    assert data.download(progress=False).name == "cifar-10-batches-py"


def test_sources_are_tried_in_the_promised_order(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_MIRROR", f"{mirror('wrong')} {mirror('portal')}")
    with pytest.raises(DataNotFoundError):
        fetch(mirror, "missing", "broken", "other_size")
    assert list(dict.fromkeys(mirror.behaviours())) == ["missing", "broken", "wrong", "portal", "other_size"]


def test_next_source_goes_on_where_the_slow_one_was_left(mirror: Mirror) -> None:
    fetch(mirror, "slow", "good")
    [(_, none), (_, wanted)] = mirror.requests
    assert none is None
    assert wanted is not None and int(wanted.removeprefix("bytes=").rstrip("-")) > 0


def test_cut_connection_is_resumed_at_the_same_source(mirror: Mirror) -> None:
    kept_bytes = len(mirror.body) - 20  # so few are left that halving them ends before patience does
    data.cache_folder().mkdir()
    kept_part(data.cache_folder()).write_bytes(mirror.body[:kept_bytes])
    fetch(mirror, "cutting")
    begins = [int(wanted.removeprefix("bytes=").rstrip("-")) for _, wanted in mirror.requests if wanted]
    assert begins[0] == kept_bytes
    assert begins == sorted(set(begins)) and len(begins) > 2


def test_source_without_ranges_starts_over(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:1234])
    fetch(mirror, "no_range")
    assert mirror.requests == [("no_range", "bytes=1234-")]


def test_source_that_does_not_tell_the_length(mirror: Mirror) -> None:
    fetch(mirror, "no_length")
    assert load_cifar10(download=False).n_classes == 10


def test_source_that_sends_another_range_is_left(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    kept_part(cache).write_bytes(mirror.body[:1234])
    fetch(mirror, "other_range", "good")
    assert mirror.requests == [("other_range", "bytes=1234-"), ("good", "bytes=1234-")]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the server keeps no state
@given(drawn=st.data())
def test_whatever_was_kept_the_download_ends_well(mirror: Mirror, drawn: st.DataObject) -> None:
    size = len(mirror.body)
    right = st.integers(0, size).map(lambda length: mirror.body[:length])
    wrong = st.tuples(st.binary(max_size=50), st.integers(0, size + 100)).map(lambda pair: pair[0] + bytes(pair[1]))
    kept = drawn.draw(right | wrong)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FAST_CACHE", folder)
        kept_part(Path(folder)).write_bytes(kept)
        layout = fetch(mirror, drawn.draw(st.sampled_from(["good", "no_range", "no_length"])))
        assert data._decode(layout).n_classes == 10


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
    for advice in ("CIFAR_FAST_DATA", "--mirror URL", "--data synthetic", "goes on from there"):
        assert advice in message
    assert_only_kept(cache, "archive.tar.gz.part")


@pytest.mark.parametrize("bad", ["missing", "portal", "wrong", "broken"])
def test_nothing_but_right_bytes_are_kept_after_a_failure(mirror: Mirror, cache: Path, bad: str) -> None:
    with pytest.raises(DataNotFoundError):
        fetch(mirror, bad)
    assert_only_kept(cache, *(["archive.tar.gz.part"] if bad == "broken" else []))
    assert data._size(kept_part(cache)) == 0


def test_interrupted_download_is_resumed_by_the_next(mirror: Mirror, cache: Path) -> None:
    ticks = iter([0.0, 0.0])

    def interrupt() -> float:
        try:
            return next(ticks)
        except StopIteration:
            raise KeyboardInterrupt from None

    patience = data._Patience(clock=interrupt)
    archive = replace(data.CIFAR10_ARCHIVE, size=len(mirror.body), official=mirror("good"), filename="archive.tar.gz")
    with pytest.raises(KeyboardInterrupt):
        data.download_and_unpack(archive, [], progress=False, patience=patience)
    assert_only_kept(cache, "archive.tar.gz.part")
    n_kept = data._size(kept_part(cache))
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
    assert data.find_layout(cache) is not None


def test_archive_cannot_write_outside_its_folder(mirror: Mirror, cache: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    mirror.body = buffer.getvalue()
    with pytest.raises(tarfile.FilterError):
        fetch(mirror, "good")
    assert_only_kept(cache, "archive.tar.gz")
    assert not (cache.parent / "escaped").exists()


def test_full_disk_is_said_and_not_taken_for_a_dead_source(mirror: Mirror, cache: Path) -> None:
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


def test_cache_folder_that_cannot_be_written_is_said(mirror: Mirror, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="CIFAR_FAST_CACHE") as caught:
        fetch(mirror, "good")
    assert not isinstance(caught.value, DataNotFoundError)
    assert mirror.requests == []


# --- the fall back and the state ---


def test_fall_back_is_loud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = synthetic(20, 10)
    monkeypatch.setattr(data, "synthetic", lambda: small)
    assert load_or_synthetic() is small
    banner = capsys.readouterr().err
    assert "NO REAL DATA" in banner and "data set: synthetic" in banner
    assert "127.0.0.1:9" in banner and "--data synthetic" in banner


def test_fall_back_without_download(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = synthetic(20, 10)
    monkeypatch.setattr(data, "synthetic", lambda: small)
    assert load_or_synthetic(download=False) is small
    assert "switched off" in capsys.readouterr().err


def test_status_tells_each_place(binary: Path, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_DATA", str(binary))
    decoded = load_cifar10(binary)
    (pictures / "test" / "cat" / "0.png").write_bytes(b"")
    argument, environment, own = data.status(pictures)
    assert (argument.origin, environment.origin, own.origin) == ("the argument", "CIFAR_FAST_DATA", "the cache folder")
    assert (argument.usable, environment.usable, own.usable) == (False, True, False)
    assert "0.png" in argument.finding and argument.decoded is None
    assert decoded.fingerprint in environment.finding and "100 training" in environment.finding
    assert environment.decoded is not None and environment.decoded.exists()
    assert "holds no data set" in own.finding
    (cache / f"{data.CIFAR10_ARCHIVE.filename}.part").write_bytes(bytes(1_500_000))
    assert "1.5 MB of an interrupted download" in data.status()[-1].finding


def test_status_notices_damage_that_the_decoded_copy_hides(binary: Path) -> None:
    load_cifar10(binary)
    path = binary / "cifar-10-batches-bin" / "data_batch_1.bin"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    [place, _] = data.status(binary)
    assert not place.usable and "data_batch_1.bin" in place.finding


# --- the synthetic set ---


@pytest.fixture
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_synthetic_set_has_the_shape_of_a_data_set() -> None:
    drawn = synthetic(600, 50)
    assert drawn.is_synthetic and drawn.n_classes == 10
    assert drawn.train_images.shape == (600, 3, 32, 32) and drawn.train_images.dtype == torch.uint8
    assert drawn.test_labels.shape == (50,) and drawn.test_labels.dtype == torch.int64
    assert drawn.train_labels.bincount().tolist() == [60] * 10


def test_synthetic_set_depends_on_its_seed_alone() -> None:
    n_threads = torch.get_num_threads()
    first = synthetic(520, 20, seed=3)
    torch.set_num_threads(2 if n_threads == 1 else 1)
    torch.rand(7)  # moves the global generator, which must not matter
    again, other = synthetic(520, 20, seed=3), synthetic(520, 20, seed=4)
    torch.set_num_threads(n_threads)
    assert same(first, again)
    assert first.fingerprint != other.fingerprint


def test_synthetic_test_images_are_other_draws_of_the_same_distribution(one_thread: None) -> None:
    drawn = synthetic(1000, 1000)
    assert not torch.equal(drawn.train_images, drawn.test_images)
    train, test = (images.float().mean(dim=(0, 2, 3)) for images in (drawn.train_images, drawn.test_images))
    assert torch.allclose(train, test, atol=4.0)


def test_colour_says_nothing_about_the_class(one_thread: None) -> None:
    drawn = synthetic(2000, 1)
    means = drawn.train_images.float().mean(dim=(2, 3))  # (N, 3)
    of_class = torch.stack([means[drawn.train_labels == label].mean(0) for label in range(10)])
    assert (of_class - means.mean(0)).abs().max() < 0.35 * means.std(0).min()


@pytest.mark.parametrize("sizes", [(0, 10), (10, 0), (-1, 10)])
def test_synthetic_set_needs_images(sizes: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"n_train={sizes[0]} and n_test={sizes[1]}"):
        synthetic(*sizes)


def test_linear_model_fails_on_the_synthetic_set(one_thread: None) -> None:
    drawn = synthetic(2000, 1000)
    train, test = (images.flatten(1).float() / 255 - 0.5 for images in (drawn.train_images, drawn.test_images))
    targets = F.one_hot(drawn.train_labels).float() - 0.1
    kernel = train @ train.T
    for ridge in (10.0, 1000.0):
        weights = train.T @ torch.linalg.solve(kernel + ridge * torch.eye(len(train)), targets)  # (3072, 10)
        assert accuracy(test @ weights, drawn.test_labels) < 0.25


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def test_small_network_learns_the_synthetic_set(one_thread: None) -> None:
    drawn = synthetic(4000, 1000)
    train, test = (
        (images.float() / 64 - 2).contiguous(memory_format=torch.channels_last)
        for images in (drawn.train_images, drawn.test_images)
    )
    torch.manual_seed(0)

    def block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    network = nn.Sequential(
        *(block(3, 16, 2), block(16, 32), nn.MaxPool2d(2), block(32, 64), nn.MaxPool2d(2), block(64, 64)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ).to(memory_format=torch.channels_last)
    n_epochs, batch_size = 6, 50
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    n_steps = n_epochs * len(train) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=n_steps)
    for _ in range(n_epochs):
        for batch in torch.randperm(len(train)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(train[batch]), drawn.train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        assert accuracy(network(test), drawn.test_labels) > 0.6
