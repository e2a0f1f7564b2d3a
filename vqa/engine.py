"""The loops: one epoch of training, and the answers to all questions of a loader. They see no command line."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.errors import InputError
from data.loading import Batch, moved
from data.table import NO_ANSWER
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
    after_step: Callable[[float], None],
) -> None:
    """Trains on batches in their order; `see` makes of a batch's images what the model takes, a batch goes through the
    model in `accumulate` parts, and `after_step` is called with each step's loss.

    Raises:
        NotFiniteError: a loss or gradient is not finite; the model is as it was before that step.
    """
    model.train()
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for batch, whole in moved(batches, device):
        optimiser.zero_grad(set_to_none=True)
        value = torch.zeros((), device=device)
        for part in whole.parts(accumulate):
            with autocast(device, precision):
                logits = model(see(part.images), part.tokens, part.lengths, places=part.places).logits
            # the loss takes logits: its own softmax is the only one
            of_part = F.cross_entropy(logits.float(), answer_targets(part.labels, logits.shape[1], loss))
            of_part = of_part * (len(part.rows) / len(batch.rows))
            if not torch.isfinite(of_part):
                raise NotFiniteError(f"the loss is {of_part.item()}", part.rows.tolist())
            of_part.backward()
            value += of_part.detach()
        norm = nn.utils.clip_grad_norm_(trained, clip)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the norm of the gradient is {norm.item()}", batch.rows.tolist())
        optimiser.step()
        schedule.step()
        after_step(value.item())


class NotFiniteError(InputError):
    """A loss or gradient that is not finite: most often a learning rate that is too high."""

    def __init__(self, what: str, rows: list[int]) -> None:
        """`rows` are the rows of the batch in the question table."""
        super().__init__(what)
        self.rows = rows


@torch.inference_mode()
def predict_classes(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    see: Callable[[Tensor], Tensor | StageMap],
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The most probable answer class of every question: rows and classes, int64 [N] each; `see` as in `train_steps`."""
    model.eval()
    rows, classes = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for batch, there in moved(batches, device):
        with autocast(device, precision):
            logits = model(see(there.images), there.tokens, there.lengths, places=there.places).logits
        rows.append(batch.rows)
        classes.append(logits.argmax(1).cpu())
    return torch.cat(rows), torch.cat(classes)
