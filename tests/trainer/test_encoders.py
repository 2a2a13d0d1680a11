"""The towers: shapes, masks, and the shortcuts against their long forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from ito.model import embed
from ito.model.encoders import Block, DualEncoder, ImageEncoder, TextEncoder, attention
from ito.model.fusion import Fusion

ARCHITECTURE = {
    "image_size": 16,
    "width": 16,
    "heads": 2,
    "image_depth": 1,
    "text_depth": 2,
    "vocab_size": 50,
    "context_length": 9,
}


def ids(*lengths: int, columns: int = 9) -> torch.Tensor:
    """Random token ids with `lengths` real tokens per row, 0 after them."""
    rows = torch.randint(1, 50, (len(lengths), columns), generator=torch.Generator().manual_seed(3))
    return rows * (torch.arange(columns) < torch.tensor(lengths)[:, None])


def test_attention_is_softmax_of_scaled_products_over_the_real_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    got = attention(q, k, v, mask)
    for b in range(2):
        real = mask[b].nonzero().squeeze(1)
        for h in range(3):
            scores = q[b, h] @ k[b, h, real].T / math.sqrt(4)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            torch.testing.assert_close(got[b, h], weights @ v[b, h, real])


@pytest.mark.parametrize("masked", [True, False])
def test_the_softmax_of_bf16_attention_is_of_fp32_scores(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = 4 * torch.randn(3, 2, 3, 17, 8, generator=generator).bfloat16()
    mask = torch.rand(2, 17, generator=generator) > 0.3 if masked else None
    scores = (q @ k.mT).float() / math.sqrt(8)
    if masked:
        scores[~mask[:, None, None].expand_as(scores)] = -math.inf
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(attention(q, k, v, mask), weights.bfloat16() @ v, rtol=0, atol=4e-3)


def test_block_computes_position_0_alone_and_the_same():
    torch.manual_seed(0)
    block = Block(16, 2).double()
    for parameter in block.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))  # no bias stays zero
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 1, 16, dtype=torch.float64)
    for mask in (None, torch.tensor([[True] * 7, [True] * 4 + [False] * 3])):
        first, whole = block(x, mask, first_only=True), block(x, mask)[:, :1]
        torch.testing.assert_close(first, whole, rtol=1e-12, atol=1e-12)
        inputs = x, *block.parameters()
        for got, want in zip(
            *(torch.autograd.grad((y * direction).sum(), inputs) for y in (first, whole)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_image_encoder_returns_cls_first_then_the_patches():
    torch.manual_seed(0)
    encoder = ImageEncoder(24, width=16, depth=1, heads=2, embed_dim=12)
    tokens, pooled = encoder(torch.randn(2, 3, 24, 24))
    assert tokens.shape == (2, 1 + 3 * 3, 12)
    torch.testing.assert_close(pooled, tokens[:, 0])


def test_cls_is_a_parameter_plus_the_mean_of_the_patches():
    torch.manual_seed(0)
    encoder = ImageEncoder(16, width=16, depth=0, heads=2, embed_dim=16).eval()
    torch.nn.init.normal_(encoder.cls)
    images = torch.randn(2, 3, 16, 16)
    patches = encoder.stem(images).flatten(2).transpose(1, 2)
    want = encoder.cls + patches.mean(1) + encoder.positions[0]
    torch.testing.assert_close(encoder(images)[1], encoder.project(encoder.norm(want)))


@pytest.mark.parametrize("encoder", ["text", "image"])
def test_bf16_autocast_keeps_the_stream_in_bf16(encoder):
    torch.manual_seed(0)
    model = DualEncoder(**ARCHITECTURE)
    module = getattr(model, encoder)
    seen = []
    module.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    batch = ids(4, 9) if encoder == "text" else torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        module(batch)
    assert seen == [torch.bfloat16]


def test_text_padding_does_not_change_the_result():
    torch.manual_seed(0)
    encoder = TextEncoder(50, 9, width=16, depth=2, heads=2, embed_dim=16).double().eval()
    batch = ids(3, 9, 5)
    pooled = encoder(batch)[1]
    for row, length in enumerate((3, 9, 5)):
        tokens, alone = encoder(batch[row : row + 1, :length])
        torch.testing.assert_close(pooled[row], alone[0])
        torch.testing.assert_close(alone[0], tokens[0].mean(0))


@pytest.mark.parametrize("causal", [False, True])
def test_training_computes_no_padding_and_each_text_as_alone(causal):
    """Values and gradients; the sums over tokens that no text has would be wrong gradients."""
    torch.manual_seed(0)
    encoder = TextEncoder(50, 9, width=16, depth=2, heads=2, embed_dim=16, causal=causal).double()
    lengths, direction = (3, 9, 1, 5), torch.randn(4, 16, dtype=torch.float64)
    batch, computed, alone = ids(*lengths), [], []
    for block in encoder.blocks:
        hook = block.mlp.register_forward_pre_hook(lambda _, x: computed.append(x[0].shape))
        pooled = encoder(batch)[1]
        hook.remove()
    assert computed == [(32, 16)] * 2  # 18 tokens, rounded up; 36 with padding
    gradients = torch.autograd.grad((pooled * direction).sum(), list(encoder.parameters()))
    encoder.eval()
    for row, length in enumerate(lengths):
        alone.append(encoder(batch[row : row + 1, :length])[1][0])
    torch.testing.assert_close(pooled, torch.stack(alone), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(
        sum(x @ y for x, y in zip(alone, direction, strict=True)), list(encoder.parameters())
    )
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_order_of_words_matters():
    torch.manual_seed(0)
    encoder = TextEncoder(50, 9, width=16, depth=1, heads=2, embed_dim=16)
    a = torch.tensor([[1, 2, 3]])
    assert (encoder(a)[1] - encoder(a.flip(1))[1]).abs().max() > 1e-3


def test_embeddings_are_unit_rows_and_the_scale_starts_at_a_temperature_of_007():
    torch.manual_seed(0)
    model = DualEncoder(**ARCHITECTURE).eval()
    for rows in (model.encode_image(torch.randn(3, 3, 16, 16)), model.encode_text(ids(2, 3, 4))):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_weights_start_at_the_variance_of_the_fan_in_and_deep_blocks_add_less():
    def spread(blocks, name):
        weights = [block.get_parameter(f"{name}.weight") for block in blocks]
        return [w.std().item() * w.shape[1] ** 0.5 for w in weights]

    torch.manual_seed(0)
    towers = (
        TextEncoder(100, 8, 64, 3, 2, 64).blocks,
        ImageEncoder(16, 64, 2, 2, 64).blocks,
        Fusion(2, 64, depth=8, heads=2).blocks,
        TextEncoder(100, 8, 64, 8, 2, 64, causal=True).blocks,
        ImageEncoder(16, 64, 8, 2, 64, patch_size=8).blocks,
    )
    for blocks, added in zip(towers, (1, 1, 0.25, 0.25, 0.25), strict=True):
        for name, expected in (("qkv", 1), ("mlp.0", 1), ("out", added), ("mlp.2", added)):
            assert spread(blocks, name) == pytest.approx([expected] * len(blocks), rel=0.05), name


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = DualEncoder(**ARCHITECTURE)
    scores = model.encode_image(torch.randn(4, 3, 16, 16)) @ model.encode_text(ids(2, 9, 4, 5)).T
    F.cross_entropy(scores * model.logit_scale.exp(), torch.arange(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Block(10, 4), "width must be a multiple of heads, got width=10, heads=4"),
        (lambda: ImageEncoder(20, 16, 1, 2, 16), "image_size must be a multiple of 8, got 20"),
        (
            lambda: ImageEncoder(16, 16, 1, 2, 16)(torch.zeros(1, 3, 24, 24)),
            r"images must be \(B, 3, 16, 16\), got \(1, 3, 24, 24\)",
        ),
        (
            lambda: TextEncoder(50, 4, 16, 1, 2, 16)(torch.ones(1, 5, dtype=torch.int64)),
            "ids must have at most 4 columns, got 5",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_texts_of_mixed_lengths_are_embedded_as_each_alone(monkeypatch):
    """In batches by length, without the columns of padding, and back in their order."""
    monkeypatch.setattr(embed, "BATCH", 4)
    torch.manual_seed(0)
    for patch_size in (None, 8):
        model = DualEncoder(**ARCHITECTURE, patch_size=patch_size)
        texts = ids(9, 1, 7, 3, 9, 2, 8, 3, 1, 9, 5)
        found = embed.embed_texts(model, texts)
        with torch.no_grad():
            alone = torch.cat([model.encode_text(row[None]) for row in texts])
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
        assert (found[0] - found[4]).abs().max() > 1e-3  # so that the order matters
