"""One training loop for everything trained here: deterministic by seed, resumable after a kill, with loss and throughput in sight.

The loop never holds data: `loss(number)` draws a batch from a generator seeded by its number, so a run that goes on where it was
killed sees the batches that it would have seen. A step may follow the mean gradient of several batches, each worked out on a thread of
its own: networks this small leave two processors half idle when the two share every operation (1.3 times as fast as one), and not
when each has a batch (1.9 times).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 60


@dataclass(frozen=True)
class Schedule:
    """Steps, and a learning rate that rises linearly over `warmup` steps and then falls to zero as a half cosine.

    Attributes:
        rate: of AdamW.
        matrix_rate: of Muon, which then trains the matrices of transformer layers; None leaves everything to AdamW. Muon gives every
            direction of an update the same size (https://kellerjordan.github.io/posts/muon/), and twins learn to bind in fewer steps.
    """

    steps: int
    rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    matrix_rate: float | None = None

    def share_at(self, step: int) -> float:
        """The share of the full rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class Effort:
    """Time that training took: by the clock, and of all processors together. On a busy machine only the second says much."""

    seconds: float
    processor_seconds: float


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    samples: int,
    batches: int = 1,
) -> Effort:
    """Train `network` in place; go on from `checkpoint` if it exists.

    Args:
        loss: the loss of one batch, a scalar. Batches are numbered from 0; step k takes `batches` of them from k * batches on.
        samples: sequences a step, for the throughput shown.
        batches: batches a step, worked out at once, on as many threads as torch has.

    Returns:
        The time it took, that before a kill included.
    """
    trained = list(network.parameters())
    optimizers = optimizers_of(network, schedule)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, spent, worked = 0, 0.0, 0.0
    smooth: float | None = None
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, spent, worked, smooth = (saved[name] for name in ("step", "seconds", "processor_seconds", "loss"))

    def save() -> None:
        state = {
            "network": network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "seconds": spent + time.monotonic() - begun,
            "processor_seconds": worked + time.process_time() - begun_working,
            "loss": smooth,
        }
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(checkpoint)

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
    figures = [TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[rate]:.0f}/s")]
    begun = saved_at = time.monotonic()
    begun_working = time.process_time()
    threads = torch.get_num_threads()
    each = max(1, threads // batches)
    bars = Progress(*columns, *figures, TimeElapsedColumn(), TimeRemainingColumn())
    with bars as progress, ThreadPoolExecutor(min(threads, batches), "batch", torch.set_num_threads, (each,)) as pool:
        bar = progress.add_task(name, total=schedule.steps, completed=step, loss=float("nan"), rate=0.0)
        started_at = step
        try:
            while step < schedule.steps:
                groups = (group for optimizer in optimizers for group in optimizer.param_groups)
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * schedule.share_at(step)
                value = mean_gradients(pool, loss, range(step * batches, (step + 1) * batches), trained)
                nn.utils.clip_grad_norm_(trained, schedule.clip)
                for optimizer in optimizers:
                    optimizer.step()
                step += 1
                if step % 10 == 0 or step == schedule.steps:
                    now = float(value)
                    if not math.isfinite(now):
                        raise ArithmeticError(f"the loss of {name} is {now} at step {step}; lower the learning rate")
                    smooth = now if smooth is None else 0.9 * smooth + 0.1 * now
                    pace = (step - started_at) * samples / (time.monotonic() - begun)
                    progress.update(bar, completed=step, loss=smooth, rate=pace)
                if time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                    save()
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            save()
            raise
    save()
    return Effort(spent + time.monotonic() - begun, worked + time.process_time() - begun_working)


def mean_gradients(
    pool: ThreadPoolExecutor, loss: Callable[[int], Tensor], numbers: Sequence[int], trained: Sequence[nn.Parameter]
) -> Tensor:
    """Put the mean gradient of the batches `numbers` into `trained`; their mean loss, a scalar.

    The sum is taken in the order of the numbers, whichever batch is ready first.
    """

    def one(number: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        value = loss(number)
        return value.detach(), torch.autograd.grad(value, trained, allow_unused=True)

    values, gradients = zip(*pool.map(one, numbers), strict=True)
    for parameter, parts in zip(trained, zip(*gradients, strict=True), strict=True):
        known = [part for part in parts if part is not None]
        parameter.grad = sum(known[1:], known[0]) / len(numbers) if known else None
    return sum(values[1:], values[0]) / len(numbers)


def optimizers_of(network: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of `layers` and AdamW for the rest. Vectors do not decay."""
    named = list(network.named_parameters())
    hidden = [p for name, p in named if schedule.matrix_rate is not None and p.ndim == 2 and ".layers." in f".{name}"]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.0 if hidden else schedule.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))]
    if hidden and schedule.matrix_rate is not None:
        optimizers.append(torch.optim.Muon(hidden, lr=schedule.matrix_rate, weight_decay=schedule.weight_decay))
    return optimizers


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of mixed precision on this CPU: `auto` takes bfloat16 where the processor multiplies in it; None is float32.

    Raises:
        ValueError: `precision` is none of `auto`, `bf16`, `fp32`.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"the precision is auto, bf16 or fp32; got {precision!r}")
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def autocast(precision: torch.dtype | None, device: str = "cpu") -> torch.autocast:
    """Mixed precision in `precision`, or none of it. Without the cache of casts: each weight is used once, and threads would share it."""
    return torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None, cache_enabled=False)
