"""The results of a search as one picture: a row per query, with pictures, scores and names."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from ito.cli import one_line
from ito.scoring.fonts import SIZE, Fonts
from ito.scoring.index import Index

CELL, PICTURE, LINE = 120, 96, 16  # pixels of the contact sheet


def contact_sheet(
    index: Index, queries: Sequence[str], scores: torch.Tensor, found: torch.Tensor
) -> tuple[Image.Image, str]:
    """A row per query: its text, then its pictures with score and name; and what is not legible in
    it, in words."""
    names = {n: index.name(n) for n in found.unique().tolist()}
    fonts = Fonts(map(one_line, (*names.values(), *queries, "0123456789.-…")))
    height = CELL + 3 * LINE
    sheet = Image.new("RGB", (CELL * found.shape[1] + LINE, height * len(queries) + LINE), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, width: int, colour: str) -> None:
        text = " ".join(text.split())  # Pillow cannot measure text with line breaks
        pieces = fonts.pieces(text)
        while sum(font.getlength(piece) for piece, font in pieces) > width:
            text = text.rstrip("…")[:-1] + "…"
            pieces = fonts.pieces(text)
        for piece, font in pieces:
            draw.text((x, y + SIZE), piece, fill=colour, font=font, anchor="ls")
            x += font.getlength(piece)

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
            write(left, below + LINE, names[picture], PICTURE, "black")
    return sheet, fonts.notes()
