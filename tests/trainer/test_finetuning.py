"""Runs from pretrained models: own runs and layer-wise rates; open_clip's and transformers'."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.quick_run import QUICK, write_set

import ito
from ito import export, train
from ito.config import Config, add_options, from_options
from ito.data.augment import CROP, PAPER
from ito.data.dataset import load_dataset
from ito.model import pretrained_dual
from ito.model.encoders import DualEncoder
from ito.model.layers import depths
from ito.model.pretrained import PretrainedImage, PretrainedText
from ito.model.tokenizer import Tokenizer
from ito.trainer import Trainer

SMALL = ["--heads", "2", "--batch-size", "8", "--threads", "1", "--log-every", "1"]
TEXTS = ["a red cat", "Hello, World!!", "!", "dog", "a very long text about a blue dog, on and on"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("few"), items=12, drawings=1)


def pictures(size, width=None):
    """Three of noise, the last of another width."""
    random = np.random.default_rng(3)
    shapes = [(size, w, 3) for w in (size, size, width or size)]
    return [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for shape in shapes]


# --- own runs, rates, presets ---


def test_an_own_run_hands_on_its_sizes_and_scale(few, tmp_path):
    where = ["--train-data", str(few), "--out"]
    fit = ["--fit", "pad", "--lr", "0.02"]
    first = train.main([*where, str(tmp_path / "first"), *QUICK, *fit])
    second = [*where, str(tmp_path / "second"), "--pretrained", str(first)]
    train.main([*second, "--steps", "1", "--lr", "1e-9", "--batch-size", "8", "--threads", "1"])
    abouts = [
        json.loads((tmp_path / run / "model/config.json").read_text())
        for run in ("first", "second")
    ]
    for name in ("architecture", "load_size", "fit"):
        assert abouts[0][name] == abouts[1][name]
    before, after = (
        load_file(tmp_path / run / "model/model.safetensors") for run in ("first", "second")
    )
    assert before["logit_scale"] != pytest.approx(math.log(1 / 0.07), abs=1e-4)
    torch.testing.assert_close(after["logit_scale"], before["logit_scale"], atol=1e-6, rtol=0)


def parsed(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset")
    add_options(parser)
    return from_options(parser.parse_args(words))


def test_depths_count_from_the_top():
    sizes = {"image_size": 16, "width": 16, "heads": 2, "vocab_size": 270, "context_length": 8}
    for patch_size in (None, 8):
        model = DualEncoder(**sizes, image_depth=2, text_depth=3, patch_size=patch_size)
        found = {n: depths(model.image)[p] for n, p in model.image.named_parameters()}
        stem = "stem.weight" if patch_size else "stem.0.weight"
        wanted = {
            "project.weight": 0,
            "norm.weight": 0,
            "blocks.1.qkv.weight": 1,
            "blocks.0.qkv.weight": 2,
            stem: 3,
            "positions": 3,
            "cls": 3,
        }
        assert {name: found[name] for name in wanted} == wanted
        found = {n: depths(model.text)[p] for n, p in model.text.named_parameters()}
        wanted = {"project.weight": 0, "blocks.0.out.bias": 3, "embedding.weight": 4}
        assert {name: found[name] for name in wanted | {"positions": 4}} == wanted | {
            "positions": 4
        }
    with pytest.raises(ValueError, match="layer_decay below 1 needs towers with a list of blocks"):
        depths(torch.nn.Linear(2, 2))


def trainer(few, **options):
    config = Config(
        train_data=str(few), width=16, heads=2, text_depth=2, batch_size=8, steps=4, **options
    )
    data = load_dataset(few, config.load_size)
    tokenizer = Tokenizer.train([c for names in data.captions for c in names], 300, 8)
    return Trainer(config, data, tokenizer, torch.device("cpu"), torch.float32)


def test_each_layer_moves_by_its_share_of_the_rate(few):
    """Adam's first step is the rate, in every weight whose gradient is not tiny."""
    made = trainer(few, objective="siglip", layer_decay=0.5, warmup=0.0, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    bias = made.objective.logit_bias.item()
    logged = made.step(0)
    moved = {n: (p.detach() - before[n]).abs().max() for n, p in made.model.named_parameters()}
    for name, depth in {
        "logit_scale": 0,
        "image.project.weight": 0,
        "image.norm.bias": 0,
        "image.blocks.0.mlp.0.weight": 1,
        "image.stem.0.weight": 2,
        "text.blocks.1.mlp.0.weight": 1,
        "text.blocks.0.mlp.0.weight": 2,
        "text.embedding.weight": 3,
    }.items():
        assert moved[name].item() == pytest.approx(logged["lr"] * 0.5**depth, rel=0.02), name
    assert abs(made.objective.logit_bias.item() - bias) == pytest.approx(logged["lr"], rel=0.02)


def test_without_layer_decay_the_groups_are_those_of_older_checkpoints(few):
    made = trainer(few)
    groups = made.optimizer.param_groups
    assert [[p.ndim >= 2 for p in g["params"]] for g in groups] == [
        [True] * len(groups[0]["params"]),
        [False] * len(groups[1]["params"]),
    ]
    order = [*made.model.parameters(), *made.objective.parameters()]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in order if p.ndim >= 2]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in order if p.ndim < 2]
    assert [g["weight_decay"] for g in groups] == [1.0, 0.0]
    made.step(0)
    old = made.state()
    other = trainer(few)
    other.load(old)
    assert other.optimizer.state_dict()["param_groups"] == old["optimizer"]["param_groups"]
    locked = trainer(few, layer_decay=0.9, pretrained="run", locked="image")
    inside = {id(p) for g in locked.optimizer.param_groups for p in g["params"]}
    assert inside == {id(p) for p in locked.parameters}
    assert not inside & {id(p) for p in locked.model.image.parameters()}


def test_the_preset_of_fine_tuning(few):
    config = parsed("--preset", "finetune", "--pretrained", "run", "--objective", "siglip")
    found = config.lr, config.warmup, config.weight_decay, config.layer_decay
    assert found == (1e-5, 0.05, 0.1, 0.75)
    assert config.augmentation == CROP
    assert parsed("--preset", "finetune").augmentation == PAPER  # two views that must differ
    assert parsed("--preset", "finetune", "--layer-decay", "1").layer_decay == 1
    own = parsed("--pretrained", str(few))
    assert (own.lr, own.layer_decay) == (Config().lr, 1.0)
    for value in ("0", "1.5", "nan"):
        with pytest.raises(ValueError, match="layer_decay must be"):
            parsed("--layer-decay", value)


@pytest.fixture(scope="module")
def first(few, tmp_path_factory):
    """A run of SigLIP, whose scale and bias have moved."""
    out = str(tmp_path_factory.mktemp("own") / "first")
    where = ["--train-data", str(few), "--objective", "siglip", "--out", out]
    return train.main([*where, *QUICK, "--lr", "0.1"])


def trained(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [record for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("objective", ["siglip", "clip", "ito"])
def test_an_own_run_hands_on_its_scale_and_the_same_objective_s_bias(
    objective, first, few, tmp_path
):
    end, bias = ito.load(first).model.logit_scale.item(), trained(first)[-1]["logit_bias"]
    assert min(abs(end - np.log(10)), abs(bias + 10)) > 0.05
    where = ["--train-data", str(few), "--objective", objective, "--out", str(tmp_path / "second")]
    own = ["--fusion-scale", "own"] if objective == "ito" else []
    start = [*QUICK, "--pretrained", str(first), "--steps", "1", "--lr", "1e-9", *own]
    second = train.main([*where, *start])
    assert ito.load(second).model.logit_scale.item() == pytest.approx(end, abs=1e-6)
    got = trained(second)[0]
    if objective == "siglip":
        assert got["logit_bias"] == pytest.approx(bias, abs=1e-4)
    if objective == "ito":
        assert got["fusion_scale"] == pytest.approx(np.exp(end), rel=1e-5)


def test_scale_and_bias_come_together_or_not_at_all(few):
    made = trainer(few, objective="siglip", lr=1e-9)
    made.objective.start_from(made.model, 4.0, None)  # a softmax's scale, with a bias of -10
    assert made.model.logit_scale.item() == pytest.approx(np.log(10))
    assert made.objective.logit_bias.item() == -10
    made.objective.start_from(made.model, 4.75, -16.0)
    assert made.objective.logit_bias.item() == -16
    made.load(made.state())  # above the limit of training, log(100): it is not cut
    assert made.step(0)["logit_scale"] == pytest.approx(np.exp(4.75), rel=1e-5)


# --- open_clip ---


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="the extra open_clip, and torchvision")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the extra hf")


@pytest.fixture(scope="module")
def clip_folder(open_clip, tmp_path_factory):
    """A CLIP of two narrow layers per tower, with its own normalisation of pictures."""
    folder = tmp_path_factory.mktemp("clip")
    about = {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "patch_size": 16,
            "patch_dropout": 0.5,
        },
        "text_cfg": {"context_length": 20, "width": 16, "heads": 2, "layers": 2},
        "quick_gelu": True,
    }
    normal = {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "resize_mode": "squash"}
    text = json.dumps({"model_cfg": about, "preprocess_cfg": normal})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**about)
    for parameter in model.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 3.25)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def open_clip_embeddings(open_clip, folder, images):
    """(images, texts) of a folder as open_clip computes them, and the logit scale."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        found = (
            model.eval().encode_image(torch.stack([preprocess(p) for p in images]), normalize=True),
            model.encode_text(ids, normalize=True),
        )
    return *found, model.logit_scale.item()


def untrained(start, few, tmp_path, *more):
    """The run after one step whose rate is too small to move a weight."""
    where = ["--train-data", str(few), "--out", str(tmp_path / "still"), "--pretrained", start]
    return train.main([*where, *SMALL, "--steps", "1", "--lr", "1e-9", *more])


def test_an_open_clip_model_is_kept_before_the_first_step(
    open_clip, clip_folder, few, tmp_path, capsys
):
    start = f"open_clip:local-dir:{clip_folder}"
    run = untrained(start, few, tmp_path, "--objective", "clip")
    image, text, scale = open_clip_embeddings(open_clip, clip_folder, pictures(32, 48))
    model = ito.load(run)
    torch.testing.assert_close(model.encode_image(pictures(32, 48)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    assert model.model.logit_scale.item() == pytest.approx(scale, abs=1e-6) == 3.25
    assert min(torch.pdist(rows).min() for rows in (image, text)) > 0.01  # they are told apart
    assert f"preset     finetune: --pretrained {start}" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    wanted = {"width": 12, "image_size": 32, "load_size": 32, "context_length": 20, "fit": "warp"}
    assert {name: config[name] for name in wanted} == wanted


def test_a_run_from_open_clip_needs_its_weights_no_more_and_goes_back(
    open_clip, clip_folder, few, tmp_path, capsys
):
    source = shutil.copytree(clip_folder, tmp_path / "source")
    run = tmp_path / "run"
    where = ["--train-data", str(few), "--out", str(run)]
    start = ["--pretrained", f"open_clip:local-dir:{source}", "--lr", "1e-3"]
    train.main([*where, *start, *SMALL, "--steps", "3", "--checkpoint-every", "2"])
    whole = load_file(run / "model/model.safetensors")
    shutil.rmtree(source)
    (run / "checkpoints/step_0000003.pt").unlink()
    train.main(["--resume", str(run)])
    resumed = load_file(run / "model/model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    export.main([str(run), "--open-clip", str(tmp_path / "back")])
    image, text, _ = open_clip_embeddings(open_clip, tmp_path / "back", pictures(32, 48))
    model = ito.load(run)
    torch.testing.assert_close(model.encode_image(pictures(32, 48)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    before, after = (
        load_file(folder / "open_clip_model.safetensors")
        for folder in (clip_folder, tmp_path / "back")
    )
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    assert not any(torch.equal(before[n], after[n]) for n in before if n.endswith("in_proj_weight"))
    about = [
        json.loads((folder / "open_clip_config.json").read_text())
        for folder in (clip_folder, tmp_path / "back")
    ]
    assert about[0]["model_cfg"] == about[1]["model_cfg"]
    assert about[0]["preprocess_cfg"].items() <= about[1]["preprocess_cfg"].items()
    with pytest.raises(SystemExit):
        export.main([str(run), "--hf", str(tmp_path / "hf")])
    assert "--hf: the run did not begin with --pretrained hf:NAME" in capsys.readouterr().err
    # the run is itself a start, with its sizes
    second = ["--train-data", str(few), "--out", str(tmp_path / "second"), "--pretrained", str(run)]
    train.main([*second, *SMALL, "--steps", "1", "--lr", "1e-9", "--lock-image"])
    kept = load_file(tmp_path / "second/model/model.safetensors")
    for name, value in resumed.items():
        torch.testing.assert_close(kept[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_keeps_all_of_it_with_its_projection(locked, clip_folder, few, tmp_path):
    where = ["--train-data", str(few), "--out", str(tmp_path / "run"), f"--lock-{locked}"]
    start = ["--pretrained", f"open_clip:local-dir:{clip_folder}", "--lr", "1e-3"]
    run = train.main([*where, *start, *SMALL, "--steps", "2"])
    before = load_file(clip_folder / "open_clip_model.safetensors")
    after = load_file(run / "model/model.safetensors")
    for tower, prefix in (("image", "visual."), ("text", "")):
        body = f"{tower}.body.network."
        names = [n.removeprefix(body) for n in after if n.startswith(body)]
        assert {"proj", "text_projection"} & {*names}
        same = [torch.equal(before[prefix + n], after[body + n]) for n in names]
        assert all(same) if tower == locked else not any(same)


def test_an_export_for_open_clip_is_itself_a_start_with_its_tokenizer(
    open_clip, transformers, few, tmp_path
):
    """The own towers of --patch-size, in open_clip's modules, give the same embeddings."""
    about = ["--patch-size", "8", "--image-size", "32", "--load-size", "32", "--lr", "1e-2"]
    where = ["--train-data", str(few), "--out", str(tmp_path / "own")]
    own = train.main([*where, *QUICK, *about])
    export.main([str(own), "--open-clip", str(tmp_path / "oc")])
    run = untrained(f"open_clip:local-dir:{tmp_path / 'oc'}", few, tmp_path)
    export.main([str(run), "--open-clip", str(tmp_path / "back")])
    ours, theirs = ito.load(own), ito.load(run)
    image, text, scale = open_clip_embeddings(open_clip, tmp_path / "back", pictures(32))
    for model in (ours, theirs):
        torch.testing.assert_close(model.encode_image(pictures(32)), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-5, rtol=0)
        assert model.model.logit_scale.item() == pytest.approx(scale, abs=1e-6)
    assert torch.pdist(text).min() > 0.01  # they are told apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-encoder ours --patch-size 16", "does not take image_encoder, patch_size"),
        ("--width 16", "width must be 12 with --pretrained open_clip:local-dir"),
        ("--image-size 48", "image_size must be 32 with --pretrained open_clip"),
        ("--context-length 21", "context_length must be at most 20 with --pretrained open_clip"),
        ("--lock-image --lock-text", "--lock-image and --lock-text together train only"),
    ],
)
def test_options_that_contradict_the_model_are_named(
    options, message, clip_folder, few, tmp_path, capsys
):
    start = ["--pretrained", f"open_clip:local-dir:{clip_folder}", *options.split()]
    with pytest.raises(SystemExit):
        train.main(["--train-data", str(few), "--out", str(tmp_path / "run"), *start])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- transformers ---


SCALE = {"clip": 2.5, "siglip": 4.75}  # SigLIP's is above the limit of training, log(100)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual(request, transformers, tmp_path_factory):
    """(kind, folder) of a CLIP whose padding is its end token, or of a SigLIP."""
    from tokenizers import processors

    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "attention_dropout": 0.1}
    bpe = Tokenizer.train([*TEXTS, "red cat"], 300, 12).bpe
    bpe.no_padding()
    bpe.no_truncation()
    pad = "<eot>" if kind == "clip" else "<pad>"
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eot>", special_tokens=[("<bos>", 1), ("<eot>", 2)]
    )
    special = {"bos_token": "<bos>", "pad_token": pad, "eos_token": "<eot>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=12, **special
    ).save_pretrained(folder)
    text = size | {"vocab_size": 300, "max_position_embeddings": 12}
    image = size | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(1)
    if kind == "clip":
        # an end token of 2 would mean the highest id
        text |= {"eos_token_id": 2}
        config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
        model = transformers.CLIPModel(config)
    else:
        text |= {"projection_size": 16}
        config = transformers.SiglipConfig(text_config=text, vision_config=image)
        model = transformers.SiglipModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, SCALE[kind])
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}  # SigLIP sees all of a picture
    about = {"image_processor_type": "CLIPImageProcessor", "resample": 3}
    about |= {"size": {"shortest_edge": 32} if kind == "clip" else square}
    about |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return kind, folder


def hf_embeddings(transformers, folder, images):
    """(images, texts) of a folder as transformers computes them, and scale and bias."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    about = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(about[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    bytes_ = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in images])
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = (
            model.get_image_features(pixel_values=(bytes_ / 255 - mean) / std),
            model.get_text_features(input_ids=ids),
        )
    rows = [getattr(f, "pooler_output", f) for f in found]
    bias = getattr(model, "logit_bias", None)
    scales = model.logit_scale.item(), None if bias is None else bias.item()
    return *(row / row.norm(dim=1, keepdim=True) for row in rows), *scales


def assert_sentence_transformers(folder, image, text):
    """Where it is installed, it loads the folder and gives the same unit rows."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return
    theirs = SentenceTransformer(str(folder), device="cpu")
    for inputs, want in ((pictures(32), image), (TEXTS, text)):
        got = theirs.encode(inputs, convert_to_tensor=True)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_model_of_transformers_is_kept_and_goes_back(dual, transformers, few, tmp_path):
    kind, folder = dual
    run = untrained(f"hf:{folder}", few, tmp_path, "--objective", kind)
    image, text, scale, bias = hf_embeddings(transformers, folder, pictures(32))
    model = ito.load(run)
    torch.testing.assert_close(model.encode_image(pictures(32)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    assert model.model.logit_scale.item() == pytest.approx(scale, abs=1e-6) == SCALE[kind]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first.get("logit_bias") == (None if bias is None else pytest.approx(bias, abs=1e-6))

    # a shorter context changes nothing for a text that fits: SigLIP pads to its own length
    model.model.text.context_length = 8
    ids = model.tokenizer(["dog"])[:, :8]
    assert (ids == 0).any()
    torch.testing.assert_close(model.model.encode_text(ids), text[3:4], atol=1e-5, rtol=0)

    source = shutil.copytree(folder, tmp_path / "source")
    where = ["--train-data", str(few), "--out", str(tmp_path / "run")]
    start = ["--pretrained", f"hf:{source}", "--lr", "1e-3", "--objective", kind]
    run = train.main([*where, *start, *SMALL, "--steps", "3"])
    shutil.rmtree(source)
    back = tmp_path / "back"
    export.main([str(run), "--hf", str(back)])
    image, text, scale, bias = hf_embeddings(transformers, back, pictures(32))
    model = ito.load(run)
    torch.testing.assert_close(model.encode_image(pictures(32)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    assert model.model.logit_scale.item() == scale != SCALE[kind]
    assert_sentence_transformers(back, image, text)
    before, after = (load_file(place / "model.safetensors") for place in (folder, back))
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    trained = [not torch.equal(before[n], after[n]) for n in before if n.endswith("proj.weight")]
    assert trained
    assert all(trained)
    processor = json.loads((back / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.1, 0.2, 0.3]
    seen = json.loads((run / "config.json").read_text())["fit"], processor["do_center_crop"]
    assert seen == {"clip": ("crop", True), "siglip": ("warp", False)}[kind]
    with pytest.raises(SystemExit):
        export.main([str(run), "--open-clip", str(tmp_path / "oc")])


def test_what_is_no_dual_encoder_is_named(transformers, few, tmp_path, capsys):
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config.save_pretrained(tmp_path / "bert")
    for start, message in (
        (f"hf:{tmp_path / 'bert'}", "is a model of the type bert; expected one of clip, siglip"),
        ("hf:", "pretrained must be open_clip:NAME, hf:NAME or a run folder, got 'hf:'"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--train-data", str(few), "--pretrained", start])
        assert message in capsys.readouterr().err


def test_a_model_of_open_clip_with_other_towers_is_named(open_clip, few, capsys):
    for name, message in (
        ("RN50/openai", "has a ResNet; expected a CLIP with a ViT"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "has hf_model_name; expected"),
        ("ViT-H-14-CLIPA/datacomp1b", "has tokenizer_kwargs; expected"),
        ("ViT-B-16-SigLIP/webli", "is no plain CLIP: it has init_logit_bias"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--train-data", str(few), "--pretrained", f"open_clip:{name}"])
        assert message in capsys.readouterr().err


def test_depths_of_other_packages_towers(transformers):
    timm = pytest.importorskip("timm", reason="the extra timm, and torchvision")

    def found(kind, tower, about, *sizes):
        made = tower({"name": kind} | about, *sizes, 8)
        return {name: depths(made)[p] for name, p in made.named_parameters()}

    picture = {"image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    for name, wanted in (
        (
            "vit_tiny_patch16_224",
            {"blocks.11.mlp.fc1.weight": 1, "blocks.0.mlp.fc1.weight": 12, "pos_embed": 13},
        ),
        (
            "resnet10t",
            {"layer4.0.conv1.weight": 1, "layer1.0.conv1.weight": 4, "conv1.0.weight": 5},
        ),
    ):
        got = found("timm", PretrainedImage, {"architecture": name} | picture, 224)
        assert {n: got[f"body.network.{n}"] for n in wanted} == wanted
        assert got["project.weight"] == got["norm.weight"] == 0
    assert timm.__version__
    config = transformers.RobertaConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=20
    )
    about = {"config": json.loads(config.to_json_string(use_diff=False)), "pad_id": 1}
    got = found("hf", PretrainedText, about, 12)
    wanted = {
        "body.network.encoder.layer.2.output.dense.weight": 1,
        "body.network.encoder.layer.0.output.dense.weight": 3,
        "body.network.embeddings.word_embeddings.weight": 4,
        "project.weight": 0,
    }
    assert {name: got[name] for name in wanted} == wanted


def test_depths_of_projected_towers(clip_folder, dual):
    about = pretrained_dual.describe(f"open_clip:local-dir:{clip_folder}")
    image = PretrainedImage(about["image_encoder"], 32, 12)
    text = PretrainedText(about["text_encoder"], 20, 12)
    got = {n: depths(tower)[p] for tower in (image, text) for n, p in tower.named_parameters()}
    wanted = {
        "proj": 0,
        "ln_post.weight": 0,
        "transformer.resblocks.1.mlp.c_fc.weight": 1,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
        "conv1.weight": 3,
        "class_embedding": 3,
        "ln_pre.weight": 3,
        "text_projection": 0,
        "ln_final.weight": 0,
        "token_embedding.weight": 3,
    }
    assert {name: got[f"body.network.{name}"] for name in wanted} == wanted
    kind, folder = dual
    about = pretrained_dual.describe(f"hf:{folder}")
    image = PretrainedImage(about["image_encoder"], 32, about["width"])
    text = PretrainedText(about["text_encoder"], 12, about["width"])
    got = {n: depths(tower)[p] for tower in (image, text) for n, p in tower.named_parameters()}
    heads = {
        "clip": ("visual_projection.weight", "text_projection.weight"),
        "siglip": ("vision_model.head.probe", "text_model.head.weight"),
    }
    wanted = {
        "vision_model.post_layernorm.weight": 0,
        "vision_model.encoder.layers.1.mlp.fc1.weight": 1,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 2,
        "vision_model.embeddings.patch_embedding.weight": 3,
        "text_model.embeddings.token_embedding.weight": 3,
        "text_model.final_layer_norm.weight": 0,
    } | dict.fromkeys(heads[kind], 0)
    assert {name: got[f"body.{name}"] for name in wanted} == wanted
