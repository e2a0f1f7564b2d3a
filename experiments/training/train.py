"""Begins or resumes a run: checks its directory and its data, builds the model, restores a checkpoint, trains."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from data.batches import EpochSampler
from data.loader import check_shared_memory
from experiments.prepare import check_world
from experiments.process_group import Processes, joined_group, this_process
from experiments.tasks import TASKS, Task
from experiments.training.checkpoint import Progress, TrainingState, load_checkpoint, read_as_checkpoint
from experiments.training.optimiser import build_optimiser, build_schedule
from experiments.training.run_directory import RunDirectory
from experiments.training.stage_cache import choose_images
from experiments.training.trainer import Trainer
from experiments.training.warm_start import splits_seen
from vqa.io.errors import InputError
from vqa.io.locks import held
from vqa.resnet import ModulatedResNet
from vqa.saved_model.files import load_model, read_weights, weight_files
from vqa.settings.schema import Settings


def train(
    settings: Settings, *, resume: bool = False, runs: Path = Path("runs"), init_from: Path | None = None
) -> RunDirectory:
    """Trains a recipe into `runs/NAME`; a finished run is not changed.

    Args:
        settings: the recipe; its h5 file must exist.
        resume: from the last checkpoint, if there is one.
        runs: the folder of run directories.
        init_from: a run or model directory whose weights a new run starts from, where they fit; a checkpoint replaces
            them.

    Raises:
        InputError: the data, the backbone, the run directory or the model to start from are not as the recipe needs
            them, another process trains there, the loss is not finite, or the disk is full.
        Interrupted: a signal came; the step in which it came is finished and saved in a checkpoint. Several processes
            that wait for a batch or validate cannot agree on a step: they keep their last checkpoint.
    """
    run = RunDirectory(runs / settings.name)
    processes = this_process()
    with joined_group(processes, processes.device(settings.device)), ExitStack() as stack:

        def look() -> bool:
            if processes.is_main:
                stack.enter_context(held(run.lock, run.path))
            run.check(settings, resume, init_from)
            check_world(settings)
            return run.checkpoint.exists()

        # all processes decide from the same facts, and none writes before all have read them
        exists = processes.gather(processes.agreed(look))
        if len(set(exists)) > 1:
            raise InputError(f"{run.checkpoint}: not visible to every process; runs/ must be on a disk that all share")
        task = TASKS[settings.task](settings)
        saved = _last_checkpoint(run, task, processes) if exists[0] else None
        if saved is not None and saved["progress"].is_finished(settings.train):
            early = len(saved["progress"].history) < settings.train.epochs
            why = ", stopped early by train.patience (raise it to continue)" if early else ""
            processes.say(f"{run.path}: finished{why}, nothing to do")
        else:
            if lacking := [split for split in settings.data.splits if split not in task.store.splits]:
                without = f"holds no split {', '.join(lacking)}, which data.splits names"
                processes.say(f"{task.store.path}: {without}: trained without; `preprocess` adds it, if you need it")
            prepare(task, run, processes, saved, init_from).run_epochs()
    return run


def _last_checkpoint(run: RunDirectory, task: Task, processes: Processes) -> dict[str, Any]:
    """Reads the checkpoint. Raises InputError if it is damaged, of other data or of another number of processes, or if
    the best epoch's weights, which are in `model/`, are damaged or missing.
    """
    saved = load_checkpoint(run.checkpoint)
    with read_as_checkpoint(run.checkpoint):
        saved["progress"] = TypeAdapter(Progress).validate_python(saved["progress"])
        if saved["data"] != task.identity:
            raise InputError(f"{task.store.path}: not the data that {run.path} was trained on; choose another `name`")
        if (count := len(saved["processes"])) != processes.world_size:
            raise InputError(f"{run.checkpoint}: made by {count} process(es); resume with as many")
    if saved["progress"].history:
        try:
            read_weights(run.model)
        except InputError as error:
            raise InputError(f"{error}: the best epoch is lost; choose another `name`") from None
    return saved


def prepare(
    task: Task,
    run: RunDirectory,
    processes: Processes,
    saved: dict[str, Any] | None = None,
    init_from: Path | None = None,
) -> Trainer:
    """Builds the task's model, with weights of the model `init_from`, restores a `saved` checkpoint, fills the stage
    cache, writes the settings and the environment of the run. Raises InputError as `train`.
    """
    settings, train, size = task.settings, task.settings.train, processes.world_size
    if train.batch_size % size:
        raise InputError(f"train.batch_size: {train.batch_size} questions cannot be shared equally by {size} processes")
    device = processes.device(settings.device)
    warm, trained_before = None, []
    if init_from is not None and saved is None:
        warm = processes.agreed(lambda: load_model(init_from))
        trained_before = splits_seen(warm, settings)
    torch.manual_seed(settings.seed)  # the same initial weights in every process
    model = task.new_model(fresh=saved is None, say=processes.say, init_from=warm).to(device)
    sampler = task.sampler(processes, epoch=1)
    _check_batch_statistics(settings, model.resnet, sampler)
    torch.manual_seed(settings.seed + processes.rank)  # but its own dropout masks

    optimiser = build_optimiser(train, model)
    schedule = build_schedule(train, optimiser, train.epochs * sampler.batches)
    state = TrainingState(model, optimiser, schedule, device, Progress(trained_before=trained_before))
    if saved is not None:
        with read_as_checkpoint(run.checkpoint):
            state.restore(saved, processes.rank)
        processes.say(f"{run.path}: resumes at epoch {state.progress.epoch}, step {state.progress.step}")
        if init_from is not None:
            processes.say(f"--init-from: {init_from} is not read again: the checkpoint holds all weights")

    trainer = Trainer(task, run, processes, state, choose_images(task, model.resnet, processes))
    check_shared_memory(trainer.training, sampler, settings.workers)
    if processes.is_main:
        weights = weight_files(warm.folder) if warm is not None else []
        run.start(settings, device, size, trainer.trained_count, weights, task.identity[:12])
        task.save_companions(run.model)
    return trainer


def _check_batch_statistics(settings: Settings, resnet: ModulatedResNet, sampler: EpochSampler) -> None:
    """Raises InputError where a step would take the statistics of one value per channel."""
    if not settings.views or resnet.statistics != "batch":
        return
    train, size = settings.train, settings.data.image_size
    mine = sampler.batch_size // sampler.world_size
    part = -(-mine // train.accumulate)
    fewest = (mine % part or part) * sampler.world_size  # the last part is the smallest
    if fewest < (needed := resnet.least_batch(size)):
        raise InputError(
            f"backbone.statistics: at {size} px a batch's statistics need {needed} "
            f"questions; train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts gives "
            f"{fewest}: take a larger batch, larger images, or population"
        )
