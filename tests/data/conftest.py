"""One small data set in each layout, an empty cache folder, and no way to the network."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from small_sets import N_RECORDS, batch_labels, batch_pixels, batch_records

from cifar_fast.data import download, layouts
from cifar_fast.data.dataset import CIFAR10_CLASSES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet; the official archive has no source but those that a test gives it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    nowhere = replace(download.CIFAR10_ARCHIVE, official="http://127.0.0.1:9/official.tar.gz", mirrors=())
    monkeypatch.setattr(download, "CIFAR10_ARCHIVE", nowhere)
    return folder


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set in the binary layout; the folder is the one around it."""
    folder = tmp_path / "root" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    checksums = {}
    for index, name in enumerate(layouts._BINARY_SHA256):
        (folder / name).write_bytes(batch_records(index))
        checksums[name] = hashlib.sha256(batch_records(index)).hexdigest()
    monkeypatch.setattr(layouts, "_BINARY_RECORDS", N_RECORDS)
    monkeypatch.setattr(layouts, "_BINARY_SHA256", checksums)
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
