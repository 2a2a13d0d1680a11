"""Pictures as people have them: opened within limits, and made squares of one size.

What a file says of itself is checked before anything of it is decoded. A JPEG is decoded at a
fraction of its size. A JPEG 2000 is not: Pillow's `reduce` fails at many sizes, and shifts the
pictures of others (by up to 10 of 255 in the mean, of coloured noise at 8 to 32 px).
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ito.data.shards import Member
from ito.files import irregular

# Pillow's MAX_IMAGE_PIXELS, from which it warns of bombs; it opens none of more than twice as many.
# So many take, in each thread that decodes, 0.1 GB (PNG of a palette), 0.35 (PNG, TIFF of colours;
# twice as much where EXIF turns them), 0.8 (AVIF), 1.4 (WebP) or 1.6 (JPEG 2000).
MAX_PIXELS = 89_478_485
LARGE = 2**24  # pixels: a larger picture is made smaller before its colours are converted
# Those that are known by their first bytes, and that Pillow decodes itself: EPS starts Ghostscript,
# ICO and ICNS hold pictures of other sizes than they say.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
TILE_WIDTH, TILE_LENGTH, ORIENTATION = 322, 323, 274  # tags of TIFF and EXIF


class Refused(ValueError):
    """What keeps a picture from being opened or decoded, as the end of a sentence about it."""


def decode(image: Path | Member, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray | str:
    """uint8 (size, size, 3) on white, the short side resized and the centre kept; or the reason."""
    try:
        with open_picture(image, size) as picture:
            return square(picture, size, max_pixels)
    except Refused as error:
        return f"picture {image} {error}"
    except FileNotFoundError:
        return f"no picture {image}"
    except UnidentifiedImageError:
        return f"unreadable picture {image}: of no known format"
    except Image.DecompressionBombError:
        return f"picture {image} has more than the {2 * MAX_PIXELS} pixels that Pillow opens"
    except Exception as error:  # Pillow's plugins raise anything on a damaged file
        return f"unreadable picture {image}: {type(error).__name__}: {error}"


def open_picture(image: Path | Member, size: int) -> Image.Image:
    """Its header alone is read; of a JPEG no more will be decoded than 2·size pixels a side need.

    Raises Refused where there is no file but something that could wait for ever, and what Pillow
    raises.
    """
    if isinstance(image, Member):
        file = io.BytesIO(image.read_bytes())
    elif found := irregular(image):
        raise Refused(f"is {found}, not a file")
    else:
        file = image
    picture = Image.open(file, formats=FORMATS)
    picture.draft("RGB", (2 * size, 2 * size))
    return picture


def square(picture: Image.Image, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """What `decode` makes of an open picture. Raises Refused if it has more than `max_pixels`."""
    width, height = picture.size
    tags = getattr(picture, "tag_v2", {})  # a tile is decoded whole, however small its picture
    pixels = max(width * height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))
    if pixels > max_pixels:
        raise Refused(f"has {pixels} pixels ({width} × {height}), above --max-pixels {max_pixels}")
    picture.load()  # of a PNG, what stands behind the pixels too
    if picture.getexif().get(ORIENTATION, 1) != 1:  # or all of it would be copied
        picture = ImageOps.exif_transpose(picture)
    picture = on_white(picture) if pixels <= LARGE else shrunk(picture, size)
    return np.array(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))


def on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "RGB":
        return picture
    if picture.mode == "La":  # which Pillow converts to LA alone
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def shrunk(picture: Image.Image, size: int) -> Image.Image:
    """On white, by a whole factor smaller, the short side 2·size or more pixels; band after band.

    On white as a whole, a picture would take 12 bytes a pixel beside what it was decoded to. Of the
    long side only what the centred square needs is kept: a picture of one row is one band.
    """
    width, height = picture.size
    factor = max(1, min(width, height) // (2 * size))
    columns, rows = width // factor, height // factor
    left, top = (width - factor * columns) // 2, (height - factor * rows) // 2
    side = min(columns, rows)
    kept = side + 2 * (2 * side // size + 3)  # bicubic sees 2 pixels of the result further
    beside, over = (max(0, n - kept) // 2 for n in (columns, rows))
    columns, rows = columns - 2 * beside, rows - 2 * over
    left, top = left + factor * beside, top + factor * over
    small = Image.new("RGB", (columns, rows))
    band = max(1, LARGE // 16 // (factor * factor * columns))
    for row in range(0, rows, band):
        above, below = (top + factor * n for n in (row, min(row + band, rows)))
        part = picture.crop((left, above, left + factor * columns, below))
        small.paste(on_white(part).reduce(factor), (0, row))
    return small
