"""The loops: one epoch of training, and the answers to all questions of a loader. They see no command line."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.loading import Batch, moved
from data.table import NO_ANSWER
from vqa.not_finite import NotFiniteError, place_of_first
from vqa.resnet import StageMap


def answer_targets(labels: Tensor, answers: int, kind: str) -> Tensor:
    """The distribution over answer classes that a model is trained towards.

    Args:
        labels: classes of the given answers [B, K], NO_ANSWER outside the vocabulary.
        answers: number of classes A.
        kind: `soft` (counts clipped at 3, then normalised; the authors' code) or `hard` (all on the most common
            answer, the lowest class among equals).

    Returns:
        float32 [B, A]; each row sums to 1 (to 0 if no given answer is in the vocabulary).
    """
    known = (labels != NO_ANSWER).float()
    counts = torch.zeros(len(labels), answers, device=labels.device)
    counts.scatter_add_(1, labels.clamp(min=0), known)
    if kind == "hard":
        return F.one_hot(counts.argmax(1), answers).float() * (counts.amax(1, keepdim=True) > 0)
    counts.clamp_(max=3)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 autocast on a device, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def train_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    see: Callable[[Tensor], Tensor | StageMap],
    loss: str,
    precision: str,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clip: float,
    accumulate: int,
    device: torch.device,
    after_step: Callable[[float | None], None],
    leave_out: Callable[[NotFiniteError], bool] | None = None,
) -> None:
    """Trains on batches in their order.

    Args:
        model: the model, or a wrapper of it.
        batches: the batches.
        see: makes of a batch's images what the model takes.
        loss: `soft` or `hard`, as in `answer_targets`.
        precision: as in `autocast`.
        optimiser: of the trained parameters.
        schedule: of the learning rate, moved on by every step that is taken.
        clip: largest norm of the gradient.
        accumulate: parts that a batch goes through the model in.
        device: where the model is.
        after_step: called with each step's loss, None for a step that is left out.
        leave_out: asked, where a loss or gradient is not finite, whether to go on without that step; the model is then
            as it was before it, running statistics included.

    Raises:
        NotFiniteError: a loss or gradient is not finite and not left out; the parameters are as before that step.
    """
    model.train()
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def logits_of(part: Batch) -> Tensor:
        with autocast(device, precision):
            return model(see(part.images), part.tokens, part.lengths, places=part.places).logits.float()

    def loss_of(part: Batch, reduction: str = "mean") -> Tensor:
        logits = logits_of(part)
        # the loss takes logits: its own softmax is the only one
        targets = answer_targets(part.labels, logits.shape[1], loss)
        return F.cross_entropy(logits, targets, reduction=reduction)

    for batch, whole in moved(batches, device):
        optimiser.zero_grad(set_to_none=True)
        value = torch.zeros((), device=device)
        before = [buffer.clone() for buffer in model.buffers()] if leave_out else []
        *first, last = whole.parts(accumulate)
        for part in (*first, last):
            with nullcontext() if part is last else _alone(model):
                of_part = loss_of(part) * (len(part.rows) / len(batch.rows))
                of_part.backward()
            value += of_part.detach()
        norm = nn.utils.clip_grad_norm_(trained, clip)
        if not torch.isfinite(norm + value):
            what = f"the norm of the gradient is {norm}" if torch.isfinite(value) else f"the loss is {value}"
            error = _not_finite(model, what, whole.parts(accumulate), loss_of)
            # the gradient is the same in all processes, so that all leave the step out; the loss alone is not
            if leave_out is None or torch.isfinite(norm) or not leave_out(error):
                raise error
            for buffer, kept in zip(model.buffers(), before, strict=True):
                buffer.copy_(kept)
            after_step(None)
            continue
        optimiser.step()
        schedule.step()
        after_step(value.item())


def _alone(model: nn.Module) -> AbstractContextManager:
    """Gradients are not yet averaged over processes: it is done once a step, with its last part."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


@torch.no_grad()
def _not_finite(
    model: nn.Module, what: str, parts: Iterable[Batch], loss_of: Callable[[Batch, str], Tensor]
) -> NotFiniteError:
    """What is wrong, where it began, and the questions whose own loss is not finite (all, if none's is)."""
    losses: dict[int, float] = {}

    def compute() -> None:
        for part in parts:
            losses.update(zip(part.rows.tolist(), loss_of(part, "none").tolist(), strict=True))

    place = place_of_first(model, compute)
    if not losses:
        compute()
    rows = [row for row, value in losses.items() if not math.isfinite(value)] or list(losses)
    return NotFiniteError(f"{what}; what is not finite first is {place or 'a gradient'}", rows)


@torch.inference_mode()
def predict_classes(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    see: Callable[[Tensor], Tensor | StageMap],
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The most probable answer class of every question: rows and classes, int64 [N] each; `see` as in `train_steps`.

    Raises:
        NotFiniteError: the model has no probabilities for a question.
    """
    model.eval()
    # numbers, not tensors: one of a worker's batch holds a file open, and small ones between large ones split the heap
    rows: list[int] = []
    classes: list[int] = []
    for batch, there in moved(batches, device):
        with autocast(device, precision):
            logits = model(see(there.images), there.tokens, there.lengths, places=there.places).logits
        best, class_ = logits.max(1)  # NaN is the largest
        if not best.isfinite().all():
            bad = batch.rows[~best.isfinite().cpu()].tolist()
            raise NotFiniteError(f"the model's scores of the answers are not finite for {len(bad)} question(s)", bad)
        rows += batch.rows.tolist()
        classes += class_.tolist()
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(classes, dtype=torch.int64)
