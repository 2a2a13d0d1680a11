"""The optimisation: towers, an objective, one step after the other, on one rank or several."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn

from ito.batches import Batches, generator
from ito.config import Config
from ito.data.augment import augment
from ito.data.dataset import Dataset
from ito.model.encoders import DualEncoder
from ito.model.pretrained import encoders, load_weights
from ito.model.tokenizer import Tokenizer
from ito.objectives import MAX_LOGIT_SCALE, Step, Terms, objective_class
from ito.ranks import Ranks, normalise_globally
from ito.stream import Stream, StreamBatches
from ito_kernels.gradcache import gradcache_backward


class Trainer:
    """Everything that changes while training. Step n depends on the state and on n alone.

    The number of ranks and of micro-batches changes what is computed by rounding only: each rank
    takes its slice of the same batch with the same random numbers.

    Args:
        data: a set in memory, or this rank's stream of one.
        dtype: of the towers and the objective's modules under autocast; bfloat16 or float32.
        ranks: those that share the batch; alone by default.

    While a step computes, a thread chooses, reads and augments the batch of the next one; not on a
    GPU, where it would be held twice and augmented on the step's own queue. Of the `seconds` that
    steps took so far, the model waited `input_seconds` for its batch; the thread used
    `loader_seconds` of a processor meanwhile.

    Raises ValueError if the batch has fewer items than there are ranks times micro-batches.
    """

    def __init__(
        self,
        config: Config,
        data: Dataset | Stream,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.ranks = ranks or Ranks()
        torch.manual_seed(config.seed)
        self.model = DualEncoder(
            image_size=config.image_size,
            width=config.width,
            heads=config.heads,
            image_depth=config.image_depth,
            text_depth=config.text_depth,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            image_width=config.image_width,
            image_heads=config.image_heads,
            patch_size=config.patch_size,
            **encoders(config),
        )
        load_weights(self.model, config)
        self.model.to(device, memory_format=torch.channels_last)
        self.locked = self.model.lockable(config.locked).requires_grad_(False)
        normalise_globally(self.model, self.ranks.group)
        self.objective = objective_class(config.objective)(config, self.model).to(device)
        owned = [*self.model.parameters(), *self.objective.parameters()]
        self.parameters = [p for p in owned if p.requires_grad]
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
        source = StreamBatches if isinstance(data, Stream) else Batches
        self.batches = source(data, tokenizer, config, self.ranks, device)
        self.loader = ThreadPoolExecutor(1, "loader")
        self.ahead: dict[int, Future] = {}
        # It gets one thread of torch's: more would stand in the way of those that compute. A thread
        # keeps what it sets after its first question (before, it takes what was set last).
        threads = torch.get_num_threads()
        self.loader.submit(torch.get_num_threads).result()
        self.loader.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)
        self.input_seconds = self.loader_seconds = self.seconds = 0.0
        parts = self.ranks.size * config.accum_freq
        if self.batches.size < parts:
            raise ValueError(
                f"a batch of {self.batches.size} items cannot be cut into {parts} parts: "
                f"{self.ranks.size} ranks x {config.accum_freq} micro-batches (--accum-freq)"
            )

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; `number` counts from 0. Returns what to log.

        Raises FloatingPointError if the loss is not finite, before any weight changes.
        """
        began = self.now()
        views, ids, item = self.prepared(number)
        ready = self.now()
        self.model.train()
        self.locked.eval()  # batch normalisation too stays as it was
        self.optimizer.zero_grad()
        random = generator(self.config.seed, "objective", number)
        step = Step(number + 1, number / self.config.steps, item, random)
        loss, terms = self.backward(views, ids, step)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {number} is {loss.item()}")
        self.ranks.average_grads(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        lr = self.learning_rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.objective.clamp()
        logged = {
            "loss": loss.item(),
            **{name: term.item() for name, term in terms.items()},
            "logit_scale": self.model.logit_scale.exp().item(),
            "grad_norm": norm.item(),
            "lr": lr,
        }
        ended = self.now()
        self.input_seconds += between(began, ready)
        self.seconds += between(began, ended)
        return logged

    def prepared(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """`batch(number)`, prepared ahead where the last call was for the step before."""
        ahead, self.ahead = self.ahead, {}
        wait(ahead.values())  # whatever step it is for: a stream is at one place
        # The first is prepared here: a stream's workers are to be forked from the main thread.
        batch = ahead[number].result() if number in ahead else self.batch(number)
        if self.device.type == "cpu" and number + 1 < self.config.steps:
            self.ahead = {number + 1: self.loader.submit(self.prepare, number + 1)}
        return batch

    def prepare(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """`batch(number)`, timed, for the thread."""
        began = time.thread_time()
        batch = self.batch(number)
        self.loader_seconds += time.thread_time() - began
        return batch

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's n items of batch `number`: views (V, n, 3, S, S), token ids (C, n, L) and the
        items' numbers (n,)."""
        batch = self.batches(number)
        ids = self.objective.texts(batch.ids, generator(self.config.seed, "texts", number))
        views = augment(
            batch.pictures.flatten(0, 1),
            self.config.image_size,
            generator(self.config.seed, "augment", number),
            self.config.augmentation,
            batch.places.flatten(),
            batch.total,
        )
        ids, item = ids[:, batch.local].to(self.device), batch.item.to(self.device)
        return views.unflatten(0, batch.places.shape), ids, item

    def backward(self, views: Tensor, ids: Tensor, step: Step) -> tuple[Tensor, Terms]:
        """Add the gradient of the batch's loss to `.grad`; return the loss and its terms.

        Micro-batches leave out the convolutions: batch normalisation needs the whole batch.
        """

        def loss(*features: Tensor) -> tuple[Tensor, Terms]:
            scale = self.model.logit_scale.exp()
            return self.objective.loss(
                *features, logit_scale=scale, step=step, group=self.ranks.group
            )

        with self.autocast():
            patches = self.model.image.convolve(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        if self.config.accum_freq == 1:
            total, terms = loss(*self.encode(patches, ids))
            total.backward()
            return total.detach(), terms
        parts = [
            part.detach().requires_grad_(patches.requires_grad)
            for part in patches.tensor_split(self.config.accum_freq, 1)
        ]
        texts = ids.tensor_split(self.config.accum_freq, 1)
        batches = list(zip(parts, texts, strict=True))
        total, terms = gradcache_backward(self.encode, batches, loss, dim=1)
        if patches.requires_grad:
            patches.backward(torch.cat([part.grad for part in parts], 1))
        return total, terms

    def encode(self, patches: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        with self.autocast():
            return self.objective.encode(self.model, patches, ids)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def now(self) -> "float | torch.cuda.Event":
        """When what was asked of the device so far is done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def learning_rate(self, number: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the last step."""
        warmup = self.config.warmup * self.config.steps
        if number < warmup:
            return self.config.lr * (number + 1) / (warmup + 1)
        progress = (number - warmup) / (self.config.steps - warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def start_from(self, model: DualEncoder, name: str) -> None:
        """Take the towers' weights. Raises ValueError where the architectures differ."""
        other, own = model.architecture, self.model.architecture
        if wrong := [f"{key} {other.get(key)}" for key in own if other.get(key) != own[key]]:
            raise ValueError(f"--pretrained {name} has {', '.join(wrong)}: give the same options")
        for tower in ("image", "text"):
            getattr(self.model, tower).load_state_dict(getattr(model, tower).state_dict())

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict) -> None:
        for name in ("model", "objective", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Seconds from one `Trainer.now()` to another."""
    if isinstance(start, float):
        return end - start
    end.synchronize()  # no wait: the loss was read before it
    return start.elapsed_time(end) / 1000
