"""A data set survives its decoded file, its fingerprint notices any change, and one without variation is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_sets import same
from torch import Tensor

from cifar_fast.data.dataset import Dataset, build_dataset, read_decoded, require_variation, write_decoded
from cifar_fast.errors import DataError


def dataset(train_images: Tensor, train_labels: Tensor | None = None) -> Dataset:
    """A data set with these training images, two classes and one black test image."""
    labels = torch.arange(len(train_images)) % 2 if train_labels is None else train_labels
    test = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    return build_dataset("pets", ["ant", "bee"], (train_images, labels), test, "image folder pets")


def random_images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain(red: int, green: int, blue: int, n: int = 2500) -> Tensor:
    """Images of one colour."""
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, 32, 32)


# --- the decoded file ---


def test_decoded_file_gives_the_data_set_back(tmp_path: Path) -> None:
    data = dataset(random_images(20))
    write_decoded(data, tmp_path / "folder" / "a-1.safetensors")
    mapped = read_decoded(tmp_path / "folder" / "a-1.safetensors")
    assert same(data, mapped)
    assert data.decoded is None and mapped.decoded == tmp_path / "folder" / "a-1.safetensors"
    assert replace(mapped, train_images=random_images(10)).decoded is None  # the file holds other images


def test_decoded_file_replaces_earlier_states_of_the_same_data_only(tmp_path: Path) -> None:
    for name in ("a-1", "b-1", "a-2"):
        write_decoded(dataset(random_images(2)), tmp_path / f"{name}.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.safetensors", "b-1.safetensors"]


def test_fingerprint_changes_with_any_pixel_or_label() -> None:
    images, labels = random_images(20), torch.arange(20) % 2
    other_pixel, other_label = images.clone(), labels.clone()
    other_pixel[-1, 2, 31, 31] ^= 1
    other_label[7] ^= 1
    same_again = dataset(images.clone(), labels.clone()).fingerprint
    assert dataset(images, labels).fingerprint == same_again
    assert len({same_again, dataset(other_pixel, labels).fingerprint, dataset(images, other_label).fingerprint}) == 3


# --- subsets ---


def test_a_subset_keeps_its_images_in_order_and_the_whole_test_set() -> None:
    data = dataset(random_images(20))
    part = data.subset([7, 3, 19])
    assert part.train_labels.tolist() == [1, 1, 1]
    assert torch.equal(part.train_images, data.train_images[[3, 7, 19]])
    assert part.test_images is data.test_images and part.name == data.name
    assert part.source == "image folder pets, 3 of 20 training images"
    selection = part.selection
    assert selection is not None and selection.indices.tolist() == [3, 7, 19]
    described = part.describe()
    assert described["n_train"] == 3
    assert described["subset"] == {"fingerprint": selection.fingerprint, "of": data.fingerprint, "n_full": 20}
    assert "subset" not in data.describe()


def test_equal_subsets_have_equal_fingerprints_however_they_were_made() -> None:
    data = dataset(random_images(20))
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[4, 6, 8]] = True
    ways = [
        data.subset([4, 6, 8]),
        data.subset(torch.tensor([8, 4, 6], dtype=torch.int32)),
        data.subset(mask),
        data.subset(range(0, 20, 2)).subset([2, 3, 4]),  # a subset of a subset
        data.subset(mask).subset(range(3)),
    ]
    first = ways[0].describe()
    for part in ways[1:]:
        assert part.describe() == first and torch.equal(part.train_images, ways[0].train_images)
    others = [data.subset([4, 6, 9]), data.subset([4, 6]), data.subset(range(20)), data]
    assert len({part.fingerprint for part in [*others, ways[0]]}) == 5


def test_a_subset_survives_its_decoded_file(tmp_path: Path) -> None:
    part = dataset(random_images(20)).subset([1, 2, 5])
    write_decoded(part, tmp_path / "a-1.safetensors")
    mapped = read_decoded(tmp_path / "a-1.safetensors")
    assert same(part, mapped) and mapped.describe() == part.describe()
    assert mapped.selection is not None and mapped.selection.indices.tolist() == [1, 2, 5]
    assert mapped.subset([0, 2]).describe() == dataset(random_images(20)).subset([1, 5]).describe()
    assert mapped.subset([0, 2]).decoded is None


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one index"),
        ([[1, 2]], "at least one index, not a tensor of shape .1, 2."),
        ([0, 20], "index 20 of a subset is out of range: the 20 training images are 0 to 19"),
        ([3, -1], "index -1 of a subset is out of range"),
        ([3, 5, 3], "index 3 occurs more than once"),
        ([0.5, 1.0], "whole numbers or a bool mask, not torch.float32"),
        ([True] * 19, "has 19 entries for 20 training images"),
        ([False] * 20, "keeps no training image"),
    ],
)
def test_indices_that_make_no_subset_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(random_images(20)).subset(indices)


# --- variation ---


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 20, 200)])
def test_images_of_a_single_colour_are_refused(colour: tuple[int, int, int]) -> None:
    with pytest.raises(DataError) as caught:
        require_variation(dataset(plain(*colour)))
    message = str(caught.value)
    assert "single colour (red {}, green {}, blue {})".format(*colour) in message
    for words in ("data set pets (image folder pets)", "2,500 training images", "Check how", "another data set"):
        assert words in message


def test_images_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="2,500 training images are all the same picture"):
        require_variation(dataset(random_images(1).repeat(2500, 1, 1, 1)))


@pytest.mark.parametrize("index", [0, 1, 1000, 2499])
def test_a_single_pixel_that_differs_is_variation(index: int) -> None:
    images = plain(10, 20, 200)
    images[index, 2, 31, 31] ^= 1
    require_variation(dataset(images))


def test_ordinary_grey_and_partly_constant_images_pass() -> None:
    images = random_images(100)
    require_variation(dataset(images))
    require_variation(dataset(images[:, :1].repeat(1, 3, 1, 1)))  # greyscale pictures stored as RGB
    images[:, 1] = 7
    require_variation(dataset(images))  # a constant channel
    require_variation(dataset(torch.cat([plain(1, 2, 3, n=50), plain(1, 2, 4, n=50)])))  # plain, but two colours
