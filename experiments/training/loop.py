"""The loops: one epoch of training, and the answers to all questions of a loader. They know no command line."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import Batch, moved
from experiments.training.nonfinite import NotFiniteError, place_of_first
from vqa.devices import autocast
from vqa.resnet import StageMap
from vqa.settings.schema import Settings
from vqa.text.answers import NO_ANSWER


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


def answer_loss(logits: Tensor, labels: Tensor, kind: str, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [B, A] with `answer_targets`: of the batch, or [B] with `reduction` none."""
    # the loss takes logits: its own softmax is the only one
    return F.cross_entropy(logits, answer_targets(labels, logits.shape[1], kind), reduction=reduction)


def train_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: Settings,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    loss: Callable[..., Tensor],
    prepare_images: Callable[[Tensor], Tensor | StageMap],
    device: torch.device,
) -> Iterator[float | NotFiniteError]:
    """Trains on batches in their order, a step each.

    Args:
        model: the model, or a wrapper of it.
        batches: the batches.
        settings: `precision`, `train.clip`, `train.accumulate` and `train.skip_not_finite` count here.
        optimiser: of the trained parameters.
        schedule: of the learning rate, moved on by every step that is taken.
        loss: of logits and labels, with `reduction` mean or none.
        prepare_images: a batch's images → the model's input.
        device: where the model is.

    Yields:
        The loss of each step; or why it is skipped, where its gradient is not finite and `train.skip_not_finite` is not
        0. The model is then as before the step, running statistics included.

    Raises:
        NotFiniteError: a loss or gradient is not finite and not skipped; the parameters are as before that step.
    """
    model.train()
    train = settings.train
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def loss_of(part: Batch, reduction: str = "mean") -> Tensor:
        with autocast(device, settings.precision):
            logits = model(prepare_images(part.images), part.tokens, part.lengths, places=part.places).logits
        return loss(logits.float(), part.labels, reduction=reduction)

    for batch in moved(batches, device):
        optimiser.zero_grad(set_to_none=True)
        value = torch.zeros((), device=device)
        buffers = [buffer.clone() for buffer in model.buffers()] if train.skip_not_finite else []
        parts = batch.parts(train.accumulate)
        for part in parts:
            with nullcontext() if part is parts[-1] else _alone(model):
                of_part = loss_of(part) * (len(part.rows) / len(batch.rows))
                of_part.backward()
            value += of_part.detach()
        norm = nn.utils.clip_grad_norm_(trained, train.clip)
        if torch.isfinite(norm + value):
            optimiser.step()
            schedule.step()
            yield value.item()
            continue
        what = f"the norm of the gradient is {norm}" if torch.isfinite(value) else f"the loss is {value}"
        error = _not_finite(model, what, parts, loss_of)
        # the gradient is the same in all processes, so that all skip the step; the loss alone is not
        if not train.skip_not_finite or torch.isfinite(norm):
            raise error
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        yield error


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
    prepare_images: Callable[[Tensor], Tensor | StageMap],
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The most probable answer class of every question: rows and classes, int64 [N] each.

    Raises:
        NotFiniteError: the model has no probabilities for a question.
    """
    model.eval()
    # numbers, not tensors: one of a worker's batch holds a file open, and small ones between large ones split the heap
    rows: list[int] = []
    classes: list[int] = []
    for batch in moved(batches, device):
        with autocast(device, precision):
            logits = model(prepare_images(batch.images), batch.tokens, batch.lengths, places=batch.places).logits
        best, class_ = logits.max(1)  # NaN is the largest
        if not best.isfinite().all():
            bad = batch.rows[~best.isfinite()].tolist()
            raise NotFiniteError(f"the model's scores of the answers are not finite for {len(bad)} question(s)", bad)
        rows += batch.rows.tolist()
        classes += class_.tolist()
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(classes, dtype=torch.int64)
