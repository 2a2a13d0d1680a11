"""The ONNX export: its two models give the embeddings of the dual encoder."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import untrained_run

import ito
from ito.model.encoders import DualEncoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return untrained_run.write_data(tmp_path_factory.mktemp("onnx") / "data")


@pytest.fixture(scope="module")
def run(data):
    return untrained_run.write_run(data.parent / "run", data)


@pytest.mark.parametrize("patch", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_the_onnx_pair_gives_the_model_s_embeddings(run, tmp_path, patch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package}: the extra `onnx` is not installed")
    import onnx
    import onnxruntime

    from ito.model.onnx import export_onnx

    encoder = ito.load(run)
    if patch:  # CLIP's towers: patches, causal text
        encoder.model = DualEncoder(**encoder.model.architecture | {"patch_size": patch}).eval()
    paths = export_onnx(encoder.model, tmp_path)
    image, text = (onnxruntime.InferenceSession(str(path)) for path in paths)
    for batch in (1, 3, 7):
        pixels = torch.randn(batch, 3, 16, 16)
        ids = encoder.tokenizer([f"a {'big ' * n}cat" for n in range(batch)])
        for session, name, given, want in (
            (image, "pixels", pixels, encoder.model.encode_image(pixels)),
            (text, "ids", ids, encoder.model.encode_text(ids)),
        ):
            got = torch.from_numpy(session.run(None, {name: given.numpy()})[0])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    numbers = sum(
        len(onnx.numpy_helper.to_array(weight).flatten())
        for path in paths
        for weight in onnx.load(path).graph.initializer
    )
    model = sum(value.numel() for value in encoder.model.state_dict().values())
    assert numbers < model + 200  # both towers, shapes and constants: no fusion module


def test_the_metadata_is_enough_to_embed_a_picture_and_a_text(run, tmp_path):
    """Prepared by what the files say, without ito: Pillow, tokenizers and NumPy."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package}: the extra `onnx` is not installed")
    import onnxruntime
    from tokenizers import Tokenizer

    from ito.model.onnx import export_onnx

    encoder = ito.load(run)
    encoder.load_size = 16  # a square of the model's size, as the files have it
    paths = export_onnx(encoder.model, tmp_path, "crop", encoder.tokenizer)
    image, text = (onnxruntime.InferenceSession(str(path)) for path in paths)
    about = image.get_modelmeta().custom_metadata_map
    size = int(about["image_size"])
    wanted = {"fit": "crop", "resize": "bicubic", "channels": "RGB", "background": "white"}
    assert wanted.items() <= about.items()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8))
    square = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, np.float32).transpose(2, 0, 1)[None] / 255
    pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
    got = torch.from_numpy(image.run(None, {"pixels": pixels})[0])
    torch.testing.assert_close(got, encoder.encode_image(picture), atol=1e-5, rtol=0)

    about = text.get_modelmeta().custom_metadata_map
    ids = Tokenizer.from_str(about["tokenizer"]).encode("a red cat and more than that fits").ids
    assert len(ids) == int(about["context_length"]) == 8
    assert max(ids) < int(about["vocab_size"])
    got = torch.from_numpy(text.run(None, {"ids": np.array([ids])})[0])
    want = encoder.encode_text("a red cat and more than that fits")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_onnx_names_its_extra(run, tmp_path, monkeypatch):
    from ito.model import onnx

    monkeypatch.setattr(onnx, "PACKAGES", ("torch", "not_a_package"))
    with pytest.raises(ImportError, match=r"needs not_a_package, .* 'ito_trainer\[onnx\]'"):
        onnx.export_onnx(ito.load(run).model, tmp_path)
