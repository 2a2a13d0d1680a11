"""The export for open_clip: its state dict, run by CLIP's forward written out in fp64."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import untrained_run

from ito import export
from ito.checkpoint import save_checkpoint
from ito.data.pictures import square
from ito.model.encoders import DualEncoder
from ito.model.fusion import Fusion
from ito.model.open_clip import export_open_clip
from ito.model.tokenizer import Tokenizer

TEXTS = ["a red cat", "dog", "a very long text about a blue dog that goes on and on and on"]


@pytest.fixture(scope="module")
def plain():
    """(dual encoder with CLIP's towers, tokenizer); weights large enough to tell inputs apart."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red cat", "blue dog"], 300, 12)
    model = DualEncoder(
        image_size=32,
        width=24,
        heads=3,
        image_depth=2,
        text_depth=3,
        vocab_size=tokenizer.vocab_size,
        context_length=12,
        image_width=32,
        image_heads=4,
        patch_size=8,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), tokenizer


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def resblocks(x, weights, prefix: str, layers: int, heads: int, causal: bool):
    length, width = x.shape
    size = width // heads
    for n in range(layers):
        p = f"{prefix}transformer.resblocks.{n}."
        normed = norm(x, weights, p + "ln_1")
        qkv = normed @ weights[p + "attn.in_proj_weight"].T + weights[p + "attn.in_proj_bias"]
        q, k, v = qkv.split(width, dim=1)
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            if causal:
                scores = scores + torch.full((length, length), -torch.inf).triu(1)
            mixed.append(scores.softmax(1) @ v[:, part])
        out = torch.cat(mixed, 1) @ weights[p + "attn.out_proj.weight"].T
        x = x + out + weights[p + "attn.out_proj.bias"]
        y = norm(x, weights, p + "ln_2")
        y = y @ weights[p + "mlp.c_fc.weight"].T + weights[p + "mlp.c_fc.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + y @ weights[p + "mlp.c_proj.weight"].T + weights[p + "mlp.c_proj.bias"]
    return x


def clip_image(weights, cfg, image):
    cfg, size = cfg["vision_cfg"], cfg["vision_cfg"]["patch_size"]
    patches = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4)
    kernel = weights["visual.conv1.weight"]
    x = patches.reshape(-1, kernel[0].numel()) @ kernel.flatten(1).T
    x = torch.cat([weights["visual.class_embedding"][None], x])
    x = x + weights["visual.positional_embedding"]
    assert cfg["no_ln_pre"]
    heads = cfg["width"] // cfg["head_width"]
    x = resblocks(x, weights, "visual.", cfg["layers"], heads, causal=False)
    x = norm(x, weights, "visual.ln_post")[0] @ weights["visual.proj"]
    return x / x.norm()


def clip_text(weights, cfg, ids):
    cfg = cfg["text_cfg"]
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = resblocks(x, weights, "", cfg["layers"], cfg["heads"], causal=True)
    assert cfg["pool_type"] == "eos"
    end = ids.tolist().index(cfg["eos_id"])
    x = norm(x, weights, "ln_final")[end] @ weights["text_projection"]
    return x / x.norm()


def test_the_weights_give_clip_the_model_s_embeddings(plain, tmp_path):
    model, tokenizer = plain
    export_open_clip(model, tokenizer, tmp_path)
    cfg = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights = {name: value.double() for name, value in weights.items()}
    pixels, ids = torch.randn(3, 3, 32, 32), tokenizer(TEXTS)
    images = torch.stack([clip_image(weights, cfg, image.double()) for image in pixels])
    texts = torch.stack([clip_text(weights, cfg, row) for row in ids])
    torch.testing.assert_close(model.encode_image(pixels).double(), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids).double(), texts, atol=1e-5, rtol=0)
    assert (texts @ texts.T).fill_diagonal_(0).max() < 0.999  # the texts are told apart
    assert (images @ images.T).fill_diagonal_(0).max() < 0.999
    parameters = sum(p.numel() for p in model.parameters())
    bias = model.image.stem.bias.numel()  # it goes into the positions
    assert sum(value.numel() for value in weights.values()) == parameters - bias


def test_open_clip_loads_the_folder(plain, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    model, tokenizer = plain
    export_open_clip(model, tokenizer, tmp_path)
    theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    assert torch.equal(ids, tokenizer(TEXTS))
    pixels = torch.randn(3, 3, 32, 32)
    for ours, got in (
        (model.encode_image(pixels), theirs.eval().encode_image(pixels, normalize=True)),
        (model.encode_text(ids), theirs.encode_text(ids, normalize=True)),
    ):
        torch.testing.assert_close(got, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fit", "mode"), [("crop", "shortest"), ("pad", "longest"), ("warp", "squash")]
)
def test_open_clip_makes_squares_as_the_run_did(plain, fit, mode, tmp_path):
    """Its own preprocessing, where it is installed; pad and warp are equal to the bit."""
    export_open_clip(*plain, tmp_path, fit)
    about = json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (about["resize_mode"], about["fill_color"]) == (mode, 255)
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    _, _, make = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    coarse = torch.randint(0, 256, (5, 5, 3), generator=torch.Generator().manual_seed(0))
    for size in ((96, 64), (64, 128), (50, 50), (192, 65)):
        coarse_image = Image.fromarray(coarse.to(torch.uint8).numpy())
        image = coarse_image.resize(size, Image.Resampling.BICUBIC)
        want = (make(image) + 1).mul(127.5).permute(1, 2, 0).numpy()
        off = abs(square(image, 32, fit=fit) - want)
        assert off.max() <= 2.01, (fit, size)  # grey levels; crop only, where it scales first


def test_the_command_exports_clip_s_towers_and_refuses_others(plain, tmp_path, capsys):
    model, tokenizer = plain
    data = untrained_run.write_data(tmp_path / "data")
    run = untrained_run.write_run(tmp_path / "run", data)
    fusion = Fusion(4, 24, heads=3).state_dict()
    about = {"load_size": 32, "step": 7, "fusion": fusion}
    tokenizer.save(run / "model" / "tokenizer.json")
    state = about | {"architecture": model.architecture, "model": model.state_dict()}
    save_checkpoint(run / "checkpoints", 7, state)
    export.main([str(run), "--open-clip", str(tmp_path / "oc")])
    names = {path.name for path in (tmp_path / "oc").iterdir()}
    assert names == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    written = load_file(tmp_path / "oc" / "open_clip_model.safetensors")
    assert not any("fusion" in name for name in written)
    stem = DualEncoder(**model.architecture | {"patch_size": None})
    other = {"architecture": stem.architecture, "model": stem.state_dict()}
    save_checkpoint(run / "checkpoints", 8, state | other)
    with pytest.raises(SystemExit):
        export.main([str(run), "--open-clip", str(tmp_path / "refused")])
    error = "error: --open-clip: open_clip has no towers like this run's, which have a CNN stem"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
