"""The augmentation against its steps written out one after the other in fp64."""

import dataclasses
import math

import pytest
import torch

from ito.data.augment import LUMA, PAPER, Augmentation, augment, blur, color, crop, eval_transform

NOTHING = Augmentation(scale=(1, 1), ratio=(1, 1), jitter_p=0.0, gray_p=0.0, blur_p=0.0, flip_p=0.0)
LOUD = dataclasses.replace(PAPER, jitter=(0.4, 0.4, 0.4, 0.3), jitter_p=1.0)


def pictures(batch, size, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, size, size), generator=random).to(torch.uint8)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("config", [PAPER, Augmentation()], ids=["paper", "default"])
def test_views_are_a_function_of_the_generator(config):
    x = pictures(6, 16)
    before = x.clone()
    random = generator(3)
    first, second = augment(x, 8, random, config), augment(x, 8, random, config)
    assert torch.equal(x, before)
    assert first.shape == (6, 3, 8, 8)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert -1 <= first.min() < first.max() <= 1
    assert not torch.equal(first, second)

    resumed = generator(3)
    assert torch.equal(augment(x, 8, resumed, config), first)
    state = resumed.get_state()
    torch.rand(7)  # the global generator plays no part
    other = torch.Generator()
    other.set_state(state)
    assert torch.equal(augment(x, 8, other, config), second)


def test_values_stay_in_range():
    for value in (0, 255):
        x = torch.full((50, 3, 8, 8), value, dtype=torch.uint8)
        view = augment(x, 8, generator(), dataclasses.replace(LOUD, blur_p=1.0))
        assert -1 <= view.min() <= view.max() <= 1


@pytest.mark.parametrize("out_size", [8, 11, 16, 20])
def test_without_strength_a_view_is_the_evaluated_picture(out_size):
    x = pictures(3, 16)
    torch.testing.assert_close(
        augment(x, out_size, generator(), NOTHING), eval_transform(x, out_size), atol=1e-5, rtol=0
    )


def test_evaluation_halves_by_the_mean_of_four_pixels():
    x = pictures(2, 8)
    mean = x.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(eval_transform(x, 4).double(), mean / 127.5 - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(eval_transform(x, 8).double(), x.double() / 127.5 - 1)


def sample(picture, row, column):
    """Bilinear value at a point in pixel units, centres at .5, the border continued."""
    size = picture.shape[-1]
    row, column = row - 0.5, column - 0.5
    top, left = math.floor(row), math.floor(column)
    value = 0
    for i, wi in ((top, 1 - (row - top)), (top + 1, row - top)):
        for j, wj in ((left, 1 - (column - left)), (left + 1, column - left)):
            value += wi * wj * picture[:, min(max(i, 0), size - 1), min(max(j, 0), size - 1)]
    return value


def test_crop_is_the_formula():
    size, out = 12, 7
    x, u = uniform(5, 3, size, size).double(), uniform(5, 5, seed=1).double()
    u[0, :2], u[1, :2] = 1, torch.tensor([1.0, 0.0])  # wider, and higher, than the picture
    u[4] = torch.tensor([0.0, 1, 0, 1, 0])  # flip, do not, ...
    config = dataclasses.replace(PAPER, scale=(0.3, 0.9))
    got = crop(x, out, u, config)
    for b in range(5):
        area = 0.3 + 0.6 * float(u[0, b])
        ratio = (3 / 4) * (16 / 9) ** float(u[1, b])
        width, height = min(1, math.sqrt(area * ratio)), min(1, math.sqrt(area / ratio))
        left, top = (1 - width) * float(u[2, b]), (1 - height) * float(u[3, b])
        for i in range(out):
            for j in range(out):
                column = out - 1 - j if u[4, b] == 0 else j
                want = sample(
                    x[b],
                    size * (top + height * (i + 0.5) / out),
                    size * (left + width * (column + 0.5) / out),
                )
                torch.testing.assert_close(got[b, :, i, j], want, atol=1e-9, rtol=0)


def test_color_is_the_chain_of_its_steps():
    """Brightness, contrast, a turn of the hue about the grey axis, saturation; then greyscale."""
    x, u = uniform(6, 3, 5, 5).double(), uniform(6, 6, seed=1).double()
    u[4] = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, 0.1])  # jittered with p = .8
    u[5] = torch.tensor([0.9, 0.9, 0.1, 0.1, 0.9, 0.9])  # grey with p = .2
    config = dataclasses.replace(LOUD, jitter_p=0.8)
    got = color(x, u, config)
    luma = torch.tensor(LUMA, dtype=torch.float64)
    # the grey axis, and two directions across it: red, and red's quarter turn towards green
    basis = torch.tensor([[1, 1, 1], [2, -1, -1], [0, 1, -1]], dtype=torch.float64)
    basis /= basis.norm(dim=1, keepdim=True)
    for b in range(6):
        y = x[b].flatten(1)
        if u[4, b] < 0.8:
            factor = [1 + 0.4 * (2 * float(v) - 1) for v in u[:3, b]]
            angle = 2 * math.pi * 0.3 * (2 * float(u[3, b]) - 1)
            y = factor[0] * y
            y = factor[1] * y + (1 - factor[1]) * (luma @ y).mean()
            gray, red, green = basis @ y
            turned = (
                gray,
                red * math.cos(angle) - green * math.sin(angle),
                red * math.sin(angle) + green * math.cos(angle),
            )
            y = basis.T @ torch.stack(turned)
            y = factor[2] * y + (1 - factor[2]) * (luma @ y)
        if u[5, b] < 0.2:
            y = (luma @ y).expand(3, -1)
        torch.testing.assert_close(got[b].flatten(1), y, atol=1e-6, rtol=0)


def test_hue_turns_red_towards_green():
    red = torch.zeros(1, 3, 1, 1)
    red[:, 0] = 1
    u = torch.tensor([0.5, 0.5, 0.5, 1.0, 0.0, 1.0])[:, None]  # a turn of + 0.3, nothing else
    turned = color(red, u, LOUD).flatten()
    assert turned.argmax() == 1
    assert turned.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [32, 112])  # a radius of 1 and of 3 pixels
def test_blur_is_the_formula(size):
    x, u = uniform(4, 3, size, size).double(), uniform(2, 4, seed=1).double()
    u[0] = torch.tensor([0.1, 0.9, 0.1, 0.1])
    got = blur(x, u, PAPER)
    assert torch.equal(got[1], x[1])
    radius = math.ceil(3 * 2.0 * size / 224)
    for b in (0, 2, 3):
        sigma = (0.1 + 1.9 * float(u[1, b])) * size / 224
        weight = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-radius, radius + 1)]
        for i, j in ((0, 0), (5, 1), (size - 1, size // 2)):
            want = (
                sum(
                    weight[di + radius]
                    * weight[dj + radius]
                    * x[b, :, min(max(i + di, 0), size - 1), min(max(j + dj, 0), size - 1)]
                    for di in range(-radius, radius + 1)
                    for dj in range(-radius, radius + 1)
                )
                / sum(weight) ** 2
            )
            torch.testing.assert_close(got[b, :, i, j], want, atol=1e-9, rtol=0)


def test_rates():
    """Standard deviation of a rate over 4,000 pictures: at most 0.008."""
    x = torch.zeros(4000, 3, 4, 4, dtype=torch.uint8)
    x[:, 0, :, :2] = 200  # the left half red
    plain = eval_transform(x, 4)

    def changed(**only):
        view = augment(x, 4, generator(), dataclasses.replace(NOTHING, **only))
        return view, ((view - plain).abs().amax((1, 2, 3)) > 1e-3).float().mean().item()

    view, rate = changed(flip_p=0.5)
    assert rate == pytest.approx(0.5, abs=0.03)
    flipped = view[:, 0, 0, 0] < 0
    torch.testing.assert_close(view[flipped], plain[flipped].flip(-1), atol=1e-5, rtol=0)
    view, rate = changed(gray_p=0.2)
    assert rate == pytest.approx(0.2, abs=0.03)
    gray = (view - plain).abs().amax((1, 2, 3)) > 1e-3
    assert (view[gray].amax(1) - view[gray].amin(1)).max() < 1e-5
    assert changed(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8)[1] == pytest.approx(0.8, abs=0.03)
    assert changed()[1] == 0


def test_pictures_of_a_batch_get_different_views():
    views = augment(pictures(1, 16).expand(8, -1, -1, -1), 8, generator(), Augmentation())
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "images must be uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\(B, 3, S, S\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"got torch.uint8 \(2, 8, 8, 3\)"),
        (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), r"got torch.uint8 \(2, 3, 8, 9\)"),
        (torch.zeros(2, 3, 17, 17, dtype=torch.uint8), "17 px are more than twice out_size = 8"),
    ],
)
def test_bad_pictures_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        augment(images, 8, generator(), PAPER)
    with pytest.raises(ValueError, match=message):
        eval_transform(images, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gray_p": 2.0}, "gray_p is a probability: expected at most 1, got 2.0"),
        ({"flip_p": -0.1}, "flip_p must be finite and not negative, got -0.1"),
        ({"warp": float("nan")}, "warp must be finite and not negative, got nan"),
        ({"jitter": (0.1, 0.1, 0.1, -1.0)}, "jitter must be finite and not negative"),
        ({"ratio": (0.0, 1.0)}, "ratio must be two positive numbers, .*got 0.0 1.0"),
        ({"scale": (1.0, 0.5)}, "scale must be two positive numbers, .*got 1.0 0.5"),
    ],
)
def test_strengths_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
