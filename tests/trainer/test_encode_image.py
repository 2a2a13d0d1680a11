"""`ito.load(RUN)`: the same picture has the same embedding in every form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import untrained_run

import ito


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run.write(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(run):
    return ito.load(run)


@pytest.fixture
def picture():
    """Coloured noise, no square."""
    random = np.random.default_rng(1)
    return random.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1)


def saved(values, form: str, path: Path, **options) -> Path:
    Image.fromarray(values).save(path, form, **options)
    return path


def test_a_picture_has_one_embedding_in_every_form(encoder, picture, tmp_path):
    path = saved(picture, "PNG", tmp_path / "a.png")
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    with Image.open(path) as opened:
        opened.load()
    forms = [path, str(path), path.read_bytes(), picture, opened, tensor, picture[::-1][::-1]]
    (want,) = encoder.encode_image([path])
    for form in forms:
        got = encoder.encode_image(form)
        assert got.shape == (1, 16)
        assert torch.equal(got[0], want)
    stacks = (np.stack([picture] * 7), torch.stack([tensor] * 7))
    for several in (forms, tuple(forms), (form for form in forms), *stacks):
        got = encoder.encode_image(several)  # a batch of 7 rounds in another order
        torch.testing.assert_close(got, want.expand(7, -1), atol=1e-6, rtol=0)
    assert encoder.encode_image([]).shape == (0, 16)


def test_grey_and_transparent_arrays_are_those_of_their_files(encoder, picture, tmp_path):
    grey = picture[..., 0]
    opacity = np.concatenate([picture, grey[..., None]], 2)
    for values in (grey, opacity):
        path = saved(values, "PNG", tmp_path / "a.png")
        assert torch.equal(encoder.encode_image(values), encoder.encode_image(path))
    white = np.full_like(picture, 255)
    clear = np.concatenate([picture, np.zeros_like(grey)[..., None]], 2)
    assert torch.equal(encoder.encode_image(clear), encoder.encode_image(white))


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(encoder, picture, tmp_path):
    """Its pixels give nearly the same embedding; its bytes the same one."""
    path = saved(picture.repeat(3, 0).repeat(3, 1), "JPEG", tmp_path / "a.jpg", quality=95)
    with Image.open(path) as opened:
        pixels = np.array(opened)
    assert pixels.shape[0] >= 16 * encoder.load_size
    read = encoder.encode_image(path)
    assert torch.equal(encoder.encode_image(path.read_bytes()), read)
    assert (encoder.encode_image(pixels) @ read.T).item() > 0.99


def test_what_is_no_picture_is_refused_by_name(encoder, picture, tmp_path):
    text = tmp_path / "a.png"
    text.write_text("a text")
    for given, kind, told in (
        (None, TypeError, "images must be a path, .* got NoneType"),
        (3, TypeError, "images must be a path, .* got int"),
        ({"a": 1}, TypeError, "images must be a path, .* got dict"),
        ([picture, None], TypeError, r"images\[1\] must be a path, .* got NoneType"),
        ([[picture]], TypeError, r"images\[0\] must be a path, .* got list"),
        (b"", ValueError, r"images\[0\]: not a picture: a file of 0 bytes"),
        ([text, b"a text"], ValueError, r"images\[0\]: not a picture: .*a\.png"),
        (picture.astype(np.float32), ValueError, r"images\[0\] must be uint8 .* got float32"),
        (picture[..., :2], ValueError, r"got uint8 \(180, 240, 2\)"),
        (picture[:0], ValueError, r"images\[0\] must be uint8"),
        (picture[0, 0, 0], TypeError, r"images must be a path"),
        (np.stack([picture])[None], ValueError, r"got uint8 \(1, 180, 240, 3\)"),
        (
            torch.zeros(3, 8, 8),
            ValueError,
            r"must be uint8 \(3, H, W\), got torch.float32 \(3, 8, 8\)",
        ),
        (
            torch.zeros(8, 8, 3, dtype=torch.uint8),
            ValueError,
            r"\(3, H, W\), got torch.uint8 \(8, 8, 3",
        ),
        (Image.new("RGB", (0, 4)), ValueError, r"images\[0\]: unreadable picture"),
    ):
        with pytest.raises(kind, match=told):
            encoder.encode_image(given)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta", "mps:7"])
def test_a_device_that_there_is_not_is_named(name, run):
    with pytest.raises(ValueError, match=f"^device {name}: ") as raised:
        ito.load(run, device=name)
    assert "\n" not in str(raised.value)


def test_a_gpu_that_there_is_not_is_named(run):
    if torch.cuda.is_available():
        assert ito.load(run, device="cuda").encode_text("red").shape == (1, 16)
        return
    with pytest.raises(ValueError, match=r"^device cuda: .+"):
        ito.load(run, device="cuda")
