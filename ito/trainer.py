"""The optimisation: towers, fusion module, ITO's loss, one step after the other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ito.augment import augment
from ito.batches import Batches, generator
from ito.config import Config
from ito.data import Dataset
from ito.encoders import DualEncoder
from ito.fusion import Fusion
from ito.tokenizer import Tokenizer
from ito_kernels import ito_loss

MAX_LOGIT_SCALE = math.log(100)


class Trainer:
    """Everything that changes while training. Step n depends on the state and on n alone.

    Args:
        dtype: of the towers and the fusion module under autocast; bfloat16 or float32.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        torch.manual_seed(config.seed)
        self.model = DualEncoder(
            image_size=config.image_size,
            width=config.width,
            heads=config.heads,
            image_depth=config.image_depth,
            text_depth=config.text_depth,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
        ).to(device, memory_format=torch.channels_last)
        modules = [self.model]
        self.fusion = None
        if config.lambda_fusion > 0:
            self.fusion = Fusion(
                self.model.image.grid,
                config.width,
                config.fusion_depth,
                config.heads,
                config.fusion_readout,
            ).to(device)
            modules.append(self.fusion)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim >= 2]},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.images = dataset.images.to(device)
        self.batches = Batches(dataset, tokenizer, config)

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; `number` counts from 0. Returns what to log.

        Raises FloatingPointError if the loss is not finite, before any weight changes.
        """
        rows, ids = self.batches(number)
        views = augment(
            self.images[rows.flatten()],
            self.config.image_size,
            generator(self.config.seed, "augment", number),
            self.config.augmentation,
        )
        self.model.train()
        loss, terms = self.loss(views, ids.to(self.device), rows.shape[0])
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {number} is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        lr = self.learning_rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return {
            "loss": loss.item(),
            "align": terms["align"].item(),
            "fusion": terms["fusion"].item(),
            "logit_scale": self.model.logit_scale.exp().item(),
            "grad_norm": norm.item(),
            "lr": lr,
        }

    def loss(self, images: Tensor, ids: Tensor, views: int) -> tuple[Tensor, dict[str, Tensor]]:
        """ITO's loss of `images` ((V·N), 3, S, S), view by view, and captions `ids` (C, N, L)."""
        captions, size, length = ids.shape
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            image_tokens, image_pooled = self.model.image(images)
            text_tokens, text_pooled = self.model.text(ids.flatten(0, 1))
            fused = None
            if self.fusion is not None:
                # The first caption is encoded once and fused with each view.
                fused = self.fusion(
                    image_tokens,
                    text_tokens[:size].repeat(views, 1, 1),
                    (ids[0] != Tokenizer.pad_id).repeat(views, 1),
                    self.model.text.positions[:length],
                ).view(views, size, -1)
        return ito_loss(
            F.normalize(image_pooled.float(), dim=-1).view(views, size, -1),
            F.normalize(text_pooled.float(), dim=-1).view(captions, size, -1),
            fused,
            self.model.logit_scale.exp(),
            lambda_fusion=self.config.lambda_fusion,
            denominator=self.config.denominator,
        )

    def learning_rate(self, number: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the last step."""
        warmup = self.config.warmup * self.config.steps
        if number < warmup:
            return self.config.lr * (number + 1) / (warmup + 1)
        progress = (number - warmup) / (self.config.steps - warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "fusion": self.fusion.state_dict() if self.fusion is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.fusion is not None:
            self.fusion.load_state_dict(state["fusion"])
        self.optimizer.load_state_dict(state["optimizer"])
