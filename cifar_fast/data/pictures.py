"""Reads picture files of any size and mode as the networks take them: upright, square, 8-bit RGB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cifar_fast.data.dataset import IMAGE_SIZE
from cifar_fast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "alpha",
    "CMYK": "CMYK",
    "I": "16-bit grey",
}
"""Names for people; the modes of 16-bit grey that tell the order of bytes begin with "I;16"."""


@dataclass
class Conversions:
    """What `read_picture` had to change, over many pictures."""

    n_pictures: int = 0
    """All pictures that were read."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each picture that was resized."""
    modes: Counter[str] = field(default_factory=Counter)
    """How many pictures had each mode other than RGB, by its name for people."""

    def in_words(self, image_size: int) -> str:
        """Say with counts what was changed; empty if nothing was."""
        said = []
        if self.sizes:
            smallest, largest = (f"{width}x{height}" for width, height in (min(self.sizes), max(self.sizes)))
            sizes = smallest if smallest == largest else f"{smallest} ... {largest}"
            said.append(
                f"the centre squares of {len(self.sizes):,} of {self.n_pictures:,} pictures ({sizes} pixels) are "
                f"resized to {image_size}x{image_size}"
            )
        if self.modes:
            counts = ", ".join(f"{count:,} {mode}" for mode, count in self.modes.most_common())
            said.append(f"converted to 8-bit RGB: {counts}")
        return "; ".join(said)


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Return the picture files among `paths`: a file as it is, a folder with all pictures in it and below it.

    Files and folders whose names begin with a dot are left out of a folder, and so are files without the suffix of a
    picture. The pictures of a folder come in the order of their paths.

    Raises `DataError` if a folder holds no picture.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(file for file in path.rglob("*") if is_picture(file) and not _is_hidden(file, path))
        if not below:
            raise DataError(f"{path} holds no picture ({', '.join(suffix[1:] for suffix in SUFFIXES)}).")
        found += below
    return found


def is_picture(path: Path) -> bool:
    """Say whether a file has the suffix of a picture and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_picture(path: Path, image_size: int = IMAGE_SIZE, conversions: Conversions | None = None) -> Tensor:
    """Return a picture file upright, as 8-bit RGB on white, its centre square resized to `image_size` pixels.

    Args:
        path: a picture in any format that Pillow reads, of any size. Of an animation the first frame counts.
        image_size: side of the result in pixels. A square picture of that size keeps its pixels.
        conversions: where to count what had to be changed.

    Returns:
        uint8 (3, image_size, image_size).

    Raises:
        DataError: the file is not there, is not a picture, or has pixel values without a known scale.
    """
    from PIL import Image, ImageOps  # here, because only pictures need it

    try:
        with Image.open(path) as opened:
            mode, upright = opened.mode, ImageOps.exif_transpose(opened)
            picture = _as_rgb(upright)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}). Replace or remove it.") from error
    # Lanczos widens its filter with the scale, so that no part of a large picture is skipped.
    square = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
    if conversions is not None:
        conversions.n_pictures += 1
        if picture.size != square.size:
            conversions.sizes.append(picture.size)
        if mode != "RGB":
            conversions.modes[MODES["I"] if mode.startswith("I") else MODES.get(mode, mode)] += 1
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _as_rgb(picture: Picture) -> Picture:
    """Return a picture as 8-bit RGB; what is transparent becomes white, as on paper."""
    from PIL import Image

    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError(f"its values go from {values.min()} to {values.max()}, and 16 bits hold 0 to 65535")
        # Pillow cuts off at 255. The upper byte gives the 8-bit picture back, whether its values had been multiplied
        # by 257 or by 256; Pillow takes it from 16-bit colours, too.
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and nothing says which of them is white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
