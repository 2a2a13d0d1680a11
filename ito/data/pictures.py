"""Opens pictures within limits of their size, and makes squares of one size of them.

The header is checked before anything is decoded. A JPEG is decoded at a fraction of its size. A
JPEG 2000 is not: Pillow's `reduce` fails at many sizes, and shifts pictures of other sizes (by up
to 10 of 255 in the mean, for coloured noise at 8 to 32 px).
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ito.data.shards import Member
from ito.files import irregular

# Pillow's MAX_IMAGE_PIXELS, above which it warns of decompression bombs; above twice as many it
# opens no picture. In each thread that decodes, a picture of this size takes 0.1 GB (PNG with a
# palette), 0.35 (other PNG, TIFF; twice as much if EXIF rotates it), 0.8 (AVIF), 1.4 (WebP) or 1.6
# (JPEG 2000).
MAX_PIXELS = 89_478_485
LARGE = 2**24  # pixels; larger pictures are reduced before their colours are converted
# Formats with a signature that Pillow decodes itself. Not EPS, which starts Ghostscript; nor ICO
# and ICNS, which hold pictures of other sizes than their headers say.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
TOO_LARGE = "too many pixels"
TILE_WIDTH, TILE_LENGTH, ORIENTATION = 322, 323, 274  # tags of TIFF and EXIF


class Refused(ValueError):
    """Why a picture is not opened or decoded; the message continues "picture NAME …".

    kind: the reason in few words, to count by.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def decode(image: Path | Member, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray | str:
    """The centred square, resized, on white, uint8 (size, size, 3); or why it cannot be read, as
    `kind: details`."""
    try:
        with open_picture(image, size) as picture:
            return square(picture, size, max_pixels)
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


def open_picture(image: Path | Member, size: int) -> Image.Image:
    """Open a picture, reading only its header. A JPEG will be decoded at a fraction of its size, of
    at least 2·size pixels per side.

    Raises Refused if it is not a regular file, which could block for ever, and Pillow's errors.
    """
    if not isinstance(image, Path):
        file = io.BytesIO(image.read_bytes())
    elif found := irregular(image):
        raise Refused("not a file", f"is {found}, not a file")
    else:
        file = image
    picture = Image.open(file, formats=FORMATS)
    picture.draft("RGB", (2 * size, 2 * size))
    return picture


def square(picture: Image.Image, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode` for an open picture. Raises Refused if it has more than `max_pixels`."""
    width, height = picture.size
    tags = getattr(picture, "tag_v2", {})
    # a tile is decoded completely, even if the picture is smaller
    pixels = max(width * height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))
    if pixels > max_pixels:
        about = f"has {pixels} pixels ({width} × {height}), above --max-pixels {max_pixels}"
        raise Refused(TOO_LARGE, about)
    picture.load()  # of a PNG also the metadata after the pixels, as EXIF
    if picture.getexif().get(ORIENTATION, 1) != 1:  # exif_transpose always copies the picture
        picture = ImageOps.exif_transpose(picture)
    white = white_level(picture)
    picture = on_white(picture, white) if pixels <= LARGE else shrunk(picture, size, white)
    return np.array(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))


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


def shrunk(picture: Image.Image, size: int, white: float | None = None) -> Image.Image:
    """The picture on white, reduced by an integer factor so that its short side is at least 2·size.

    It is converted in bands of rows: converted at once, it would take 12 more bytes per pixel. Of
    the long side only the part that the centred square needs is kept, because a picture of one row
    is one band.
    """
    width, height = picture.size
    factor = max(1, min(width, height) // (2 * size))
    columns, rows = width // factor, height // factor
    left, top = (width - factor * columns) // 2, (height - factor * rows) // 2
    side = min(columns, rows)
    kept = side + 2 * (2 * side // size + 3)  # bicubic reads up to 2 pixels of the result beyond
    cut_x, cut_y = (max(0, n - kept) // 2 for n in (columns, rows))
    columns, rows = columns - 2 * cut_x, rows - 2 * cut_y
    left, top = left + factor * cut_x, top + factor * cut_y
    small = Image.new("RGB", (columns, rows))
    band = max(1, LARGE // 16 // (factor * factor * columns))
    for row in range(0, rows, band):
        above, below = (top + factor * n for n in (row, min(row + band, rows)))
        part = picture.crop((left, above, left + factor * columns, below))
        small.paste(on_white(part, white).reduce(factor), (0, row))
    return small
