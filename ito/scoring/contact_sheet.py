"""The results of a search as one picture: a row per query, with pictures, scores and names."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ito.cli import one_line
from ito.scoring.index import Index

CELL, PICTURE, LINE = 120, 96, 16  # pixels of the contact sheet


def sheet_font() -> ImageFont.FreeTypeFont:
    """A system font, which has accents and other alphabets; else Pillow's own, which has none."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, 12)
        except OSError:
            continue
    return ImageFont.load_default(12)


def contact_sheet(
    index: Index, queries: Sequence[str], scores: torch.Tensor, found: torch.Tensor
) -> Image.Image:
    """A row per query: its text, then its pictures with score and name."""
    font = sheet_font()
    height = CELL + 3 * LINE
    sheet = Image.new("RGB", (CELL * found.shape[1] + LINE, height * len(queries) + LINE), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, width: int, colour: str) -> None:
        text = " ".join(text.split())  # Pillow cannot measure text with line breaks
        while draw.textlength(text, font) > width:
            text = text.rstrip("…")[:-1] + "…"
        draw.text((x, y), text, fill=colour, font=font)

    for row, query in enumerate(queries):
        top = row * height + LINE // 2
        write(LINE, top, one_line(query), sheet.width - 2 * LINE, "black")
        for column, picture in enumerate(found[row].tolist()):
            left = LINE + column * CELL
            pixels = index.dataset.images[picture].permute(1, 2, 0).numpy()
            drawn = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            sheet.paste(drawn, (left, top + LINE + 4))
            below = top + LINE + 6 + PICTURE
            write(left, below, f"{scores[row, column]:.3f}", PICTURE, "dimgray")
            write(left, below + LINE, index.name(picture), PICTURE, "black")
    return sheet
