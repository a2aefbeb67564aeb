"""Each layout is decoded as it was stored, and refused with a reason when anything in it is wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import N_RECORDS, batch_labels, batch_pixels, batch_records, fine_labels, fine_records

from cifar_fast.data import layouts
from cifar_fast.data.dataset import CIFAR10_CLASSES, CIFAR100_CLASSES, Dataset
from cifar_fast.data.layouts import BinaryFile, Layout, decode, file_states, find_layout
from cifar_fast.errors import DataError


def read(root: Path) -> Dataset:
    layout = find_layout(root)
    assert layout is not None
    return decode(layout)


def test_binary_layout_gives_its_records_in_order(binary: Path) -> None:
    loaded = read(binary)
    pixels = np.concatenate([batch_pixels(index) for index in range(5)]).reshape(-1, 3, 32, 32)
    assert torch.equal(loaded.train_images, torch.from_numpy(pixels))
    assert torch.equal(loaded.test_labels, torch.from_numpy(batch_labels(5).astype(np.int64)))
    assert (loaded.name, loaded.classes, loaded.n_classes) == ("CIFAR-10", CIFAR10_CLASSES, 10)


def test_torchvision_layout_equals_binary_layout(binary: Path, torchvision_set: Path) -> None:
    ours, theirs = read(binary), read(torchvision_set)
    assert torch.equal(ours.train_images, theirs.train_images) and torch.equal(ours.test_labels, theirs.test_labels)
    assert ours.fingerprint == theirs.fingerprint and ours.classes == theirs.classes


def test_binary_layout_of_cifar100_gives_its_fine_classes(binary100: Path, torchvision100: Path) -> None:
    loaded = read(binary100)
    assert (loaded.name, loaded.n_classes, loaded.classes[:2]) == ("CIFAR-100", 100, ("apple", "aquarium_fish"))
    records = np.frombuffer(fine_records(0), np.uint8).reshape(-1, 3074)
    assert torch.equal(loaded.train_images, torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32).copy()))
    assert loaded.train_labels.tolist() == fine_labels(0).tolist()
    assert loaded.test_labels.tolist() == fine_labels(1).tolist()
    theirs = read(torchvision100)
    assert theirs.fingerprint == loaded.fingerprint and theirs.classes == loaded.classes == CIFAR100_CLASSES


def test_one_folder_may_hold_several_data_sets(binary: Path, binary100: Path) -> None:
    (binary100 / "cifar-100-binary").rename(binary / "cifar-100-binary")
    (binary / "train").mkdir()
    first, second = find_layout(binary), find_layout(binary, "CIFAR-100")
    assert first is not None and first.data_set == "CIFAR-10"
    assert second is not None and second.data_set == "CIFAR-100"
    shutil.rmtree(binary / "cifar-100-binary")
    third = find_layout(binary, "CIFAR-100")
    assert third is not None and third.kind == "image folder"
    assert find_layout(binary, "CIFAR-100", pictures=False) is None


def test_real_files_have_the_published_size() -> None:
    sizes = [
        (file.n_records * (each.n_labels + 3 * 32 * 32))
        for each in (layouts.CIFAR10, layouts.CIFAR100)
        for file in each.binary_files.values()
    ]
    assert sizes == [30_730_000] * 6 + [153_700_000, 30_740_000]


def test_real_set_has_its_published_statistics(user_data_root: Path | None) -> None:
    if user_data_root is None:
        pytest.skip("needs CIFAR-10: set CIFAR_FAST_DATA to the folder that holds it")
    real = read(user_data_root)
    assert real.train_labels.bincount().tolist() == [5000] * 10
    assert real.test_labels.bincount().tolist() == [1000] * 10
    mean = real.train_images.sum(dim=(0, 2, 3)) / (255 * 50_000 * 32 * 32)
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
    assert real.fingerprint == "9048fcbac9c08a64"


def test_image_folder_has_its_own_name_and_classes(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image_folder / "train" / "ant" / "notes.txt").write_text("no picture")
    (image_folder / "train" / ".hidden").mkdir()
    loaded = read(image_folder)
    assert (loaded.name, loaded.classes) == ("pets", ("ant", "bee", "cat"))
    assert loaded.train_labels.bincount().tolist() == [4] * 3
    # Red says the class, green the number of the picture.
    assert loaded.train_images[:, 0, 3, 7].tolist() == [10 * label for label in loaded.train_labels.tolist()]
    assert sorted(loaded.train_images[loaded.train_labels == 1, 1, 0, 0].tolist()) == [0, 1, 2, 3]
    assert loaded.test_images.shape == (6, 3, 32, 32)
    assert capsys.readouterr().err == ""  # nothing was changed, so there is nothing to say


def test_image_folder_is_shuffled_always_alike(image_folder: Path) -> None:
    for name in ("ant", "bee", "cat"):
        for index in range(4, 100):
            Image.new("RGB", (32, 32), (0, index, 200)).save(image_folder / "train" / name / f"{index}.png")
    first, again = read(image_folder), read(image_folder)
    assert torch.equal(first.train_labels, again.train_labels) and first.fingerprint == again.fingerprint
    counts = first.train_labels[:60].bincount(minlength=3)  # class by class, all of these would be ants
    assert counts.min() >= 10


def test_pictures_of_any_size_and_mode_are_resized_and_counted(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 48), (1, 2, 3)).save(image_folder / "test" / "bee" / "1.png")
    Image.new("RGB", (640, 480), (1, 2, 3)).save(image_folder / "train" / "bee" / "1.jpg")
    Image.new("L", (32, 32), 77).save(image_folder / "train" / "ant" / "0.png")
    loaded = read(image_folder)
    assert loaded.image_size == 32 and "image_size" not in loaded.describe()
    said = capsys.readouterr().err
    assert said.count("pets:") == 1
    assert "the centre squares of 2 of 19 pictures (64x48 ... 640x480 pixels) are resized to 32x32" in said
    assert "converted to 8-bit RGB: 1 grey" in said
    layout = find_layout(image_folder)
    assert layout is not None
    larger = decode(layout, 48)
    assert larger.train_images.shape == (13, 3, 48, 48) and larger.describe()["image_size"] == 48
    assert "of 19 pictures (32x32 ... 640x480 pixels) are resized to 48x48" in capsys.readouterr().err


@pytest.mark.parametrize("image_size", [0, 31, 257])
def test_image_size_out_of_range(image_folder: Path, image_size: int) -> None:
    layout = find_layout(image_folder)
    assert layout is not None
    with pytest.raises(DataError, match=f"image_size={image_size} must be from 32 to 256"):
        decode(layout, image_size)


def test_official_images_are_never_resized(binary: Path) -> None:
    layout = find_layout(binary)
    assert layout is not None
    with pytest.raises(DataError, match="CIFAR-10 have 32 pixels; image_size=64"):
        decode(layout, 64)


# --- damaged data ---


def assert_refused(root: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(root)
    for word in words:
        assert word in str(caught.value)


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
    content = bytearray(batch_records(0))
    sha256 = hashlib.sha256(content).hexdigest()
    content[position] ^= flipped_bits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data_batch_1.bin"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data_batch_1\.bin"):
            layouts._decode_binary_file(path, BinaryFile(N_RECORDS, sha256), layouts.CIFAR10)


def test_torchvision_files_that_are_missing_or_altered(torchvision_set: Path) -> None:
    (torchvision_set / "cifar-10-batches-py" / "data_batch_4").unlink()
    with (torchvision_set / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"more")
    (torchvision_set / "cifar-10-batches-py" / "batches.meta").write_bytes(b"other")
    assert_refused(torchvision_set, "missing or altered: data_batch_4, test_batch, batches.meta.")


@pytest.mark.parametrize(("position", "value"), [(0, 3), (1, 5), (1, 100), (0, 20)])
def test_wrong_labels_of_cifar100_are_noticed(binary100: Path, position: int, value: int) -> None:
    """Its binary files have no published checksum: classes and superclasses have to fit each other."""
    path = binary100 / "cifar-100-binary" / "test.bin"
    content = bytearray(path.read_bytes())
    if content[position] == value:
        value += 1
    content[position] = value
    path.write_bytes(content)
    assert_refused(binary100, "test.bin", "superclasses do not fit" if value < 100 else "labels 0 to 99")


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_file_that_is_no_picture(image_folder: Path, content: bytes) -> None:
    (image_folder / "train" / "bee" / "1.png").write_bytes(content)
    assert_refused(image_folder, str(Path("train", "bee", "1.png")), "cannot be read as a picture")


def test_picture_that_is_cut_short(image_folder: Path) -> None:
    path = image_folder / "train" / "cat" / "0.png"
    os.truncate(path, path.stat().st_size - 30)
    assert_refused(image_folder, str(path), "cannot be read as a picture")


@pytest.mark.parametrize(("n_classes", "words"), [(1, "1 class folders (ant)"), (0, "0 class folders (none)")])
def test_one_class_or_none(image_folder: Path, n_classes: int, words: str) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee", "cat")[n_classes:]:
            shutil.rmtree(image_folder / part / name)
    assert_refused(image_folder, words, "at least two")


def test_classes_that_differ_between_train_and_test(image_folder: Path) -> None:
    (image_folder / "test" / "cat").rename(image_folder / "test" / "dog")
    assert_refused(image_folder, "only one of them has: cat, dog")


def test_part_or_class_without_pictures(image_folder: Path) -> None:
    for path in (image_folder / "test" / "bee").iterdir():
        path.unlink()
    assert_refused(image_folder, str(Path("test", "bee")), "holds no picture")
    (image_folder / "test").rename(image_folder / "validation")
    assert_refused(image_folder, "There is no folder", "test")


def test_folder_that_is_gone_before_its_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*gone: .*Check the folder"):
        file_states(Layout("binary", tmp_path / "gone"))
