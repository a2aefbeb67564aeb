"""One small data set in each layout, an empty cache folder, and no way to the network."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sets import N_RECORDS, batch_labels, batch_pixels, batch_records, fine_labels, fine_records

from cifar_fast.data import download, layouts
from cifar_fast.data.dataset import CIFAR10_CLASSES, CIFAR100_CLASSES
from cifar_fast.data.layouts import BinaryFile


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet; the archives have no source but those that a test gives them."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("CIFAR10", "CIFAR100"):
        known = getattr(download, name)
        nowhere = replace(known.official, urls=(f"http://127.0.0.1:9/{known.official.filename}",))
        monkeypatch.setattr(download, name, replace(known, archives=(nowhere,)))
    return folder


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set in the binary layout; the folder is the one around it."""
    folder = tmp_path / "root" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    files = {}
    for index, name in enumerate(layouts.CIFAR10.binary_files):
        (folder / name).write_bytes(batch_records(index))
        files[name] = BinaryFile(N_RECORDS, hashlib.sha256(batch_records(index)).hexdigest())
    monkeypatch.setattr(layouts, "CIFAR10", replace(layouts.CIFAR10, binary_files=files))
    return folder.parent


@pytest.fixture
def binary100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set in CIFAR-100's binary layout; the folder is the one around it."""
    folder = tmp_path / "root100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    files = {}
    for index, name in enumerate(("train.bin", "test.bin")):
        (folder / name).write_bytes(fine_records(index))
        files[name] = BinaryFile(len(fine_labels(index)), None)
    monkeypatch.setattr(layouts, "CIFAR100", replace(layouts.CIFAR100, binary_files=files))
    return folder.parent


@pytest.fixture
def torchvision100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same small data set as torchvision stores CIFAR-100; the folder is the one around it."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "root100_py" / "cifar-100-python"
    folder.mkdir(parents=True)
    contents: dict[str, object] = {"meta": {"fine_label_names": list(CIFAR100_CLASSES)}}
    for index, name in enumerate(("train", "test")):
        records = np.frombuffer(fine_records(index), np.uint8).reshape(-1, 3074)
        coarse, fine, pixels = records[:, 0].tolist(), records[:, 1].tolist(), records[:, 2:]
        contents[name] = {"data": pixels, "fine_labels": fine, "coarse_labels": coarse}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return folder.parent


@pytest.fixture
def torchvision_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same small data set as torchvision stores it; the folder is the one around it."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "root_py" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    contents: dict[str, object] = {
        name: {"data": batch_pixels(index), "labels": batch_labels(index).tolist()} for index, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": list(CIFAR10_CLASSES)}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksums = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in contents]
    monkeypatch.setattr(CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", checksums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": checksums[6][1]})
    return folder.parent


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Pictures of three classes; each picture has a single colour, different from the others in its part."""
    folder = tmp_path / "pets"
    for part, n in (("train", 4), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / part / name).mkdir(parents=True)
            for index in range(n):
                Image.new("RGB", (32, 32), (10 * label, index, 200)).save(folder / part / name / f"{index}.png")
    return folder
