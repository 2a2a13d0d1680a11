"""The training step: model, objective, optimizer and batches, on one rank or several."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn

from ito.batches import Batches, generator
from ito.config import Config
from ito.data.augment import augment
from ito.data.dataset import Dataset
from ito.model.encoders import Block, DualEncoder
from ito.model.layers import depths, largest_list, recompute
from ito.model.pretrained import encoders, load_weights
from ito.model.pretrained_dual import Loaded
from ito.model.tokenizer import Tokenizer
from ito.objectives import MAX_LOGIT_SCALE, Objective, Step, Terms, objective_class
from ito.ranks import Ranks, normalise_globally
from ito.sharding import clip_gradients, is_sharded, load_whole, named_state, shard, whole_weights
from ito.stream import Stream, StreamBatches
from ito_kernels.gradcache import gradcache_backward

SIZES = ("image_size", "width", "heads", "image_depth", "text_depth")
SIZES += ("image_width", "image_heads", "patch_size")
STATES = ("model", "objective", "optimizer", "scaler")


class Towers(nn.Module):
    """The model and the objective as one module, in whose two passes FSDP2 gathers weights."""

    def __init__(self, model: DualEncoder, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def convolve(self, views: Tensor) -> Tensor:
        """From views (V, n, 3, S, S) to what `forward` takes, (V, n, ...)."""
        return self.model.image.convolve(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def forward(self, patches: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return self.objective.encode(self.model, patches, ids)


class Trainer:
    """The model, the objective, the optimizer, and one training step.

    A step depends only on the state and on its number. Ranks and micro-batches change its result
    by rounding only: each rank takes its slice of the same batch, with the same random numbers.

    On a CPU a thread prepares the next batch while a step computes. On a GPU it does not: a second
    batch would take memory, and be augmented on the stream that the step uses.

    `seconds` is the time of all steps so far, `input_seconds` the part of it in which the model
    waited for its batch, `loader_seconds` the processor time of the thread.

    Args:
        data: a data set in memory, or this rank's stream.
        dtype: of autocast; with float16 the loss is scaled.
        ranks: the processes that share the batch; one process by default.
        described: the image_encoder and text_encoder of a model whose weights will be loaded, by
            `load` or `start_from`; None: those of the configuration, whose weights are loaded here.

    Raises ValueError if the batch has fewer items than ranks times micro-batches.
    """

    def __init__(
        self,
        config: Config,
        data: Dataset | Stream,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        described: dict | None = None,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.ranks = ranks or Ranks()

        torch.manual_seed(config.seed)
        sizes = {name: getattr(config, name) for name in SIZES}
        sizes |= {name: getattr(tokenizer, name) for name in ("vocab_size", "context_length")}
        self.model = DualEncoder(**sizes, **described or encoders(config))
        if described is None:
            load_weights(self.model, config)
        self.model.to(device, memory_format=torch.channels_last)
        self.locked = self.model.lockable(config.locked).requires_grad_(False)
        normalise_globally(self.model, self.ranks.group)
        self.objective = objective_class(config.objective)(config, self.model).to(device)

        self.towers = Towers(self.model, self.objective)
        if config.grad_checkpointing or config.fsdp:
            option = "--grad-checkpointing" if config.grad_checkpointing else "--fsdp"
            towers = self.model.image, self.model.text
            blocks = [block for tower in towers for block in largest_list(tower, option)[1]]
            blocks += [part for part in self.objective.modules() if isinstance(part, Block)]
            if config.grad_checkpointing:
                recompute(blocks)
            if config.fsdp and self.ranks.group:
                words = [m for m in self.model.text.modules() if isinstance(m, nn.Embedding)]
                shard(self.towers, [*blocks, *words], self.ranks.group, device)
        self.parameters = [p for p in self.towers.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        groups, self.rates = self.parameter_groups()
        adamw = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, **adamw, fused=True)

        make_batches = StreamBatches if isinstance(data, Stream) else Batches
        self.batches = make_batches(data, tokenizer, config, self.ranks, device)
        parts = self.ranks.size * config.accum_freq
        if self.batches.size < parts:
            raise ValueError(
                f"a batch of {self.batches.size} items cannot be cut into {parts} parts: "
                f"{self.ranks.size} ranks x {config.accum_freq} micro-batches (--accum-freq)"
            )
        self.scale_limit = MAX_LOGIT_SCALE
        self.loader = one_thread_loader()
        self.ahead: dict[int, Future] = {}  # the next batch, by its number
        self.input_seconds = self.loader_seconds = self.seconds = 0.0

    def parameter_groups(self) -> tuple[list[dict], list[float]]:
        """AdamW's groups, and the factor of each on the learning rate.

        Only matrices decay. With `layer_decay` below 1 each depth of the towers has two groups, the
        top first; what is no part of a tower has the full rate. Sharded weights have their own
        groups, because AdamW updates a group at once.
        """
        decay, depth = self.config.layer_decay, {}
        if decay < 1:
            depth = depths(self.model.image) | depths(self.model.text)
        groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            key = (depth.get(parameter, 0), parameter.ndim < 2, is_sharded(parameter))
            groups.setdefault(key, []).append(parameter)
        keys = sorted(groups)
        plain = {False: {}, True: {"weight_decay": 0.0}}
        found = [{"params": groups[key]} | plain[key[1]] for key in keys]
        return found, [decay ** key[0] for key in keys]

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; `number` counts from 0. Returns what to log.

        Raises FloatingPointError if the loss is not finite, before any weight changes.
        """
        began = self.now()
        views, ids, item, caption_ids = self.next_batch(number)
        ready = self.now()

        self.model.train()
        self.locked.eval()  # the statistics of its batch normalisation stay as they were
        self.optimizer.zero_grad()
        random = generator(self.config.seed, "objective", number)
        step = Step(number + 1, number / self.config.steps, item, random, caption_ids)
        loss, terms = self.backward(views, ids, step)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {number + 1} is {loss.item()}")

        self.ranks.average_grads([p for p in self.parameters if not is_sharded(p)])
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.parameters, self.config.grad_clip)
        lr = self.learning_rate(number)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.scaler.step(self.optimizer)  # in fp16 not if a gradient is not finite
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self.scale_limit)
        self.limit_scale()
        self.objective.clamp()

        logged = {
            "loss": loss.item(),
            **{name: term.item() for name, term in terms.items()},
            "logit_scale": self.model.logit_scale.exp().item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
        }
        if self.scaler.is_enabled():  # a gradient that is not finite, and its step, are left out
            logged["loss_scale"] = self.scaler.get_scale()
            if not grad_norm.isfinite():
                del logged["grad_norm"]
        ended = self.now()
        self.input_seconds += seconds_between(began, ready)
        self.seconds += seconds_between(began, ended)
        return logged

    def next_batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`batch(number)`, from the loader's thread if the last call was for `number` - 1.

        Starts to prepare the batch after it.
        """
        ahead, self.ahead = self.ahead, {}
        wait(ahead.values())  # also if it is another step's: a stream can be read by one thread
        # The first batch is prepared here, so that a stream's workers are forked from the main
        # thread.
        batch = ahead[number].result() if number in ahead else self.batch(number)
        if self.device.type == "cpu" and number + 1 < self.config.steps:
            self.ahead = {number + 1: self.loader.submit(self.timed_batch, number + 1)}
        return batch

    def timed_batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        began = time.thread_time()
        batch = self.batch(number)
        self.loader_seconds += time.thread_time() - began
        return batch

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This rank's n items of batch `number`: augmented views (V, n, 3, S, S), token ids
        (C, n, L), item numbers (n,), and the ids of equal captions (C, n) or None."""
        batch = self.batches(number)
        ids = self.objective.texts(batch.ids, generator(self.config.seed, "texts", number))
        views = augment(
            batch.pictures.flatten(0, 1),
            self.config.image_size,
            generator(self.config.seed, "augment", number),
            self.config.augmentation,
            batch.positions.flatten(),
            batch.count,
        )
        ids, item = ids[:, batch.local_rows].to(self.device), batch.item.to(self.device)
        caption_ids = batch.caption_ids
        if caption_ids is not None:
            caption_ids = caption_ids[:, batch.local_rows].to(self.device)
        return views.unflatten(0, batch.positions.shape), ids, item, caption_ids

    def backward(self, views: Tensor, ids: Tensor, step: Step) -> tuple[Tensor, Terms]:
        """Add the gradient of the global batch's loss to `.grad`. Returns the loss and its terms.

        The convolutions see all local rows at once, because batch normalisation needs them. The
        rest of the towers runs in micro-batches, and the loss sees the global batch (GradCache).
        """

        def loss(*features: Tensor) -> tuple[Tensor, Terms]:
            scale = self.model.logit_scale.exp()
            return self.objective.loss(
                *features, logit_scale=scale, step=step, group=self.ranks.group
            )

        with self.autocast():
            patches = self.towers.convolve(views)
        if self.config.accum_freq == 1:
            total, terms = loss(*self.encode(patches, ids))
            self.scaler.scale(total).backward()
            return total.detach(), terms
        parts = [
            part.detach().requires_grad_(patches.requires_grad)
            for part in patches.tensor_split(self.config.accum_freq, 1)
        ]
        texts = ids.tensor_split(self.config.accum_freq, 1)
        batches = list(zip(parts, texts, strict=True))
        total, terms = gradcache_backward(
            self.encode, batches, loss, models=self.towers, scaler=self.scaler, dim=1
        )
        if patches.requires_grad:
            patches.backward(torch.cat([part.grad for part in parts], 1))
        return total, terms

    def encode(self, patches: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        with self.autocast():
            return self.towers(patches, ids)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def now(self) -> "float | torch.cuda.Event":
        """The time; on a GPU, an event after all work that was queued so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def learning_rate(self, number: int) -> float:
        """Linear warm-up, then half a cosine to 0 at the last step."""
        warmup = self.config.warmup * self.config.steps
        if number < warmup:
            return self.config.lr * (number + 1) / (warmup + 1)
        progress = (number - warmup) / (self.config.steps - warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def start_from(self, loaded: Loaded) -> None:
        """Copy the weights that `--pretrained` names: both towers, the logit scale and bias.

        Raises ValueError if the architectures differ.
        """
        other, ours = loaded.architecture, self.model.architecture
        if wrong := [f"{k} {other[k]}" for k in ours if other.get(k, ours[k]) != ours[k]]:
            raise ValueError(
                f"--pretrained {self.config.pretrained} has {', '.join(wrong)}: drop the options "
                "that say otherwise"
            )
        for tower, weights in loaded.towers.items():
            load_whole(getattr(self.model, tower), weights)
        self.objective.start_from(self.model, loaded.logit_scale, loaded.logit_bias)
        self.limit_scale()

    def limit_scale(self) -> None:
        """A pretrained model's scale may be above the limit, as SigLIP's 117: it may then only
        fall."""
        self.scale_limit = max(MAX_LOGIT_SCALE, self.model.logit_scale.item())

    def state(self) -> dict:
        """What a checkpoint holds; with --fsdp, but for `shards`."""
        names = ("scaler",) if self.config.fsdp else STATES
        return {name: getattr(self, name).state_dict() for name in names}

    def shards(self) -> dict[str, Tensor]:
        """This rank's part of weights and moments, to be saved, or to be read into."""
        return named_state(self.towers, self.optimizer)

    def load(self, state: dict) -> None:
        """Continue from `state()`; with --fsdp `shards()` were read into before."""
        for name in () if self.config.fsdp else STATES[:3]:
            getattr(self, name).load_state_dict(state[name])
        self.scaler.load_state_dict(state.get("scaler", {}))  # which older versions lack
        self.limit_scale()

    def whole_model(self) -> DualEncoder:
        """The model with all its weights on rank 0, for what only rank 0 does. With --fsdp all
        ranks call it, and the others get the sharded one."""
        weights = whole_weights(self.model) if self.config.fsdp and self.ranks.group else None
        if not weights:
            return self.model
        model = DualEncoder(**self.model.architecture)
        model.load_state_dict(weights)
        return model.to(self.device, memory_format=torch.channels_last)


def one_thread_loader() -> ThreadPoolExecutor:
    """A thread for which torch computes on one thread: more would slow down those of the step."""
    threads = torch.get_num_threads()
    loader = ThreadPoolExecutor(1, "loader")
    # A thread keeps its own number only once it has asked for one.
    loader.submit(torch.get_num_threads).result()
    loader.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)
    return loader


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Seconds from one `Trainer.now()` to another."""
    if isinstance(start, float):
        return end - start
    end.synchronize()  # returns at once: the loss was read after this work
    return start.elapsed_time(end) / 1000
