"""A picture comes out upright, square and in 8-bit RGB, whatever its mode, and its size only changes its scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_fast.data.pictures import Conversions, find_pictures, read_picture
from cifar_fast.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (32, 32), np.uint8)
GREY[0] = 0, *[255] * 31  # so that a wrong scale shows
PALETTE = np.array([[255, 0, 0], [0, 10, 250], [7, 7, 7], [0, 0, 0]], np.uint8)


def as_read(path: Path, image_size: int = 32) -> np.ndarray:
    picture = read_picture(path, image_size)
    assert picture.dtype == torch.uint8 and picture.shape == (3, image_size, image_size)
    return picture.permute(1, 2, 0).numpy()


def in_three_channels(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def rgb(path: Path) -> np.ndarray:
    Image.fromarray(COLOURS).save(path)
    return COLOURS


def grey(path: Path) -> np.ndarray:
    Image.fromarray(GREY).save(path)
    return in_three_channels(GREY)


def grey_16_bits(path: Path) -> np.ndarray:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    return in_three_channels(GREY)


def grey_16_bits_shifted(path: Path) -> np.ndarray:
    Image.fromarray(GREY.astype(np.uint16) * 256).save(path)
    return in_three_channels(GREY)


def grey_16_bits_big_endian(path: Path) -> np.ndarray:
    Image.frombytes("I;16B", (32, 32), (GREY.astype(">u2") * 257).astype(">u2").tobytes()).save(path, format="tiff")
    return in_three_channels(GREY)


def grey_32_bits(path: Path) -> np.ndarray:
    Image.fromarray(GREY.astype(np.int32) * 257).save(path, format="tiff")
    return in_three_channels(GREY)


def grey_with_alpha(path: Path) -> np.ndarray:
    alpha = np.full_like(GREY, 255)
    alpha[:4] = 0
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]).save(path)
    return in_three_channels(np.where(alpha > 0, GREY, 255))


def black_and_white(path: Path) -> np.ndarray:
    Image.fromarray(GREY > 127).save(path)
    return in_three_channels(np.where(GREY > 127, 255, 0).astype(np.uint8))


def palette(path: Path) -> np.ndarray:
    indices = GREY % 4
    picture = Image.fromarray(indices, "P")
    picture.putpalette(PALETTE.flatten().tolist())
    picture.save(path)
    return PALETTE[indices]


def palette_with_transparency(path: Path) -> np.ndarray:
    indices = GREY % 4
    picture = Image.fromarray(indices, "P")
    picture.putpalette(PALETTE.flatten().tolist())
    picture.save(path, transparency=3)
    return np.where((indices == 3)[:, :, None], 255, PALETTE[indices]).astype(np.uint8)


def colours_with_one_transparent(path: Path) -> np.ndarray:
    pixels = COLOURS.copy()
    pixels[:4] = 1, 2, 3
    Image.fromarray(pixels).save(path, transparency=(1, 2, 3))
    pixels[:4] = 255
    return pixels


def alpha(path: Path) -> np.ndarray:
    opacity, hidden = np.full((32, 32, 1), 255, np.uint8), COLOURS.copy()
    opacity[:4], hidden[:4] = 0, 77
    Image.fromarray(np.concatenate([hidden, opacity], axis=2), "RGBA").save(path)
    return np.where(opacity > 0, COLOURS, 255).astype(np.uint8)


def cmyk(path: Path) -> np.ndarray:
    Image.merge("CMYK", [*map(Image.fromarray, 255 - COLOURS.transpose(2, 0, 1)), Image.new("L", (32, 32), 0)]).save(
        path, format="tiff"
    )
    return COLOURS


def turned(path: Path) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees to the left; a viewer turns it back
    Image.fromarray(np.rot90(COLOURS)).save(path, exif=exif)
    return COLOURS


def turned_16_bits(path: Path) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(GREY).astype(np.uint16) * 257).save(path, exif=exif)
    return in_three_channels(GREY)


@pytest.mark.parametrize(
    "save",
    [
        rgb, grey, grey_16_bits, grey_16_bits_shifted, grey_16_bits_big_endian, grey_32_bits, grey_with_alpha,
        black_and_white, palette, palette_with_transparency, colours_with_one_transparent, alpha, cmyk, turned,
        turned_16_bits,
    ],
)  # fmt: skip
def test_every_mode_gives_the_same_picture_in_8_bits(tmp_path: Path, save: Callable[[Path], np.ndarray]) -> None:
    path = tmp_path / "picture.png"
    expected = save(path)
    assert np.array_equal(as_read(path), expected)


def test_16_bits_keep_their_brightness_when_resized(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 65_536, (100, 80), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / "shallow.png")
    deep, shallow = as_read(tmp_path / "deep.png"), as_read(tmp_path / "shallow.png")
    assert np.array_equal(deep, shallow) and 120 < deep.mean() < 134


def test_centre_square_is_taken_and_no_pixel_skipped(tmp_path: Path) -> None:
    wide = np.zeros((320, 1000, 3), np.uint8)
    wide[:, 340:660] = 255 * (np.arange(320) % 2)[:, None, None]  # stripes a pixel wide: only averaging makes them grey
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for image_size in (32, 48):
        picture = as_read(tmp_path / "wide.png", image_size).astype(int)
        assert abs(picture[:, 1:-1] - 127).max() <= 15 and picture.shape == (image_size, image_size, 3)


def test_conversions_are_counted(tmp_path: Path) -> None:
    conversions = Conversions()
    for index, save in enumerate((rgb, grey_16_bits, grey_16_bits_big_endian, palette)):
        save(tmp_path / f"{index}.png")
        read_picture(tmp_path / f"{index}.png", 32, conversions)
    assert conversions.in_words(32) == "converted to 8-bit RGB: 2 16-bit grey, 1 palette"
    read_picture(tmp_path / "0.png", 64, conversions)
    assert conversions.in_words(64).startswith("the centre squares of 1 of 5 pictures (32x32 pixels) are resized to")
    assert Conversions(n_pictures=5).in_words(32) == ""


@pytest.mark.parametrize("values", [np.full((4, 4), 70_000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_values_without_a_known_scale_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(DataError, match=r"odd\.tiff cannot be read as a picture \(its "):
        read_picture(tmp_path / "odd.tiff")


def test_a_folder_gives_its_pictures_and_only_these(tmp_path: Path) -> None:
    names = ("b.png", "a.JPG", "sub/c.gif", "notes.txt", ".hidden.png", ".cache/d.png")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found = find_pictures([tmp_path / "in", tmp_path / "in" / "notes.txt"])  # a file is taken at its word
    assert [str(path.relative_to(tmp_path / "in")) for path in found] == ["a.JPG", "b.png", "sub/c.gif", "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no picture"):
        find_pictures([tmp_path / "empty"])
