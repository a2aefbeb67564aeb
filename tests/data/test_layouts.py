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
from small_sets import N_RECORDS, batch_labels, batch_pixels, batch_records

from cifar_fast.data import layouts
from cifar_fast.data.dataset import CIFAR10_CLASSES, Dataset
from cifar_fast.data.layouts import Layout, decode, file_states, find_layout
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


def test_real_files_have_the_published_size() -> None:
    assert layouts._BINARY_RECORDS * layouts._BINARY_RECORD_BYTES == 30_730_000


def test_real_set_has_its_published_statistics(user_data_root: Path | None) -> None:
    if user_data_root is None:
        pytest.skip("needs CIFAR-10: set CIFAR_FAST_DATA to the folder that holds it")
    real = read(user_data_root)
    assert real.train_labels.bincount().tolist() == [5000] * 10
    assert real.test_labels.bincount().tolist() == [1000] * 10
    mean = real.train_images.sum(dim=(0, 2, 3)) / (255 * 50_000 * 32 * 32)
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
    assert real.fingerprint == "9048fcbac9c08a64"


def test_image_folder_has_its_own_name_and_classes(image_folder: Path) -> None:
    (image_folder / "train" / "ant" / "notes.txt").write_text("no picture")
    (image_folder / "train" / ".hidden").mkdir()
    loaded = read(image_folder)
    assert (loaded.name, loaded.classes) == ("pets", ("ant", "bee", "cat"))
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loaded.train_images[5, :, 3, 7].tolist() == [10, 1, 200]
    assert loaded.test_images.shape == (6, 3, 32, 32)


def test_grey_and_palette_pictures_become_rgb(image_folder: Path) -> None:
    Image.new("L", (32, 32), 77).save(image_folder / "train" / "ant" / "0.png")
    Image.new("RGB", (32, 32), (255, 0, 0)).convert("P").save(image_folder / "train" / "ant" / "1.png")
    images = read(image_folder).train_images
    assert images[0, :, 0, 0].tolist() == [77, 77, 77] and images[1, :, 0, 0].tolist() == [255, 0, 0]


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
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_BINARY_RECORDS", N_RECORDS)
        path = Path(folder) / "data_batch_1.bin"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data_batch_1\.bin"):
            layouts._decode_binary_file(path, sha256)


def test_torchvision_files_that_are_missing_or_altered(torchvision_set: Path) -> None:
    (torchvision_set / "cifar-10-batches-py" / "data_batch_4").unlink()
    with (torchvision_set / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"more")
    (torchvision_set / "cifar-10-batches-py" / "batches.meta").write_bytes(b"other")
    assert_refused(torchvision_set, "missing or altered: data_batch_4, test_batch, batches.meta.")


def test_picture_of_another_size(image_folder: Path) -> None:
    Image.new("RGB", (64, 48)).save(image_folder / "test" / "bee" / "1.png")
    assert_refused(image_folder, str(Path("test", "bee", "1.png")), "64x48", "32x32")


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
