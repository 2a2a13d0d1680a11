"""`python -m ito.evaluate RUN`: evaluate a run's model on its held-out images or on other data.

Retrieval, zero-shot classification with prompt ensembles, linear probe and k nearest neighbours,
the modality gap, uniformity and alignment, and the difference of ranks between languages. Every
distinct caption is a query; it and a picture are right for each other if the picture's item has it.
With --classes only zero-shot classification among these.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ito.cli import Parser, output_path, shown, user_errors
from ito.config import add_options
from ito.data.dataset import Dataset
from ito.files import read_text, write_text
from ito.model.embed import embed_images
from ito.model.exported import Encoder, load
from ito.model.tokenizer import report_cut
from ito.run import RunFolder, choose_data, open_chosen, report_step
from ito.scoring.evaluation import ALL, PROMPTS, embed_classes, evaluate_fully
from ito.scoring.metrics import zero_shot
from ito.scoring.scores import cell, clip_benchmark, table
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
        "--templates", type=Path, metavar="FILE", help="prompts, one on each line, for --prompts"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="classify pictures, of one folder per class, among the names in this file: one on "
        "each line, in the order of the folders' names, or FOLDER, a tab, and the name",
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
        if options.prompts and (options.templates or options.classes):
            raise ValueError("--prompts does not go with --templates or --classes: drop it")
        prompts = options.prompts
        if options.templates:
            prompts = templates_in(lines_of(options.templates, "--templates"))
        if bad := [prompt for prompt in prompts or () if "{}" not in prompt]:
            option = "--templates" if options.templates else "--prompts"
            raise ValueError(f"{option} must hold {{}} for the name, got {bad[0]!r}")
        if options.clip_benchmark and options.classes:
            raise ValueError("--clip-benchmark does not go with --classes: drop one")
        for name, file in (("json", options.json), ("clip-benchmark", options.clip_benchmark)):
            if file and not output_path(f"--{name}", file).parent.is_dir():
                raise ValueError(f"--{name} {file}: {file.parent} is not a folder")
        if options.json and options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: name a file for the scores")
        encoder = load(options.run)
        config = choose_data(options)
        dataset = open_chosen(options, config)
        splits = options.split or ([ALL] if options.data else dataset.held_out_splits())
        print_notes(report_step(options.run, encoder.step))
        print(report_skipped(dataset.skipped) or f"{len(dataset.images)} pictures")
        if options.classes:
            scores = score_classes(encoder, dataset, splits, options.classes, prompts or PROMPTS)
        else:
            # nothing of other data was trained on, not even what it calls "train"
            other = options.data or config.val_data
            overlap = {} if other else count_overlap(dataset, dataset)
            own = config.train_data == RunFolder(options.run).read_config().train_data
            if own and not config.val_data and {"train", ALL} & {*splits}:
                about = "their scores do not measure generalisation"
                print(f"warning    pictures that were trained on are scored too: {about}")
            captions = [caption for names in dataset.captions for caption in names]
            print_notes(report_overlap(overlap, dataset), report_cut(captions, encoder.tokenizer))
            prompts = tuple(prompts or prompts_of(config.val_data or config.train_data))
            scores = evaluate_fully(encoder.model, encoder.tokenizer, dataset, splits, prompts)
            print(table({"score": scores}))
            held_out = {*splits} - {ALL, "train"} and "train" in dataset.split
            if held_out and not any("knn/" in name for name in scores):
                print("note       no linear probe, no k-NN: no 2 classes in training and held out")
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
            prompts = templates_in(read_text(file).splitlines())
            print(f"prompts    {shown(file)}: {len(prompts)}")
            return [prompt for prompt in prompts if "{}" in prompt] or PROMPTS
    return PROMPTS


def templates_in(lines: list[str]) -> list[str]:
    """Prompts, for which clip_benchmark writes {c} for the name."""
    return [line.strip().replace("{c}", "{}") for line in lines]


def lines_of(file: Path, option: str) -> list[str]:
    """The lines of a file that hold anything. Raises ValueError naming the option if none does."""
    found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{option} {file} must have a text on each line, got none")
    return found


def score_classes(
    encoder: Encoder, dataset: Dataset, splits: list[str], file: Path, templates: Sequence[str]
) -> dict[str, float]:
    """Print and return the accuracy among the classes in `file`; the pictures' folders are their
    true classes. Raises ValueError if the folders and the names do not fit."""
    rows = [n for n, split in enumerate(dataset.split) if {split, ALL} & {*splits}]
    if not rows:
        raise ValueError(f"--split {splits[0]}: the data has {dataset.describe()}")
    folders = [Path(dataset.files[n]).parent.name for n in rows]
    lines, known = lines_of(file, "--classes"), sorted({*folders})
    if all("\t" in line for line in lines):
        names = dict(line.split("\t", 1) for line in lines)
    else:
        names = dict(zip(known, lines, strict=False)) if len(lines) == len(known) else {}
    if other := [name for name in known if name not in names]:
        raise ValueError(
            f"--classes {file} must have a name for each of {len(known)} folders of pictures, or "
            f"FOLDER, a tab, and the name; got {len(lines)} lines, none for {other[0]!r}"
        )
    place = {folder: n for n, folder in enumerate(names)}
    labels = torch.tensor([place[folder] for folder in folders])
    pictures = dataset.images[torch.tensor(rows)]
    classes = embed_classes(encoder.model, encoder.tokenizer, [*names.values()], templates)
    scores = zero_shot(embed_images(encoder.model, pictures), classes, labels, intervals=True)
    print(f"zero-shot  {len(names)} classes, {len(templates)} templates, {len(rows)} pictures")
    for key, chance in (("top1", 1), ("top5", 5), ("mean_per_class", 1)):
        print(f"  {key:16}{cell(scores, key, '.1%'):>22}  chance {min(1, chance / len(names)):.2%}")
    return scores


if __name__ == "__main__":
    main()
