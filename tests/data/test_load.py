"""Data is looked for in the promised order and decoded once; only missing data is replaced, and loudly."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_sets import same

from cifar_fast.data import download, load
from cifar_fast.data.layouts import Layout
from cifar_fast.data.load import load_cifar10, load_cifar100, load_named, load_or_synthetic, status
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import DataError, DataNotFoundError


def test_argument_comes_before_environment_before_cache(
    binary: Path, image_folder: Path, torchvision_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (torchvision_set / "cifar-10-batches-py").rename(cache / "cifar-10-batches-py")
    assert "torchvision" in load_cifar10(download=False).source
    monkeypatch.setenv("CIFAR_FAST_DATA", str(binary / "cifar-10-batches-bin"))
    assert "binary" in load_cifar10(download=False).source
    assert load_cifar10(image_folder, download=False).name == "pets"


def test_folder_that_is_missing_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no folder .*nowhere.* the argument.* --data synthetic"):
        load_cifar10(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no data set.* the argument"):
        load_cifar10(tmp_path / "empty")
    monkeypatch.setenv("CIFAR_FAST_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="named by CIFAR_FAST_DATA"):
        load_cifar10()


@pytest.mark.parametrize("layout", ["binary", "image_folder", "torchvision_set"])
def test_damaged_data_is_refused_not_replaced(layout: str, request: pytest.FixtureRequest, cache: Path) -> None:
    root = request.getfixturevalue(layout)
    for path in root.glob("**/*0.png" if layout == "image_folder" else "**/data_batch_1*"):
        path.write_bytes(b"damaged")
    for load_it in (load_cifar10, load_or_synthetic):
        with pytest.raises(DataError) as caught:
            load_it(root)
        assert not isinstance(caught.value, DataNotFoundError)
    assert not list(cache.glob("decoded/*"))


def test_cifar100_is_found_beside_cifar10(
    binary: Path, torchvision_set: Path, binary100: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_FAST_DATA", str(binary))
    with pytest.raises(DataNotFoundError, match="switched off.*cifar-100-binary"):
        load_cifar100(download=False)
    with pytest.raises(DataNotFoundError, match=r"CIFAR-100 could not be downloaded.*\n.*cifar-100-python\.tar"):
        load_named("cifar100")
    with pytest.raises(DataError, match="nor cifar-100-binary"):
        load_cifar100(binary, download=False)
    cache.mkdir(exist_ok=True)
    (binary100 / "cifar-100-binary").rename(cache / "cifar-100-binary")
    assert load_named("cifar100").name == "CIFAR-100" and load_cifar10(download=False).name == "CIFAR-10"
    monkeypatch.delenv("CIFAR_FAST_DATA")
    with pytest.raises(DataNotFoundError):  # CIFAR-100 in the cache is not what was asked for
        load_cifar10(download=False)
    assert load_cifar10(cache, download=False).name == "CIFAR-100"  # but the folder was
    (torchvision_set / "cifar-10-batches-py").rename(cache / "cifar-10-batches-py")
    assert load_cifar10(download=False).name == "CIFAR-10"


def test_named_data_sets_and_their_sizes(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = synthetic(20, 10)
    monkeypatch.setattr(load, "synthetic", lambda: small)
    assert load_named("synthetic") is small
    assert load_named(str(image_folder), image_size=40).image_size == 40
    for name in ("synthetic", "cifar100"):
        with pytest.raises(DataError, match=f"images of {name} have 32 pixels"):
            load_named(name, image_size=64)


# --- the decoded copy ---


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    calls: list[Layout] = []
    decode = load.decode
    monkeypatch.setattr(load, "decode", lambda layout, size=32: (calls.append(layout), decode(layout, size))[1])
    return calls


@pytest.mark.parametrize("layout", ["binary", "image_folder", "torchvision_set", "binary100"])
def test_second_load_reads_the_decoded_copy(
    layout: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(layout)
    calls = count_decoding(monkeypatch)
    first, second = load_cifar10(root), load_cifar10(root)
    assert len(calls) == 1
    assert same(first, second)


def test_the_same_files_behind_a_link_are_decoded_once(
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


def test_changed_files_are_decoded_again_and_the_old_copy_is_removed(image_folder: Path, cache: Path) -> None:
    before = load_cifar10(image_folder)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image_folder / "train" / "ant" / "0.png")
    os.utime(image_folder / "train" / "ant" / "0.png", ns=(1, 1))
    after = load_cifar10(image_folder)
    assert [1, 2, 3] in after.train_images[:, :, 0, 0].tolist()
    assert after.fingerprint != before.fingerprint
    assert len(list((cache / "decoded").iterdir())) == 1


def test_each_image_size_has_its_decoded_copy(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_decoding(monkeypatch)
    sizes = [load_cifar10(image_folder, image_size=size).image_size for size in (32, 48, 32, 48)]
    assert sizes == [32, 48, 32, 48] and len(calls) == 2


def test_decoded_copy_that_is_cut_short_is_written_again(binary: Path, cache: Path) -> None:
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


# --- real data or synthetic ---


def test_fall_back_is_loud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = synthetic(20, 10)
    monkeypatch.setattr(load, "synthetic", lambda: small)
    assert load_or_synthetic() is small
    banner = capsys.readouterr().err
    assert "NO REAL DATA" in banner and "data set: synthetic" in banner
    assert "127.0.0.1:9" in banner and "--data synthetic" in banner


def test_fall_back_without_download(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = synthetic(20, 10)
    monkeypatch.setattr(load, "synthetic", lambda: small)
    assert load_or_synthetic(download=False) is small
    assert "switched off" in capsys.readouterr().err


# --- what is on this machine ---


def test_status_describes_every_place(
    binary: Path, image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_FAST_DATA", str(binary))
    decoded = load_cifar10(binary)
    (image_folder / "test" / "cat" / "0.png").write_bytes(b"")
    argument, environment, own = status(image_folder)
    assert (argument.origin, environment.origin, own.origin) == ("the argument", "CIFAR_FAST_DATA", "the cache folder")
    assert (argument.usable, environment.usable, own.usable) == (False, True, False)
    assert "0.png" in argument.finding and argument.decoded is None
    assert decoded.fingerprint in environment.finding and "100 training" in environment.finding
    assert environment.decoded is not None and environment.decoded.exists()
    assert "holds no data set" in own.finding
    (cache / f"{download.CIFAR10.official.filename}.part").write_bytes(bytes(1_500_000))
    assert "An interrupted download left 1.5 MB" in status()[-1].finding


def test_status_notices_damage_that_the_decoded_copy_hides(binary: Path) -> None:
    load_cifar10(binary)
    path = binary / "cifar-10-batches-bin" / "data_batch_1.bin"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    [place, _] = status(binary)
    assert not place.usable and "data_batch_1.bin" in place.finding
