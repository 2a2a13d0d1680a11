"""The fusion module of ITO: what it must not depend on, and what it must."""

import math

import pytest
import torch

from ito.model.fusion import READOUTS, Fusion, sincos_2d

GRID, WIDTH, LENGTH = 2, 16, 6


def fusion(readout: str = "cls", depth: int = 2) -> Fusion:
    torch.manual_seed(0)
    module = Fusion(GRID, WIDTH, depth=depth, heads=2, readout=readout)
    for parameter in module.parameters():  # away from the symmetric initialisation
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return module.double()


def inputs(lengths=(6, 2, 4)):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    batch = len(lengths)
    return (
        draw(batch, 1 + GRID * GRID, WIDTH),
        draw(batch, LENGTH, WIDTH),
        mask,
        draw(LENGTH, WIDTH),
    )


@pytest.mark.parametrize("readout", READOUTS)
def test_padding_never_reaches_the_result(readout):
    module = fusion(readout)
    image, text, mask, positions = inputs()
    want = module(image, text, mask, positions)
    poisoned = torch.where(mask[..., None], text, torch.full_like(text, 1e3))
    torch.testing.assert_close(module(image, poisoned, mask, positions), want)
    for row, length in enumerate(mask.sum(1).tolist()):
        one = slice(row, row + 1)
        short = module(image[one], text[one, :length], mask[one, :length], positions[:length])
        torch.testing.assert_close(short, want[one])


@pytest.mark.parametrize("readout", READOUTS)
def test_training_computes_no_padding_and_the_same(readout):
    """With the gradients of evaluation mode, where padding is computed and masked."""
    module, found = fusion(readout), []
    image, text, mask, positions = inputs((2, 6, 1) * 4)
    leaves = [image.requires_grad_(), text.requires_grad_(), *module.parameters()]
    direction = torch.randn(len(image), WIDTH, dtype=torch.float64)
    rows = []
    module.blocks[0].mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape))
    for training in (True, False):
        result = module.train(training)(image, text, mask, positions)
        found.append((result, *torch.autograd.grad((result * direction).sum(), leaves)))
    extra = readout == "token"  # 96 tokens, or 108 rounded up
    assert rows == [(96 + 32 * extra, WIDTH), (12, 5 + LENGTH + extra, WIDTH)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # the result is fp32


@pytest.mark.parametrize("readout", READOUTS)
def test_every_real_token_reaches_the_result(readout):
    module = fusion(readout)
    image, text, mask, positions = inputs()
    image.requires_grad_()
    text.requires_grad_()
    result = module(image, text, mask, positions)
    (result * torch.randn(result.shape, dtype=result.dtype)).sum().backward()
    assert (image.grad.abs().sum(-1) > 0).all()
    assert ((text.grad.abs().sum(-1) > 0) == mask).all()


@pytest.mark.parametrize("readout", READOUTS)
def test_rows_are_independent_unit_vectors(readout):
    module = fusion(readout)
    arguments = inputs()
    together = module(*arguments)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    image, text, mask, positions = arguments
    torch.testing.assert_close(module(image[1:2], text[1:2], mask[1:2], positions), together[1:2])


def test_the_result_is_two_pre_norm_blocks_over_all_tokens_then_norm_then_position_0():
    module = fusion()
    image, text, mask, positions = inputs()
    x = torch.cat([image + module.image_positions, text + positions], 1)
    keys = torch.cat([torch.ones(3, 1 + GRID * GRID, dtype=torch.bool), mask], 1)
    for block in module.blocks:
        normed = block.norm_attention(x)
        q, k, v = block.qkv(normed).split(WIDTH, -1)
        heads = []
        for h in range(2):
            part = slice(h * WIDTH // 2, (h + 1) * WIDTH // 2)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(WIDTH // 2)
            weights = torch.where(keys[:, None, :], scores.exp(), torch.zeros_like(scores))
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
        x = x + block.out(torch.cat(heads, -1))
        first, _, second = block.mlp
        y = first(block.norm_mlp(x))
        x = x + second(0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
    want = module.norm(x)[:, 0]
    want = want / want.norm(dim=1, keepdim=True)
    torch.testing.assert_close(module(image, text, mask, positions).double(), want.float().double())


def test_sincos_is_sine_and_cosine_of_row_then_column_at_falling_frequencies():
    table = sincos_2d(3, 8)
    assert table.shape == (10, 8)
    assert not table[0].any()
    for row in range(3):
        for column in range(3):
            want = []
            for p in (row, column):
                angles = [p / 10000 ** (k / 2) for k in range(2)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[1 + 3 * row + column], torch.tensor(want))


def test_the_image_embedding_is_fixed_and_not_saved():
    names = {name for name, _ in fusion().named_parameters()}
    assert "image_positions" not in names
    assert "image_positions" not in fusion().state_dict()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"readout must be one of .*, got 'max'"):
        Fusion(GRID, WIDTH, readout="max")
    with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
        sincos_2d(2, 6)
    image, text, mask, positions = inputs()
    with pytest.raises(ValueError, match=r"text_positions must be \(6, 16\) .* got \(5, 16\)"):
        fusion()(image, text, mask, positions[:5])
