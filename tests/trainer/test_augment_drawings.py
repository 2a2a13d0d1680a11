"""The augmentations for drawings: smaller on white, bent, outlined, faded."""

import dataclasses

import torch
import torch.nn.functional as F

from ito.data.augment import PAPER, Augmentation, augment, brightest, crop, stroke, warp

STILL = Augmentation(scale=(1, 1), ratio=(1, 1), jitter_p=0.0, gray_p=0.0)


def test_a_scale_above_1_shows_the_picture_smaller_on_white():
    x = torch.zeros(2, 3, 8, 8)
    u = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.5, 0.0], [0.5, 0.0], [0.9, 0.9]])
    config = dataclasses.replace(STILL, scale=(1, 4))
    centred, corner = crop(x, 8, u, config)
    want = torch.ones(3, 8, 8)
    want[:, 2:6, 2:6] = 0
    torch.testing.assert_close(centred, want)
    want = torch.ones(3, 8, 8)
    want[:, :4, :4] = 0
    torch.testing.assert_close(corner, want)


def test_warp_is_smooth_bounded_and_nothing_at_strength_0():
    u = torch.rand(33, 64, generator=torch.Generator().manual_seed(0))
    u[0, 0] = 0
    config = dataclasses.replace(STILL, warp=0.2)
    field = warp(u, 32, config)
    assert field.shape == (64, 2, 32, 32)
    assert not field[0].any()
    assert 0.05 < field.abs().max() < 0.2 * 1.5  # the bicubic overshoots its points a little
    steps = torch.cat([field.diff(dim=2).abs().flatten(), field.diff(dim=3).abs().flatten()])
    assert steps.max() < 0.08


def test_stroke_outlines_fades_or_leaves_alone():
    x = torch.full((3, 3, 9, 9), 1.0)
    x[:, 1:, 3:6, 3:6] = 0  # a red square on white
    x[:, 0, 3:6, 3:6] = 0.8
    u = torch.tensor([[0.1, 0.5, 0.9], [1.0, 1.0, 1.0]])
    outlined, faded, same = stroke(x, u, dataclasses.replace(STILL, stroke_p=0.4))
    assert torch.equal(same, x[2])
    ring = torch.zeros(9, 9, dtype=torch.bool)
    ring[2:7, 2:7] = True
    ring[3:6, 3:6] = False
    assert not outlined[:, ring].any()
    assert torch.equal(outlined[:, ~ring], x[0][:, ~ring])
    assert torch.equal(faded[:, 4, 4], x[1][:, 4, 4])
    assert (faded[:, 3, 3:6] == 1).all()


def test_brightest_is_the_maximum_of_3_by_3():
    x = torch.rand(2, 3, 7, 5)
    assert torch.equal(brightest(x), F.max_pool2d(x, 3, 1, 1))


def test_they_are_off_unless_asked_for():
    x = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8)

    def view(config):
        return augment(x, 8, torch.Generator().manual_seed(1), config)

    assert not torch.equal(view(dataclasses.replace(PAPER, warp=0.1)), view(PAPER))
    assert not torch.equal(view(dataclasses.replace(PAPER, stroke_p=0.4)), view(PAPER))
    assert Augmentation().warp == Augmentation().stroke_p == PAPER.warp == PAPER.stroke_p == 0
