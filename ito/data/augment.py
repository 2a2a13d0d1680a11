"""Random views of a batch of pictures, with an explicit random generator.

All operations run on tensors of the complete batch: one `grid_sample` crops, resizes and flips;
brightness, contrast, saturation, hue and greyscale are one 3×4 affine map of colours per picture.

Not kornia, because it takes no `torch.Generator` (it uses the global one), and its chain costs 4 to
6 times as much. 256 pictures, 64 → 32 px, 2 threads, median ms per batch: the paper's recipe
12.7 here, 49.8 in kornia 0.9.0 (`cropping_mode="resample"`, the faster one); the defaults 6.8
and 40.4, where a training step takes about 300.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MEAN = STD = 0.5  # of the encoders' float inputs, in every channel
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """Strengths, named as torchvision names them. The defaults suit runs of minutes on drawings.

    `scale` and `ratio` of the random resized crop, in areas and width / height; `jitter` of
    brightness, contrast, saturation (factors 1 ± j) and hue (± j turns), with probability
    `jitter_p`; `blur_sigma` in pixels at 224 px, scaled with the output size (at 32 px the recipe's
    is below 0.3 px: no blur); a flip changes the meaning of arrows, hands and most flags.

    A `scale` above 1 shows the picture smaller, on white. `warp` bends it smoothly, by about this
    share of half a side. With probability `stroke_p` edges get a dark outline, with half that
    probability dark lines fade, both by a random amount: drawings of the same thing by different
    artists differ in this most.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.12, 0.12, 0.12, 0.03)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.0
    warp: float = 0.0
    stroke_p: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            several = value if isinstance(value, tuple) else (value,)
            if not all(0 <= v < math.inf for v in several):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
            if name.endswith("_p") and value > 1:
                raise ValueError(f"{name} is a probability: expected at most 1, got {value}")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be two positive numbers, the smaller first, got {low} {high}"
                )


# the recipe of the ITO paper
PAPER = Augmentation(scale=(0.5, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5, flip_p=0.5)
# open_clip's for CLIP: a mild crop and nothing else
CROP = Augmentation(scale=(0.9, 1.0), jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, gray_p=0.0)
# for drawings, of which other artists' versions are to be recognised
DRAWINGS = Augmentation(
    scale=(0.7, 1.3), ratio=(0.9, 1.1), jitter=(0.15, 0.3, 0.3, 0.05), warp=0.1, stroke_p=0.4
)


def augment(
    images: torch.Tensor,
    out_size: int,
    generator: torch.Generator,
    config: Augmentation,
    positions: torch.Tensor | None = None,
    count: int | None = None,
) -> torch.Tensor:
    """One random view of every picture: uint8 (B, 3, S, S) to float32 (B, 3, out, out), normalised.

    All random numbers of a batch come from one draw of `generator`, so views are reproducible and a
    run resumes exactly. Differences from torchvision's chain: the jitter's order is fixed, nothing
    is clamped between its steps, hue is a rotation about the grey axis (linear, as in YIQ), and a
    crop wider than the picture is narrowed to it unless `scale` exceeds 1. Sampling is bilinear,
    without aliasing down to half the size.

    `positions` (B,) are those of the pictures in a global batch of `count`. A picture gets the same
    view as if the complete global batch were given, so the number of ranks changes nothing.

    Raises ValueError if S is more than twice `out_size`.
    """
    check(images, out_size)
    # drawn on the generator's device: a CPU generator gives the same views on every device
    u = torch.rand(48, count or len(images), generator=generator, device=generator.device)
    u = (u if positions is None else u[:, positions]).to(images.device)
    bend = warp(u[15:48], out_size, config) if config.warp > 0 else None
    x = crop(images.float().div_(255), out_size, u[:5], config, bend)
    if config.stroke_p > 0:
        x = stroke(x, u[13:15], config)
    x = color(x, u[5:11], config)
    if config.blur_p > 0:
        x = blur(x, u[11:13], config)
    return x.clamp_(0, 1).sub_(MEAN).div_(STD)


def eval_transform(images: torch.Tensor, out_size: int) -> torch.Tensor:
    """The complete picture, without augmentation: uint8 (B, 3, S, S) to float32 (B, 3, out, out).

    Raises ValueError if S is more than twice `out_size`.
    """
    check(images, out_size)
    x = F.interpolate(images.float().div_(255), (out_size, out_size), mode="bilinear")
    return x.sub_(MEAN).div_(STD)


def check(images: torch.Tensor, out_size: int) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"images must be uint8 (B, 3, S, S), got {images.dtype} {shape}")
    if shape[-1] > 2 * out_size:
        raise ValueError(
            f"images of {shape[-1]} px are more than twice out_size = {out_size}: sampling would "
            "alias; load them smaller"
        )


def crop(
    x: torch.Tensor,
    out_size: int,
    u: torch.Tensor,
    config: Augmentation,
    bend: torch.Tensor | None = None,
) -> torch.Tensor:
    """Random resized crop and flip; `u` (5, B): area, ratio, left, top, flip.

    `bend` (B, 2, out, out) is added to where the picture, seen as [-1, 1]², is sampled.
    """
    area = lerp(config.scale, u[0])
    ratio = lerp([math.log(r) for r in config.ratio], u[1]).exp()
    limit = max(1.0, math.sqrt(config.scale[1]))
    width, height = (side.sqrt().clamp(max=limit) for side in (area * ratio, area / ratio))
    flip = 1 - 2 * (u[4] < config.flip_p).float()
    # along each axis the centres of the pixels in [-1, 1]; `affine_grid` takes 1.3 ms for 128
    # pictures of 32 px on one core, this 0.1
    centres = (2 * torch.arange(out_size).to(x) + 1) / out_size - 1
    across = torch.addcmul((1 - width) * (2 * u[2] - 1), width * flip, centres[:, None]).T
    down = torch.addcmul((1 - height) * (2 * u[3] - 1), height, centres[:, None]).T
    sides = (-1, out_size, out_size)
    grid = torch.stack([across[:, None].expand(sides), down[..., None].expand(sides)], 1)
    if bend is not None:
        grid += bend
    view = F.grid_sample(x, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    outside = grid.abs().amax(1, keepdim=True) > 1
    return torch.maximum(view, outside.to(view.dtype))  # white


def warp(u: torch.Tensor, out_size: int, config: Augmentation) -> torch.Tensor:
    """Smooth displacements (B, 2, out, out); `u` (33, B): strength, a 4×4 grid of 2-D vectors."""
    points = config.warp * u[0] * (2 * u[1:] - 1)
    field = points.T.reshape(-1, 16) @ bicubic(out_size, u.device)
    return field.view(-1, 2, out_size, out_size)


@functools.cache
def bicubic(out_size: int, device: torch.device) -> torch.Tensor:
    """The interpolation of a 4×4 grid, as a matrix (16, out²): for 128 pictures of 32 px on one
    core 0.3 ms, not 7."""
    each = torch.eye(16, device=device).view(16, 1, 4, 4)
    spread = F.interpolate(each, (out_size, out_size), mode="bicubic", align_corners=True)
    return spread.flatten(1)


def stroke(x: torch.Tensor, u: torch.Tensor, config: Augmentation) -> torch.Tensor:
    """Outlines drawn, or dark lines faded; `u` (2, B): coin, amount.

    An edge is darkened by twice its height in the brightest channel, on its bright side, one pixel
    wide; a line fades into the brightest of its 3×3 neighbours.
    """
    coin, p = u[0], config.stroke_p
    outlined = (coin < p).nonzero().squeeze(1)
    y, amount = x[outlined], u[1, outlined, None, None, None]
    edge = (y + brightest(-y)).amax(1, keepdim=True)
    drawn = x.index_copy(0, outlined, y * (1 - amount * (2 * edge).clamp(max=1)))
    faded = ((coin >= p) & (coin < 1.5 * p)).nonzero().squeeze(1)
    y, amount = x[faded], u[1, faded, None, None, None]
    return drawn.index_copy(0, faded, y + amount * (brightest(y) - y))


def brightest(x: torch.Tensor) -> torch.Tensor:
    """The maximum of each pixel and its 3×3 neighbours.

    Rows, then columns: `max_pool2d` takes 17 ms for (128, 3, 32, 32) on one core, this 2.
    """
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def color(x: torch.Tensor, u: torch.Tensor, config: Augmentation) -> torch.Tensor:
    """Jitter and greyscale as `M x + t`; `u` (6, B): the four factors, the two coins."""
    jittered = (u[4] < config.jitter_p).float()
    # signed strengths in [−j, j], 0 where the coin says so
    bright, contrast, saturate, turns = (
        jittered * j * (2 * v - 1) for j, v in zip(config.jitter, u[:4], strict=True)
    )
    bright, contrast = 1 + bright, 1 + contrast
    saturate = (1 + saturate) * (u[5] >= config.gray_p)
    hue = 2 * math.pi * turns

    luma = x.new_tensor(LUMA)
    gray = luma.expand(3, 3)  # every channel becomes the luminance
    eye = torch.eye(3, device=x.device)
    # saturation: s·I + (1 − s)·gray; hue: a turn about the grey axis (Rodrigues)
    axis = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = eye + hue.sin()[:, None, None] * axis + (1 - hue.cos())[:, None, None] * (axis @ axis)
    saturate = saturate[:, None, None]
    matrix = (saturate * eye + (1 - saturate) * gray) @ turn
    matrix = matrix * (bright * contrast)[:, None, None]
    # contrast blends with the mean luminance, a grey, which the other steps leave as it is
    mean = x.mean((2, 3)) @ luma
    shift = ((1 - contrast) * bright * mean)[:, None, None].expand(-1, 3, 1)
    return torch.baddbmm(shift, matrix, x.flatten(2)).view_as(x)


def blur(x: torch.Tensor, u: torch.Tensor, config: Augmentation) -> torch.Tensor:
    """Gaussian blur of a random part of the rows; `u` (2, B): coin, sigma."""
    unit = x.shape[-1] / 224
    rows = (u[0] < config.blur_p).nonzero().squeeze(1)
    if not len(rows):
        return x
    sigma = unit * lerp(config.blur_sigma, u[1, rows])
    radius = max(1, math.ceil(3 * unit * config.blur_sigma[1]))
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offsets / sigma[:, None]).square()).softmax(1).repeat_interleave(3, 0)
    picked = x[rows].flatten(0, 1)[None]
    n = picked.shape[1]
    for shape, pad in (
        ((n, 1, 1, -1), (radius, radius, 0, 0)),
        ((n, 1, -1, 1), (0, 0, radius, radius)),
    ):
        picked = F.conv2d(F.pad(picked, pad, mode="replicate"), kernel.view(shape), groups=n)
    return x.index_copy(0, rows, picked.view(len(rows), *x.shape[1:]))


def lerp(ends, u: torch.Tensor) -> torch.Tensor:
    low, high = ends
    return low + (high - low) * u
