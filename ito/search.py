"""`python -m ito.search RUN "a red flag" photo.png`: the pictures that a run's model finds.

Prints the best matches of every query, a text or a picture, and writes them as a contact sheet.
`--serve` opens a page to type into instead, on this machine alone (ito/page.py).
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ito.cli import shown, user_errors
from ito.config import add_options
from ito.data import Dataset, report_skipped
from ito.evaluate import choose_data
from ito.export import Encoder, checksum, load, load_tensors, save_tensors
from ito.files import undamaged, write_atomically
from ito.source import open_dataset

CELL, PICTURE, LINE = 120, 96, 16  # pixels of the contact sheet
LONGEST_PATH = 4096  # Linux's PATH_MAX: a longer query is a text, whatever its end


class Index:
    """Every picture of a data set, trained on or held out, embedded by a model.

    `search(queries (Q, E), k)` gives cosines and picture indices, (Q, k) each, best first; k is at
    most the number of pictures.
    """

    def __init__(self, encoder: Encoder, dataset: Dataset, embeddings: torch.Tensor):
        self.encoder, self.dataset, self.embeddings = encoder, dataset, embeddings

    @classmethod
    def open(cls, run: Path, encoder: Encoder, dataset: Dataset) -> "Index":
        """With embeddings kept in `run/index/`, under a hash of the weights and the pictures."""
        key = hashlib.sha256(dataset.images.numpy())
        key.update(checksum(encoder.model.state_dict()).encode())
        path = run / "index" / f"{key.hexdigest()[:16]}.safetensors"
        if path.exists():
            with undamaged(path):
                return cls(encoder, dataset, load_tensors(path)[0]["images"])
        embeddings = encoder.encode_image(dataset.images)
        with write_atomically(path) as temporary:
            temporary.write_bytes(save_tensors({"images": embeddings}))
        return cls(encoder, dataset, embeddings)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (queries @ self.embeddings.T).topk(min(k, len(self.embeddings)))

    def name(self, picture: int) -> str:
        """The first caption of what the picture shows, as much of it as is shown."""
        return shown(self.dataset.captions[int(self.dataset.image_item[picture])][0])


def embed(encoder: Encoder, query: str) -> torch.Tensor:
    """(1, E) of a picture, where the query names a file, or of the text that it is.

    Raises ValueError naming a picture that does not exist or cannot be read.
    """
    # not Path.is_file, which raises where a text is too long for a file's name
    named = os.path.isfile(query) or Path(query).suffix.lower() in Image.registered_extensions()
    if named and len(query) <= LONGEST_PATH:
        try:
            return encoder.encode_image(query)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("images[0]: ")) from None
    if not query.strip():
        raise ValueError("a query must be a text or a picture's file, got an empty text")
    return encoder.encode_text(query)


def sheet_font() -> ImageFont.FreeTypeFont:
    """A font of the system, with accents and other alphabets, or Pillow's own, without."""
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
        text = " ".join(text.split())  # line breaks cannot be measured
        while draw.textlength(text, font) > width:
            text = text.rstrip("…")[:-1] + "…"
        draw.text((x, y), text, fill=colour, font=font)

    for row, query in enumerate(queries):
        top = row * height + LINE // 2
        write(LINE, top, shown(query), sheet.width - 2 * LINE, "black")
        for column, picture in enumerate(found[row].tolist()):
            left = LINE + column * CELL
            pixels = index.dataset.images[picture].permute(1, 2, 0).numpy()
            drawn = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            sheet.paste(drawn, (left, top + LINE + 4))
            below = top + LINE + 6 + PICTURE
            write(left, below, f"{scores[row, column]:.3f}", PICTURE, "dimgray")
            write(left, below + LINE, index.name(picture), PICTURE, "black")
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ito.search", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="a text, or a picture's file")
    parser.add_argument("-k", type=int, default=8, help="matches per query (8)")
    parser.add_argument("--data", metavar="PATH", help="search this data set, not the run's")
    parser.add_argument("--out", type=Path, help="the contact sheet, a PNG (RUN/search.png)")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8765,
        metavar="PORT",
        help="open a page on 127.0.0.1 instead (8765; 0: any free port)",
    )
    parser.add_argument("--cache", type=Path, help="where prepared data lives (~/.cache/ito)")
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        if options.k < 1:
            raise ValueError(f"-k must be at least 1, got {options.k}")
        if options.serve is None and not options.queries:
            raise ValueError("nothing to search for: name a text or a picture's file, or --serve")
        out = options.out or options.run / "search.png"
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file for the contact sheet")
        if options.serve is not None:
            from ito.page import serve  # before the work, so that a missing package is told at once
        options.split = None
        encoder = load(options.run)
        config, _ = choose_data(options)
        encoder.max_pixels = config.max_pixels
        queries = [embed(encoder, query) for query in options.queries]
        dataset = open_dataset(config, options.cache)
        if dataset.skipped:
            print(report_skipped(dataset.skipped))
        index = Index.open(options.run, encoder, dataset)
        if options.serve is not None:
            serve(index, options.serve)
            return
        scores, found = index.search(torch.cat(queries), options.k)
        for query, values, pictures in zip(
            options.queries, scores.tolist(), found.tolist(), strict=True
        ):
            print(shown(query))
            for value, picture in zip(values, pictures, strict=True):
                print(f"  {value:6.3f}  {index.name(picture):32} {index.dataset.files[picture]}")
        sheet = contact_sheet(index, options.queries, scores, found)
        with write_atomically(out) as temporary:
            sheet.save(temporary, "PNG")
        print(out)


if __name__ == "__main__":
    main()
