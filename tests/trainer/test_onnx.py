"""The ONNX export: its two models give the embeddings of the dual encoder."""

import pytest
import torch
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


def test_onnx_names_its_extra(run, tmp_path, monkeypatch):
    from ito.model import onnx

    monkeypatch.setattr(onnx, "PACKAGES", ("torch", "not_a_package"))
    with pytest.raises(ImportError, match=r"needs not_a_package, .* 'ito_kernels\[onnx\]'"):
        onnx.export_onnx(ito.load(run).model, tmp_path)
