"""Opens pictures within limits of their size, and makes squares of one size of them.

The header is checked before anything is decoded. A JPEG is decoded at a fraction of its size. A
JPEG 2000 is not: Pillow's `reduce` fails at many sizes, and shifts pictures of others.
"""

import io
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ito.data.shards import Member
from ito.files import irregular

# Pillow's MAX_IMAGE_PIXELS, above which it warns of decompression bombs; above twice as many it
# opens no picture. What decoding one takes is in docs/data.md.
MAX_PIXELS = 89_478_485
LARGE = 2**24  # pixels; larger pictures are reduced before their colours are converted
# Formats with a signature that Pillow decodes itself. Not EPS, which starts Ghostscript; nor ICO
# and ICNS, which hold pictures of other sizes than their headers say.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
PAD = partial(ImageOps.pad, color="white", centering=(0.4999, 0.4999))  # floor, as open_clip
FITS = {"crop": ImageOps.fit, "pad": PAD, "warp": Image.Image.resize}  # see `ito.config.Config.fit`
TOO_LARGE = "too many pixels"
SCANS = 100  # of a progressive JPEG, which has about 10; each is decoded for all pixels
TILE_WIDTH, TILE_LENGTH, ORIENTATION = 322, 323, 274  # tags of TIFF and EXIF


class Refused(ValueError):
    """Why a picture is not opened or decoded; the message continues "picture NAME …".

    kind: the reason in few words, to count by.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def decode(
    image: Path | Member, size: int, max_pixels: int = MAX_PIXELS, fit: str = "crop", small=None
) -> np.ndarray | str:
    """The picture as a square on white, uint8 (size, size, 3), by one of FITS; or why it cannot be
    read, or has more than `max_pixels`, as `kind: details`. If it had to be enlarged, it is added
    to the list `small`."""
    try:
        with open_picture(image, size) as picture:
            found = square(picture, size, max_pixels, fit)
            if small is not None and (max if fit == "pad" else min)(picture.size) < size:
                small.append(image)
            return found
    except Refused as error:
        return f"{error.kind}: picture {image} {error}"
    except FileNotFoundError:
        return f"no picture: {image}"
    except UnidentifiedImageError:
        return f"not a picture: {image} is of no known format"
    except Image.DecompressionBombError:
        more = f"more than the {2 * MAX_PIXELS} pixels that Pillow opens"
        return f"{TOO_LARGE}: picture {image} has {more}"
    except Exception as error:  # Pillow's plugins raise anything on a damaged file
        return f"unreadable picture: {image}: {type(error).__name__}: {error}"


class Decoder:
    """From places of pictures to uint8 (n, 3, S, S), of the n that can be read, and the reasons why
    the others cannot, by their index. The arguments are those of `decode`."""

    def __init__(self, size: int, max_pixels: int, fit: str, small: list | None = None):
        self.size, self.how = size, (size, max_pixels, fit, small)

    def __getitem__(self, places: list[Path | Member]) -> tuple[torch.Tensor, dict[int, str]]:
        decoded = [decode(at, *self.how) for at in places]
        reasons = {n: found for n, found in enumerate(decoded) if isinstance(found, str)}
        good = [found for n, found in enumerate(decoded) if n not in reasons]
        images = torch.empty(len(good), 3, self.size, self.size, dtype=torch.uint8)
        for image, found in zip(images, good, strict=True):
            image.copy_(torch.from_numpy(found).permute(2, 0, 1))
        return images, reasons


def open_picture(image: Path | Member, size: int) -> Image.Image:
    """Open a picture, reading only its header. A JPEG will be decoded at a fraction of its size, of
    at least 2·size pixels per side.

    Raises Refused if it is not a regular file, which could block for ever, and Pillow's errors.
    """
    if isinstance(image, Path) and (found := irregular(image)):
        raise Refused("not a file", f"is {found}, not a file")
    file = image if isinstance(image, Path) else io.BytesIO(image.read_bytes())
    picture = Image.open(file, formats=FORMATS)
    if picture.info.get("progressive"):
        data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        scans = data.count(b"\xff\xda")
        if scans > SCANS:
            raise Refused("too many scans", f"has {scans} scans, more than {SCANS}")
    picture.draft("RGB", (2 * size, 2 * size))
    return picture


def square(picture: Image.Image, size: int, max_pixels: int = MAX_PIXELS, fit="crop") -> np.ndarray:
    """`decode` for an open picture. Raises Refused if it has more than `max_pixels`."""
    width, height = picture.size
    # a tile is decoded completely, even if the picture is smaller
    tags = getattr(picture, "tag_v2", {})
    pixels = max(width * height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))
    if pixels > max_pixels:
        about = f"has {pixels} pixels ({width} × {height}), above --max-pixels {max_pixels}"
        raise Refused(TOO_LARGE, about)
    picture.load()  # of a PNG also the metadata after the pixels, as EXIF
    if picture.getexif().get(ORIENTATION, 1) != 1:  # exif_transpose always copies the picture
        picture = ImageOps.exif_transpose(picture)
    white = white_level(picture)
    picture = on_white(picture, white) if pixels <= LARGE else shrunk(picture, size, white, fit)
    return np.array(FITS[fit](picture, (size, size), Image.Resampling.BICUBIC))


def white_level(picture: Image.Image) -> float | None:
    """The value that is white in a picture of one channel of 16 or 32 bits, else None.

    Of 32 bits it is the lowest of 1 (of fractions), 255, 65535 and the type's largest value that
    no pixel is above. Raises Refused if there are pixels below 0, or above all of them.
    """
    if picture.mode.startswith("I;16"):
        return 65535
    if picture.mode not in ("I", "F"):
        return None
    values = np.asarray(picture)
    low, high = values.min(), values.max()  # NaN if there is one
    levels = (255, 65535, 2**31 - 1) if picture.mode == "I" else (1, 255, 65535)
    found = next((level for level in levels if 0 <= low <= high <= level), None)
    if found is None:
        raise Refused("unknown range", f"has values from {low} to {high}, expected 0 to {levels}")
    return found


def on_white(picture: Image.Image, white: float | None) -> Image.Image:
    """The picture as RGB, what is transparent in white. `white`: see `white_level`."""
    if white:
        values = np.asarray(picture)
        clear = picture.info.get("transparency")
        grey = np.round(values * np.float32(255 / white)).astype(np.uint8)
        picture = Image.fromarray(grey if clear is None else np.where(values == clear, 255, grey))
    if picture.mode == "RGB":
        clear = picture.info.get("transparency")
        if clear is None:
            return picture
        if max(clear) > 255:  # that of 16 bits, of which Pillow reads the upper 8
            picture.info["transparency"] = tuple(value >> 8 for value in clear)
    if picture.mode == "La":  # Pillow converts it only to LA
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def shrunk(picture: Image.Image, size: int, white: float | None = None, fit="crop") -> Image.Image:
    """The picture on white, reduced by integer factors to at least twice what `square` makes of it.

    It is converted in tiles: converted at once, it would take 12 more bytes per pixel. To crop it,
    of the long side only the part that the centred square needs is kept.
    """
    width, height = sides = picture.size
    scaled = {"crop": [min(sides)] * 2, "pad": [max(sides)] * 2, "warp": sides}[fit]
    fx, fy = (max(1, min(n // (2 * size), m)) for n, m in zip(scaled, sides, strict=True))
    columns, rows = width // fx, height // fy
    side = min(columns, rows) if fit == "crop" else max(columns, rows)
    kept = side + 2 * (2 * side // size + 3)  # bicubic reads up to 2 pixels of the result beyond
    cut_x, cut_y = (max(0, n - kept) // 2 for n in (columns, rows))
    left = (width - fx * columns) // 2 + fx * cut_x
    top = (height - fy * rows) // 2 + fy * cut_y
    columns, rows = columns - 2 * cut_x, rows - 2 * cut_y
    small = Image.new("RGB", (columns, rows))
    wide = min(columns, max(1, LARGE // 16 // (fx * fy)))  # of a tile
    high = max(1, LARGE // 16 // (fx * fy * wide))
    for x, y in itertools.product(range(0, columns, wide), range(0, rows, high)):
        right, below = left + fx * min(x + wide, columns), top + fy * min(y + high, rows)
        part = picture.crop((left + fx * x, top + fy * y, right, below))
        small.paste(on_white(part, white).reduce((fx, fy)), (x, y))
    return small
