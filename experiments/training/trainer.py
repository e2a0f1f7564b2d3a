"""Training: prepares a run, loops over epochs, keeps the best model, and can be killed and resumed at any step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.batches import (
    Batch,
    EpochSampler,
    QuestionDataset,
    batches_by_image,
    check_shared_memory,
    make_loader,
    readable,
)
from data.h5_file import H5Images
from data.question_table import QuestionTable
from experiments.process_group import Processes, averaging_gradients, this_process, together
from experiments.training.checkpoint import TrainingState, load_checkpoint
from experiments.training.loop import predict_classes, train_steps
from experiments.training.nonfinite import NotFiniteError
from experiments.training.optimiser import build_optimiser, build_schedule, trained_parameters
from experiments.training.run_data import VQATask
from experiments.training.run_directory import RunDirectory, peak_memory_mib
from experiments.training.stage_cache import ImageSource, choose_images
from vqa import saved_model
from vqa.devices import choose_device
from vqa.io.errors import InputError, NotWrittenError
from vqa.io.locks import held
from vqa.io.processes import Interrupted, StopRequest
from vqa.io.progress import progress as shown
from vqa.metrics import Scores
from vqa.resnet import ModulatedResNet
from vqa.settings.schema import Settings


def train(settings: Settings, *, resume: bool = False, runs: Path = Path("runs")) -> RunDirectory:
    """Trains a recipe into `runs/NAME`.

    Args:
        settings: the recipe; its h5 file must be there.
        resume: from the last checkpoint, if there is one.
        runs: where run directories are.

    Raises:
        InputError: the data, the backbone or the run directory are not as the recipe needs them, another process
            trains there, the loss is not finite, or the disk is full.
        Interrupted: by a signal, after the step it came in, with a checkpoint of it.
    """
    run = RunDirectory(runs / settings.name)
    processes = this_process()
    with (
        together(processes, choose_device(settings.device, processes.local_rank, processes.world_size)),
        ExitStack() as stack,
    ):

        def look() -> bool:
            if processes.is_main:
                stack.enter_context(held(run.lock, run.path))
            run.check(settings, resume)
            return run.checkpoint.exists()

        # every process decides from what all of them see, and none writes before all have looked
        if len(set(processes.gather(processes.agreed(look)))) > 1:
            raise InputError(f"{run.checkpoint}: not seen by every process; runs/ must be on a disk that all share")
        prepare(settings, run, processes).run_epochs()
    return run


def prepare(settings: Settings, run: RunDirectory, processes: Processes) -> "Trainer":
    """Opens the data, builds the model, resumes from the last checkpoint if there is one, fills the cache of stage
    maps and writes what explains the run; a finished run is left as it is.

    Raises:
        InputError: as `train`.
    """
    train = settings.train
    if train.batch_size % processes.world_size:
        raise InputError(
            f"train.batch_size: {train.batch_size} questions cannot be shared equally by "
            f"{processes.world_size} processes"
        )
    device = choose_device(settings.device, processes.local_rank, processes.world_size)
    task = VQATask(settings)
    fresh = not run.checkpoint.exists()

    torch.manual_seed(settings.seed)  # the same initial weights in every process
    model = task.new_model(fresh=fresh, say=processes.say).to(device)
    sampler = epoch_sampler(settings, task.training, processes, epoch=1)
    _check_batch_statistics(settings, model.resnet, sampler)
    torch.manual_seed(settings.seed + processes.rank)  # but dropout of its own

    optimiser = build_optimiser(train, model)
    schedule = build_schedule(train, optimiser, train.epochs * len(sampler))
    state = TrainingState(model, optimiser, schedule, device)
    if not fresh:
        _resume(state, run, task, processes)
        state.progress.decide_if_finished(train.epochs, train.patience)  # more may be asked for than before

    images = ImageSource(H5Images(task.store.path), task.preprocessing, settings.speed.channels_last)
    if not state.progress.finished:
        images = choose_images(model.resnet, task.store, images, device, settings.data.cache_gib, processes)
    trainer = Trainer(settings, run, processes, task, state, images)
    if not state.progress.finished:
        check_shared_memory(trainer.training, trainer.sampler(state.progress.epoch), settings.workers)
        if processes.is_main:
            run.start(settings, device, processes.world_size, trainer.trained_count)
            task.save_companions(run.model)
    return trainer


def epoch_sampler(
    settings: Settings, table: QuestionTable, processes: Processes, epoch: int, start: int = 0
) -> EpochSampler:
    """The batches of an epoch from `start` on, as far as they are this process's."""
    return EpochSampler(
        table.images,
        settings.train.batch_size,
        settings.seed,
        epoch,
        processes.rank,
        processes.world_size,
        together=settings.train.together,
        start=start,
    )


def _check_batch_statistics(settings: Settings, resnet: ModulatedResNet, sampler: EpochSampler) -> None:
    """Raises InputError where a step would take the statistics of one value a channel."""
    train, size = settings.train, settings.data.image_size
    mine = sampler.batch_size // sampler.world_size
    part = -(-mine // train.accumulate)
    fewest = (mine % part or part) * sampler.world_size  # the last part is the smallest
    needed = resnet.least_batch(size)
    if "image" in settings.inputs and resnet.statistics == "batch" and fewest < needed:
        raise InputError(
            f"backbone.statistics: at {size} px a batch's statistics need {needed} "
            f"questions; train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts gives "
            f"{fewest}: take a larger batch, larger images, or population"
        )


def _resume(state: TrainingState, run: RunDirectory, task: VQATask, processes: Processes) -> None:
    """Takes everything from the last checkpoint.

    Raises:
        InputError: it is damaged, or of other data or another number of processes.
    """
    saved = load_checkpoint(run.checkpoint)
    if not task.is_same_data(saved["data"]):
        raise InputError(f"{task.store.path}: not the data that {run.path} was trained on")
    if (count := len(saved["processes"])) != processes.world_size:
        raise InputError(f"{run.checkpoint}: made by {count} process(es); resume with as many")
    state.restore(saved, processes.rank)
    processes.say(f"{run.path}: goes on at epoch {state.progress.epoch}, step {state.progress.step}")


class Trainer:
    """Trains one process's part of a run from the `state` on, which `prepare` brings to the last checkpoint."""

    def __init__(
        self,
        settings: Settings,
        run: RunDirectory,
        processes: Processes,
        task: VQATask,
        state: TrainingState,
        images: ImageSource,
    ) -> None:
        self.settings, self.run, self.processes = settings, run, processes
        self.task, self.state, self.images = task, state, images
        self.model, self.progress, self.device = state.model, state.progress, state.device
        self.training, self.validation = (
            None if table is None else QuestionDataset(table, images.images, share=settings.speed.share_images)
            for table in (task.training, task.validation)
        )
        self.trained_count = sum(parameter.numel() for parameter in trained_parameters(state.model))
        self.writes_tensorboard = settings.train.tensorboard
        self.stop = StopRequest()

    def run_epochs(self) -> None:
        """Trains until the last epoch or early stopping; does nothing if that is past."""
        say, run, task = self.processes.say, self.run.path, self.task
        if self.progress.finished:
            early = len(self.progress.history) < self.settings.train.epochs
            why = ", stopped early by train.patience (which may be raised)" if early else ""
            say(f"{run}: finished{why}, nothing to do")
            return
        say(f"{run}: {len(self.training)} questions, {self.trained_count:,} trained parameters, on {self.device}")
        if task.stand_ins:
            say(
                f"{task.store.path}: {task.stand_ins} image(s) were missing or unreadable: their questions "
                "are not trained on, and validated with a stand-in of the mean colour"
            )
        if self.settings.speed.compile:
            self.model.resnet.compile()
        # Wrapped here and not kept: a wrapper that outlives its process group can abort at exit (gloo).
        wrapped = self.model if self.processes.world_size == 1 else averaging_gradients(self.model)
        with self.stop:
            while not self.progress.finished:
                self._train_epoch(wrapped)
                self._end_epoch()
                self._stop_if_asked()

    def _train_epoch(self, model: nn.Module) -> None:
        progress, every = self.progress, self.settings.train.checkpoint_every
        sampler = self.sampler(progress.epoch, progress.step)
        batches = self.batches(sampler)
        if self.processes.is_main:
            batches = shown(batches, sampler.batches, f"epoch {progress.epoch}", done=progress.step)
        begun = time.monotonic() - progress.seconds
        try:
            for loss in self.steps(model, batches):
                if isinstance(loss, NotFiniteError):
                    self._skip(loss)
                else:
                    progress.loss_sum += loss
                progress.step += 1
                progress.seconds = time.monotonic() - begun
                due = bool(every) and (progress.step % every == 0 or progress.step == sampler.batches)
                if due:
                    self._save_checkpoint()
                self._stop_if_asked(save=not due)
        except NotFiniteError as error:
            raise InputError(
                f"{self._at_step(error)}; a lower train.learning_rate or train.clip under another `name` may help, "
                "train.skip_not_finite leaves such steps out; the last checkpoint is kept"
            ) from None

    def sampler(self, epoch: int, start: int = 0) -> EpochSampler:
        """As `epoch_sampler`."""
        return epoch_sampler(self.settings, self.task.training, self.processes, epoch, start)

    def batches(self, sampler: EpochSampler) -> Iterator[Batch]:
        """The training batches of a sampler; a signal ends the wait for one that does not come."""
        loader = make_loader(self.training, sampler, self.settings.workers, self.device)
        return readable(loader, self._stop_waiting_if_asked)

    def steps(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[float | NotFiniteError]:
        """Trains the model, or a wrapper of it, on batches as the settings say; yields and raises as `train_steps`."""
        return train_steps(
            model,
            batches,
            self.settings,
            self.state.optimiser,
            self.state.schedule,
            loss=self.task.loss,
            prepare_images=self.images.prepare,
            device=self.device,
        )

    def _skip(self, error: NotFiniteError) -> None:
        """Counts a step that was skipped, and says so. Raises the error if the settings allow no more of them."""
        if self.progress.left_out == self.settings.train.skip_not_finite:
            raise error
        self.processes.say(f"{self._at_step(error)}; this step is left out")
        self.progress.left_out += 1

    def _at_step(self, error: NotFiniteError) -> str:
        where = f"{self.run.path}: epoch {self.progress.epoch}, step {self.progress.step + 1}"
        return f"{where}: {error.of(self.task.training.ids)}"

    def _stop_if_asked(self, save: bool = False) -> None:
        """Ends the run where a signal came to any process; `save` says that the last step is not saved yet."""
        if self.processes.any(self.stop.made, self.device):
            if save:
                self._save_checkpoint()
            self.stop.obey()

    def _stop_waiting_if_asked(self) -> None:
        """Ends the run where a signal came while a batch does not."""
        if self.stop.made:
            if self.processes.world_size == 1:  # several have their last checkpoint
                self._save_checkpoint()
            self.stop.obey()

    def _end_epoch(self) -> None:
        progress = self.progress
        if progress.left_out == progress.step:
            raise InputError(f"{self.run.path}: no step of epoch {progress.epoch} was finite; train.learning_rate?")
        losses = self.processes.gather(progress.loss_sum)
        line: dict[str, Any] = {
            "epoch": progress.epoch,
            "steps": progress.step,
            "steps_left_out": progress.left_out,
            "train_loss": sum(losses) / len(losses) / (progress.step - progress.left_out),
            "val_overall": None,
            "learning_rate": self.state.schedule.get_last_lr()[0],
            "seconds": round(progress.seconds, 2),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        if self.validation is not None:
            try:
                with self.stop.suspended():
                    scores = self._validate()
            except Interrupted:
                if self.processes.world_size == 1:  # several have their last checkpoint
                    self._save_checkpoint()
                raise
            line |= {"val_overall": scores["overall"], "val_per_answer_type": scores["per_answer_type"]}
        progress.history.append(line)
        overall = line["val_overall"]
        if overall is None or progress.best_overall is None or overall > progress.best_overall:
            progress.best_overall, progress.best_epoch = overall, progress.epoch
            if self.processes.is_main:
                facts = {"trained_on": self.settings.train.splits, "epoch": progress.epoch, "val_overall": overall}
                saved_model.save_weights(self.run.model, self.model, facts)
        progress.decide_if_finished(self.settings.train.epochs, self.settings.train.patience)
        self._report(line)
        progress.epoch, progress.step, progress.left_out = progress.epoch + 1, 0, 0
        progress.loss_sum, progress.seconds = 0.0, 0.0
        self._save_checkpoint()

    def _validate(self) -> Scores:
        data, processes = self.validation, self.processes
        size = self.settings.train.batch_size
        rows = batches_by_image(data.table, size, processes.rank, processes.world_size)
        batches = readable(make_loader(data, rows, self.settings.workers, self.device))
        if processes.is_main:
            batches = shown(batches, len(rows), f"validation {self.progress.epoch}")
        try:
            rows, classes = predict_classes(
                self.model,
                batches,
                prepare_images=self.images.prepare,
                precision=self.settings.precision,
                device=self.device,
            )
        except NotFiniteError as error:
            raise InputError(
                f"{self.run.path}: after epoch {self.progress.epoch}, {error.of(data.table.ids)}"
            ) from None
        everyone = processes.gather((rows.numpy(), classes.numpy()))
        scores = None
        if processes.is_main:
            answers = np.empty(len(data), np.int64)
            for their_rows, their_classes in everyone:
                answers[their_rows] = their_classes
            scores = self.task.score(answers)
        return processes.broadcast(scores)

    def _report(self, line: dict[str, Any]) -> None:
        if not self.processes.is_main:
            return
        self.run.write_metrics(self.progress.history)
        if self.writes_tensorboard:
            try:
                self.run.write_tensorboard(line)
            except NotWrittenError as error:
                self.processes.say(f"{error}; training goes on without TensorBoard")
                self.writes_tensorboard = False
        by_type = "  ".join(f"{kind} {value:.2f}" for kind, value in line.get("val_per_answer_type", {}).items())
        scored = "" if line["val_overall"] is None else f"  val {line['val_overall']:.2f} %  ({by_type})"
        epoch = f"epoch {line['epoch']}/{self.settings.train.epochs}"
        self.processes.say(f"{epoch}  loss {line['train_loss']:.4f}{scored}  {line['seconds']:.0f} s")

    def _save_checkpoint(self) -> None:
        self.state.save(self.run.checkpoint, self.processes, self.task.identity)
