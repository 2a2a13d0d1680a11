"""`python -m ito.search RUN "a red flag" photo.png`: search a data set with a run's model.

Prints the best matches of each query (a text or an image file) and writes them as a contact sheet.
A note follows if even the best match is less similar than those of the run's own captions.
`--serve` starts a local web page for searching instead.
"""

import argparse
import os
from pathlib import Path

import torch
from PIL import Image

from ito.cli import Parser, one_line, output_path, reason, shown, user_errors
from ito.config import add_options
from ito.files import write_atomically
from ito.model.exported import Encoder, load
from ito.run import RunFolder, choose_data, open_chosen, refuse_strange, report_step
from ito.scoring.contact_sheet import contact_sheet
from ito.scoring.index import Index, Near
from ito.source import open_dataset
from ito.summary import print_notes, report_skipped

LONGEST_PATH = 4096  # Linux's PATH_MAX: a longer query is a text, even if it ends in .png


def embed(encoder: Encoder, query: str) -> tuple[str, torch.Tensor]:
    """What the query is, "picture" if it names a file, else "text", and its embedding (1, E).

    Raises ValueError if the picture does not exist or cannot be read.
    """
    # Path.is_file would raise for a text that is too long to be a file's name.
    named = os.path.isfile(query) or Path(query).suffix.lower() in Image.registered_extensions()
    if named and len(query) <= LONGEST_PATH:
        try:
            return "picture", encoder.encode_image(query)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("images[0]: ")) from None
    if not query.strip():
        raise ValueError("a query must be a text or a picture's file, got an empty text")
    return "text", encoder.encode_text(query)


def open_near(options: argparse.Namespace, encoder: Encoder, index: Index) -> Near | None:
    """From which cosine on a match is near. None, and a line that says so, if that is to be
    measured on the run's own data, and it cannot be read."""

    def own() -> Index | None:
        if options.data is None:
            return index
        try:
            config = choose_data(argparse.Namespace(run=options.run, data=None))
            dataset = open_dataset(config, options.cache)
        except (OSError, ValueError) as error:
            why = one_line(reason(error))
            print(f"note       what is near is unknown without the run's own data: {why}")
            return None
        return Index.open(options.run, encoder, dataset)

    return Near.open(options.run, encoder, own)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ito.search", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="a text or an image file")
    parser.add_argument("-k", type=int, default=8, help="matches per query (default: 8)")
    parser.add_argument("--data", metavar="PATH", help="search this data set instead of the run's")
    parser.add_argument("--out", type=Path, help="contact sheet, a PNG (default: RUN/search.png)")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8765,
        metavar="PORT",
        help="serve a search page on 127.0.0.1 (default port: 8765; 0: any free port)",
    )
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        if options.k < 1:
            raise ValueError(f"-k must be at least 1, got {options.k}")
        if options.serve is None and not options.queries:
            raise ValueError("nothing to search for: name a text or a picture's file, or --serve")
        out = output_path("--out", options.out or RunFolder(options.run).contact_sheet)
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file for the contact sheet")
        if options.serve is not None:
            # imported before the work, so that a missing package is reported at once
            from ito.scoring.search_page import serve
        refuse_strange(options.run)
        encoder = load(options.run)
        config = choose_data(options)
        encoder.max_pixels, encoder.fit = config.max_pixels, config.fit
        queries = [embed(encoder, query) for query in options.queries]
        dataset = open_chosen(options, config)
        print_notes(report_step(options.run, encoder.step), report_skipped(dataset.skipped))
        index = Index.open(options.run, encoder, dataset)
        near = open_near(options, encoder, index)
        if options.serve is not None:
            serve(index, near, options.data is None and not config.val_data, options.serve)
            return
        scores, found = index.search(torch.cat([emb for _, emb in queries]), options.k)
        titles = []
        for query, (kind, _), values, pictures in zip(
            options.queries, queries, scores.tolist(), found.tolist(), strict=True
        ):
            print(one_line(query))
            for value, picture in zip(values, pictures, strict=True):
                name, file = one_line(index.name(picture)), index.dataset.files[picture]
                print(f"  {value:6.3f}  {name:32} {shown(file)}")
            doubt = near.doubt(kind, values[0]) if near else ""
            if doubt:
                print(f"note       {doubt} ({one_line(query, 60)})")
            titles.append(f"{one_line(query, 100)} ({doubt})" if doubt else query)
        sheet, notes = contact_sheet(index, titles, scores, found)
        with write_atomically(out) as temporary:
            sheet.save(temporary, "PNG")
        print_notes(notes)
        print(shown(out))


if __name__ == "__main__":
    main()
