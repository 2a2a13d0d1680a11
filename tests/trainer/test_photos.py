"""People's own pictures: the preset `photos`, `--fit`, and what a run says about both."""

import argparse
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.quick_run import QUICK, write_set
from support.untrained_run import write_data, write_run

import ito
from ito import export, train
from ito.config import Config, add_options, choose_preset, from_options
from ito.data import emoji, emoji_full, emoji_small, pictures
from ito.data.augment import CROP, DRAWINGS, PAPER
from ito.data.dataset import load_dataset
from ito.data.pictures import decode
from ito.data.records import open_shards
from ito.model import pretrained
from ito.model.exported import load
from ito.model.tokenizer import Tokenizer, report_cut
from ito.run import choose_data
from ito.source import open_dataset
from ito.stream import Stream

RED, GREEN, BLUE, WHITE = (200, 30, 40), (30, 180, 60), (40, 50, 210), (255, 255, 255)


def parsed(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.run_options(parser)
    add_options(parser)
    return parser.parse_args(list(map(str, words)))


def config(*words) -> Config:
    return from_options(parsed(*words))


def write_card(folder, title) -> None:
    emoji.publish(folder, title, lambda out: (out / "README.md").write_text(f"# {title}\nx"))


# --- the preset ---


def test_data_that_is_no_emoji_set_gets_the_preset_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path / "small", emoji_small.TITLE)
    write_card(tmp_path / "full", f"{emoji_full.FULL}, 96 px, permissive licences")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "README.md").write_text("# My small emoji set")
    os.mkfifo(tmp_path / "README.md")  # is not opened, or this would never end
    for data in ("emoji-small", "emoji-full", "small", "full", "small/captions.jsonl"):
        assert choose_preset(parsed("--train-data", data))[0] == "emoji-small", data
        assert config("--train-data", data).image_size == 32, data
    for data in ("full/shards", "full/shards/train-{00000..00014}.tar", "small::full"):
        assert choose_preset(parsed("--train-data", data))[0] == "emoji-small", data
    for data in ("photos", "nowhere", "pairs.csv", "small::photos", "photos/a.tar", "x" * 5000):
        assert choose_preset(parsed("--train-data", data))[0] == "photos", data
    monkeypatch.chdir(tmp_path / "full")
    assert choose_preset(parsed("--train-data", "shards/a.tar"))[0] == "emoji-small"
    assert choose_preset(parsed())[0] == "emoji-small"
    assert config() == Config()
    monkeypatch.chdir(tmp_path)
    for preset in ("emoji-small", "cc12m-vitb16"):
        named = parsed("--train-data", "photos", "--preset", preset)
        assert choose_preset(named) == (preset, "--preset")
    old = config("--train-data", "photos", "--preset", "emoji-small")
    assert old == dataclasses.replace(Config(), train_data=f"{tmp_path}/photos")


def test_given_options_stand_above_the_preset():
    plain = config("--train-data", "x")
    assert plain.context_length == 32
    assert (plain.image_size, plain.load_size, plain.vocab_size) == (112, 128, 8000)
    given = config("--train-data", "x", "--image-size", 64, "--context-length", 20, "--blur-p", 0)
    assert (given.image_size, given.load_size, given.context_length) == (64, 73, 20)
    assert given.augmentation == dataclasses.replace(PAPER, blur_p=0.0)
    assert given.vocab_size == plain.vocab_size
    named = config("--preset", "photos", "--load-size", 200, "--vocab-size", 300)
    assert (named.image_size, named.load_size, named.vocab_size) == (112, 200, 300)
    assert named.train_data == "emoji-small"


@pytest.mark.parametrize(("size", "room"), [(16, 32), (32, 64), (48, 64), (56, 64), (224, 256)])
def test_pictures_are_kept_a_little_larger_than_they_are_seen(size, room):
    assert Config(image_size=size).load_size == room


def test_views_that_are_compared_differ_and_one_view_is_a_crop():
    found = {
        name: config("--train-data", "x", "--objective", name).augmentation
        for name in ("ito", "slip", "clip-aug", "clip", "siglip", "flair")
    }
    views = dict.fromkeys(("ito", "slip", "clip-aug"), PAPER)
    assert found == views | dict.fromkeys(("clip", "siglip", "flair"), CROP)
    assert config("--train-data", "emoji-full", "--objective", "siglip").augmentation == DRAWINGS


class Body(torch.nn.Module):
    """A pretrained tower as far as a configuration asks for it."""

    longest = 20

    @staticmethod
    def describe(name):
        return {"image_size": 48}

    def __init__(self, image_size):
        super().__init__()


def test_a_pretrained_tower_has_its_own_sizes(monkeypatch):
    monkeypatch.setitem(pretrained.IMAGE, "body", Body)
    monkeypatch.setitem(pretrained.TEXT, "body", Body)
    both = ("--image-encoder", "body", "--text-encoder", "body")
    found = config("--train-data", "x", *both)
    assert (found.image_size, found.load_size, found.context_length) == (48, 48, 20)
    assert found.vocab_size == Config.vocab_size  # not of this tower, and refused if it is given
    found = config("--preset", "cc12m-vitb16", *both)
    assert (found.image_size, found.context_length, found.patch_size) == (48, 20, None)
    found = config("--train-data", "x", *both, "--image-size", 96, "--context-length", 12)
    assert (found.image_size, found.load_size, found.context_length) == (96, 96, 12)
    monkeypatch.setattr(Body, "longest", torch.inf)
    assert config("--train-data", "x", *both).context_length == 32


# --- how a picture becomes a square ---


def flag(third: int) -> Image.Image:
    """Three squares from left to right."""
    image = Image.new("RGB", (3 * third, third))
    for n, colour in enumerate((RED, GREEN, BLUE)):
        image.paste(colour, (n * third, 0, (n + 1) * third, third))
    return image


def by_hand(image: Image.Image, fit: str) -> Image.Image:
    """The square of a wide picture, before it is made smaller."""
    width, height = image.size
    if fit == "crop":
        return image.crop(((width - height) // 2, 0, (width + height) // 2, height))
    if fit == "warp":
        return image.resize((width, width))
    square = Image.new("RGB", (width, width), WHITE)
    square.paste(image, (0, (width - height) // 2))
    return square


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("large", [False, True])  # is reduced before its colours are converted
@pytest.mark.parametrize("fit", ["crop", "pad", "warp"])
def test_what_is_seen_of_a_wide_picture(fit, large, turned, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(pictures, "LARGE", 20_000)
    image = flag(300)
    image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    image.save(tmp_path / "wide.png")
    found = decode(tmp_path / "wide.png", 30, fit=fit)
    found = found.swapaxes(0, 1) if turned else found
    places = [(y, x) for y in (4, 15, 25) for x in (4, 15, 25)]  # off the edges
    thirds = [RED, GREEN, BLUE]
    want = {
        "crop": [GREEN] * 9,
        "pad": [WHITE] * 3 + thirds + [WHITE] * 3,
        "warp": thirds * 3,
    }[fit]
    assert [tuple(found[place].tolist()) for place in places] == want


@pytest.mark.parametrize("fit", ["pad", "warp"])
def test_a_large_picture_gives_the_same_square(fit, monkeypatch):
    """To the rounding of two reductions. The factors divide the sides: else an edge is lost."""
    random = np.random.default_rng(0)
    for width, height in ((960, 480), (640, 1280), (1024, 1024), (1920, 480)):
        coarse = random.integers(0, 256, (5, 5, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        want = pictures.square(image, 32, fit=fit).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "LARGE", 20_000)
            off = np.abs(pictures.square(image, 32, fit=fit) - want)
        assert off.max() <= 4, (width, height)


@pytest.mark.parametrize("fit", ["crop", "pad", "warp"])
def test_a_picture_of_a_row_becomes_a_square(fit, monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 2_000)
    for size in ((5000, 1), (1, 5000), (3, 1), (1, 1), (4000, 7)):
        found = pictures.square(Image.new("RGB", size, RED), 32, fit=fit)
        assert found.shape == (32, 32, 3), size
        assert fit == "pad" or (found == RED).all(), size


def test_the_pictures_of_a_stream_fit_as_those_in_memory(tmp_path):
    rows = [{"image": f"{n}.png", "caption": f"flag {n}"} for n in range(4)]
    for n, row in enumerate(rows):
        flag(20 + n).save(tmp_path / row["image"])
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for fit in ("crop", "pad", "warp"):
        held = load_dataset(tmp_path, 16, fit=fit)
        known = dict(zip(held.files, held.images, strict=True))
        batch = next(Stream(open_shards(tmp_path), 16, 4, fit=fit).batches())
        for image, record in zip(batch.images, batch.records, strict=True):
            assert torch.equal(image, known[str(record.image)])
        found[fit] = held.images
    assert not torch.equal(found["crop"], found["pad"])
    assert not torch.equal(found["crop"], found["warp"])


def test_the_exported_model_sees_a_picture_as_the_run_did(tmp_path):
    data = write_data(tmp_path / "data")
    run = write_run(tmp_path / "run", data)
    about = json.loads((run / "model/config.json").read_text())
    image, path = flag(96), tmp_path / "wide.png"
    image.save(path)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def encoder(**fit):
        (run / "model/config.json").write_text(json.dumps(about | fit))
        return load(run)

    fits = ("crop", "pad", "warp")
    seen = torch.cat([encoder(fit=fit).encode_image(by_hand(image, fit)) for fit in fits])
    for n, fit in enumerate(fits):
        for given in (path, str(path), image, tensor):
            found = encoder(fit=fit).encode_image(given)
            near, far = (found - seen).norm(dim=1).sort().values[:2]
            assert (found - seen).norm(dim=1).argmin() == n, fit
            assert near < far / 3, (fit, given)
    del about["fit"]  # as exported by older versions
    assert (encoder().encode_image(image) - seen).norm(dim=1).argmin() == 0
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        encoder(fit="stretch")


# --- runs ---


def write_photos(folder):
    """20 wide pictures, 5 of them smaller than 64 px; 4 have captions of 40 more words."""
    random = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "captions.jsonl").open("w") as lines:
        for n in range(20):
            size = (60, 40) if n < 5 else (150, 70)
            coarse = random.integers(0, 256, (4, 8, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize(size).save(folder / f"{n}.jpg")
            words = [f"picture {n}", *(f"word{k}" for k in range(40 * (n % 5 == 0)))]
            lines.write(json.dumps({"image": f"{n}.jpg", "caption": " ".join(words)}) + "\n")
    return folder


def test_a_run_says_its_sizes_and_what_they_cut(tmp_path, capsys):
    data, run = write_photos(tmp_path / "data"), tmp_path / "run"
    given = ["--train-data", str(data), "--fit", "pad", "--out", str(run)]
    train.main([*given, *QUICK, "--context-length", "16", "--eval-every", "6"])
    told = capsys.readouterr().out
    assert "preset     photos: the data is not an emoji set\n" in told
    size = "sizes      image size 32 px from 64 px, fit pad; captions up to 16 tokens; vocabulary "
    assert size in told
    tokenizer = ito.load(run).tokenizer
    assert f"{size}{tokenizer.vocab_size}\n" in told
    assert "enlarged   5 of 20 pictures to 64 px; they are smaller\n" in told
    captions = [json.loads(line)["caption"] for line in (data / "captions.jsonl").open()]
    whole = Tokenizer.load(run / "model/tokenizer.json")
    whole.bpe.no_truncation(), whole.bpe.no_padding()
    lengths = [len(e.ids) for e in whole.bpe.encode_batch(captions)]
    lost = sum(length - 16 for length in lengths if length > 16) / sum(lengths)
    longest = (
        f"cut        4 of 20 captions, to their first 16 tokens; the longest has {max(lengths)}"
    )
    assert f"{longest}\n           {lost:.1%} of all tokens are lost" in told
    assert "s for 6 steps, evaluations not included\n" in told
    facts = json.loads((run / "data.json").read_text())
    assert (facts["cut_captions"], facts["enlarged"]) == (4, 5)
    assert facts["cut_tokens"] == pytest.approx(lost, abs=1e-4)
    sentence = f"; {lost:.1%} of all tokens are cut; 5 pictures enlarged"
    assert sentence in told
    assert sentence in (run / "report.html").read_text()

    assert json.loads((run / "model/config.json").read_text())["fit"] == "pad"
    export.main([str(run), "--out", str(tmp_path / "model")])
    files = [folder / "config.json" for folder in (run / "model", tmp_path / "model")]
    assert files[0].read_bytes() == files[1].read_bytes()
    dataset = open_dataset(Config.load(run / "config.json"))
    assert (dataset.images[:, :, 0] == 255).all()  # white above
    chosen = choose_data(argparse.Namespace(run=run, data=str(data)))
    assert chosen.fit == "pad"  # evaluate and search look as the run did
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--fit", "crop"])
    assert "--resume keeps the run's configuration: drop --fit" in capsys.readouterr().err


def test_a_run_without_sizes_has_those_of_the_preset(tmp_path, capsys):
    """One step, of the smallest towers: width and depth are no sizes of the data."""
    data = write_set(tmp_path / "data", items=12, drawings=1)
    towers = "--width 8 --heads 1 --text-depth 1 --batch-size 4 --objective clip --threads 1"
    train.main(
        ["--train-data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *towers.split()]
    )
    told = capsys.readouterr().out
    assert "image size 112 px from 128 px, fit crop; captions up to 32 tokens" in told
    assert "enlarged   12 of 12 pictures to 128 px" in told
    assert "evaluations not included" not in told  # nothing is left to wait for
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert (saved["image_size"], saved["context_length"]) == (112, 32)
    train.main(["--resume", str(tmp_path / "run")])
    assert "preset" not in capsys.readouterr().out  # the run's own configuration stands


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.1, "1 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_a_duration_in_words(seconds, told):
    assert train.duration(seconds) == told


def test_the_vocabulary_of_few_captions_is_as_large_as_they_need():
    captions = ["red cat", "red dog", "a red zebra"]
    tokenizer = Tokenizer.train(captions, 8000, 32)
    assert tokenizer.vocab_size < 300
    pieces = tokenizer.bpe.encode("red zebra").tokens
    assert "Ġred" in pieces
    assert "Ġzebra" not in pieces  # a word of one caption is left in pieces
    assert Tokenizer.train(["x"], 8000, 32).vocab_size >= 259
    assert not report_cut(captions, tokenizer)
