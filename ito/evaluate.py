"""`python -m ito.evaluate RUN`: evaluate a run's model on its held-out images or on other data.

Retrieval, zero-shot classification with prompt ensembles, linear probe and k nearest neighbours,
the modality gap, uniformity and alignment, and the difference of ranks between languages. Every
distinct caption is a query; it and a picture are right for each other if the picture's item has it.
"""

import json
import os
from pathlib import Path

from ito.cli import Parser, output_path, shown, user_errors
from ito.config import add_options
from ito.files import read_text, write_text
from ito.model.exported import load
from ito.model.tokenizer import report_cut
from ito.run import RunFolder, choose_data, where_it_is_now
from ito.scoring.evaluation import ALL, PROMPTS, evaluate_fully
from ito.scoring.scores import clip_benchmark, table
from ito.source import open_dataset
from ito.summary import count_overlap, print_notes, report_overlap, report_skipped


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ito.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="evaluate on all images of this data set instead of the run's",
    )
    parser.add_argument(
        "--split", action="append", help=f"split to evaluate; may be repeated; {ALL}: all images"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="TEXT",
        help="prompts of the zero-shot ensembles; {} stands for the class name (default: those of "
        "clip_benchmark's sets; else 'a photo of {}' and similar)",
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of prepared data (default: ~/.cache/ito)"
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument(
        "--clip-benchmark",
        type=Path,
        metavar="FOLDER",
        help="also write one file per split and task, in clip_benchmark's format and by its rule",
    )
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_args(arguments)
        if bad := [prompt for prompt in options.prompts or () if "{}" not in prompt]:
            raise ValueError(f"--prompts must hold {{}} for the name, got {bad[0]!r}")
        for name, file in (("json", options.json), ("clip-benchmark", options.clip_benchmark)):
            if file and not output_path(f"--{name}", file).parent.is_dir():
                raise ValueError(f"--{name} {file}: {file.parent} is not a folder")
        if options.json and options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: name a file for the scores")
        encoder = load(options.run)
        config = choose_data(options)
        with where_it_is_now(options):
            dataset = open_dataset(config, options.cache)
        splits = options.split or ([ALL] if options.data else dataset.held_out_splits())
        print(report_skipped(dataset.skipped) or f"{len(dataset.images)} pictures")
        # nothing of other data was trained on, not even what it calls "train"
        other = options.data or config.val_data
        overlap = {} if other else count_overlap(dataset, dataset)
        own = config.train_data == RunFolder(options.run).read_config().train_data
        if own and not config.val_data and {"train", ALL} & {*splits}:
            about = "their scores do not measure generalisation"
            print(f"warning    pictures that were trained on are scored too: {about}")
        captions = [caption for names in dataset.captions for caption in names]
        print_notes(report_overlap(overlap, dataset), report_cut(captions, encoder.tokenizer))
        scores = evaluate_fully(
            encoder.model,
            encoder.tokenizer,
            dataset,
            splits,
            tuple(options.prompts or prompts_of(config.val_data or config.train_data)),
        )
        print(table({"score": scores}))
        if options.json:
            write_text(options.json, json.dumps(scores, indent=2) + "\n")
        if options.clip_benchmark:
            data = Path(config.train_data).stem
            for record in clip_benchmark(scores, data, options.run):
                name = f"{record['dataset']}_{record['task']}".replace("/", "-")
                path = options.clip_benchmark / f"{name}.json"
                write_text(path, json.dumps(record, indent=2) + "\n")


def prompts_of(data: str) -> list[str] | tuple[str, ...]:
    """The prompts that lie with clip_benchmark's sets, beside their tars or above; else PROMPTS."""
    place = Path(data)
    for folder in (place, *place.parents[:2]):
        file = folder / "zeroshot_classification_templates.txt"
        if os.path.isfile(file):
            prompts = [line.strip().replace("{c}", "{}") for line in read_text(file).splitlines()]
            print(f"prompts    {shown(file)}: {len(prompts)}")
            return [prompt for prompt in prompts if "{}" in prompt] or PROMPTS
    return PROMPTS


if __name__ == "__main__":
    main()
