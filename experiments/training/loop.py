"""The loops: training steps, and the answers to all questions of a table. They need no task and no command line."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batch, FileImages, QuestionDataset, batches_by_image
from data.loader import make_loader, moved, readable
from experiments.process_group import Processes
from experiments.training.nonfinite import NotFiniteError, listed, located
from vqa.devices import autocast
from vqa.io.errors import InputError
from vqa.io.progress import progress
from vqa.resnet import StageMap
from vqa.settings.schema import Settings, TrainSettings


def answer_logits(
    model: nn.Module, batch: Batch, prepare_images: Callable[[Tensor], Tensor | StageMap], precision: str
) -> Tensor:
    """The model's scores of all answers, float32 [B, A], for a batch that is on the model's device."""
    with autocast(batch.images.device, precision):
        images, places = prepare_images(batch.images), batch.places
        logits = model(images, batch.tokens, batch.lengths, places=places, **batch.extras).logits
    return logits.float()


def train_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch, str], Tensor],
    settings: TrainSettings,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Iterator[float | NotFiniteError]:
    """Trains a model, or a wrapper of it, on batches in their order, one step for each.

    `loss_of` computes the model's loss of a batch on its device, with reduction `mean` or `none`.

    Yields:
        The loss of each step; or why it is skipped: its gradient is not finite, and `skip_not_finite` is not 0. The
        model is then as before the step, running statistics included.

    Raises:
        NotFiniteError: a loss or gradient is not finite and not skipped; the parameters are as before that step.
    """
    model.train()
    several = isinstance(model, nn.parallel.DistributedDataParallel)
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for batch in moved(batches, trained[0].device):
        optimiser.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in model.buffers()] if settings.skip_not_finite else []
        parts, loss = batch.parts(settings.accumulate), 0.0
        for part in parts:
            # processes average their gradients once a step, with its last part
            with model.no_sync() if several and part is not parts[-1] else nullcontext():
                of_part = loss_of(part, "mean") * (len(part.rows) / len(batch.rows))
                of_part.backward()
            loss += of_part.detach()
        # a GPU is waited for here alone: it takes the optimiser's step while the next batch is prepared
        norm, loss = nn.utils.clip_grad_norm_(trained, settings.clip).item(), loss.item()
        if math.isfinite(norm + loss):
            optimiser.step()
            schedule.step()
            yield loss
            continue
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        error = located(what, model, parts, loss_of)
        # the gradient is the same in all processes, so that all skip the step; the loss alone is not
        if not settings.skip_not_finite or math.isfinite(norm):
            raise error
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        yield error


def predict_classes(
    model: nn.Module,
    data: QuestionDataset,
    settings: Settings,
    processes: Processes,
    *,
    prepare_images: Callable[[Tensor], Tensor | StageMap],
    what: str,
    batches: Iterable[Batch] | None = None,
) -> np.ndarray:
    """The most probable answer class of every question, int64 [N], in every process; each predicts a share of them.

    `settings` has the batch size, precision and workers; `what` names the work in its progress and errors. A caller
    that reads this process's share itself gives its `batches`, in any order.

    Raises:
        InputError: the model's scores of a question's answers are not finite, or an image cannot be read.
    """
    device = next(model.parameters()).device
    if batches is None:
        share = batches_by_image(data.table, settings.train.batch_size, processes.rank, processes.world_size)
        batches = read_batches(data, share, settings, device, what if processes.is_main else None)

    @torch.inference_mode()
    def predict_share() -> np.ndarray:
        model.eval()
        # numbers, not tensors: a tensor of a worker holds a file open, and small ones between large ones waste memory
        rows: list[int] = []
        classes: list[int] = []
        for batch in moved(batches, device):
            best, class_ = answer_logits(model, batch, prepare_images, settings.precision).max(1)  # NaN is the largest
            if not best.isfinite().all():
                bad = data.table.ids[batch.rows[~best.isfinite()].cpu().numpy()]
                why = f"the model's scores of the answers are not finite for {len(bad)} question(s)"
                raise InputError(f"{what}: {why} {listed(bad)}")
            rows += batch.rows.tolist()
            classes += class_.tolist()
        return np.array([rows, classes], np.int64)

    answers = np.empty(len(data), np.int64)
    for rows, classes in processes.gather(processes.agreed(predict_share)):
        answers[rows] = classes
    return answers


def read_batches(
    data: QuestionDataset, rows: Collection[list[int]], settings: Settings, device: torch.device, what: str | None
) -> Iterator[Batch]:
    """Batches of the given rows, with the progress of `what` (None: not shown).

    Raises:
        InputError: an image is missing or damaged, and `data.skip_bad_images` is false; raw files are read to the end
            first, and all bad images listed.
    """
    skip, images = settings.data.skip_bad_images, data.images
    batches = readable(make_loader(data, rows, settings.workers, device))
    for batch in batches if what is None else progress(batches, len(rows), what):
        if skip or not isinstance(images, FileImages) or not images.bad.any():
            yield batch
    if isinstance(images, FileImages):
        images.settle(skip)
