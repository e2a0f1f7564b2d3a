"""Trains a prepared run: loops over its epochs, keeps the best model; it can be killed and resumed at any step."""

import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.batches import Batch, Planned, batches_by_image
from data.loader import make_loader, readable
from experiments.machine import peak_memory_mib
from experiments.process_group import Processes, averaging_gradients
from experiments.tasks import Task
from experiments.training.checkpoint import TrainingState
from experiments.training.loop import answer_logits, predict_classes, train_steps
from experiments.training.nonfinite import NotFiniteError, listed
from experiments.training.optimiser import trained_parameters
from experiments.training.run_directory import RunDirectory
from experiments.training.stage_cache import NetworkInput
from vqa.io.errors import InputError, NotWrittenError, printable
from vqa.io.processes import Interrupted, StopRequest
from vqa.io.progress import progress as shown
from vqa.metrics import Scores
from vqa.saved_model.files import save_weights


class Trainer:
    """Trains one process's part of a run, from `state` on."""

    def __init__(
        self, task: Task, run: RunDirectory, processes: Processes, state: TrainingState, images: NetworkInput
    ) -> None:
        self.task, self.run, self.processes, self.state, self.images = task, run, processes, state, images
        self.settings = task.settings
        self.model, self.progress, self.device = state.model, state.progress, state.device
        self.training = task.dataset(task.training, images.images, augmented=True)
        self.validation, self._validation_rows = None, []
        if task.validation is not None:
            self.validation = task.dataset(task.validation, images.images)
            share = (self.settings.train.batch_size, processes.rank, processes.world_size)
            self._validation_rows = batches_by_image(task.validation, *share)
        self.steps_per_epoch = task.sampler(processes, epoch=1).batches
        self.trained_count = sum(parameter.numel() for parameter in trained_parameters(state.model))
        self.writes_tensorboard = task.settings.train.tensorboard
        self.stop = StopRequest()

    def run_epochs(self) -> None:
        """Trains until the last epoch, early stopping, or a signal."""
        say, task = self.processes.say, self.task
        trained = f"{len(self.training)} questions, {self.trained_count:,} trained parameters"
        say(f"{self.run.path}: {trained}, on {self.device}")
        for split, source in task.store.provenance["sources"].items():
            read, named = source["files"][0]["name"], self.settings.data.splits.get(split)
            if named is not None and read != Path(named.questions).name:
                say(f"{task.store.path}: split {split!r} was made from {read}, but the recipe names {named.questions}")
        if task.stand_ins:
            say(
                f"{task.store.path}: {task.stand_ins} image(s) were missing or unreadable: their questions "
                "are not trained on, and validated with a stand-in of the mean colour"
            )
        if self.settings.speed.compile:
            self.model.resnet.compile()
        # Wrapped here and not kept: a wrapper that outlives its process group can abort at exit (gloo).
        wrapped = self.model if self.processes.world_size == 1 else averaging_gradients(self.model)
        with self.stop, closing(self.batches()) as batches:  # worker processes end with it
            while not self.progress.is_finished(self.settings.train):
                self._train_epoch(wrapped, batches)
                self._end_epoch(batches)
                self._stop_if_asked()

    def _train_epoch(self, model: nn.Module, batches: Iterator[Batch]) -> None:
        progress, every = self.progress, self.settings.train.checkpoint_every
        begun = time.monotonic() - progress.seconds
        of_epoch = self._next_batches(batches, self.steps_per_epoch, f"epoch {progress.epoch}", done=progress.step)
        try:
            for outcome in self.steps(model, of_epoch):
                if isinstance(outcome, NotFiniteError):
                    self._skip(outcome)
                else:
                    progress.loss_sum += outcome
                progress.step += 1
                progress.seconds = time.monotonic() - begun
                due = bool(every) and (progress.step % every == 0 or progress.step == self.steps_per_epoch)
                if due:
                    self._save_checkpoint()
                self._stop_if_asked(save=not due)
        except (OSError, BrokenExecutor):  # as of a terminal that is gone, or a worker that was killed
            self._save_if_alone()
            raise
        except NotFiniteError as error:
            raise InputError(
                f"{self._at_step(error)}; a lower train.learning_rate or train.clip under another `name` may help, "
                "train.skip_not_finite skips such steps; the last checkpoint is kept"
            ) from None

    def _end_epoch(self, batches: Iterator[Batch]) -> None:
        """Validates, reports, keeps the best model, saves a checkpoint and moves to the next epoch."""
        progress, taken = self.progress, self.progress.step - self.progress.skipped
        if not taken:
            raise InputError(f"{self.run.path}: no step of epoch {progress.epoch} was finite; lower the learning rate")
        losses = self.processes.gather(progress.loss_sum)
        line: dict[str, Any] = {
            "epoch": progress.epoch,
            "steps": progress.step,
            "steps_left_out": progress.skipped,
            "train_loss": sum(losses) / len(losses) / taken,
            "val_overall": None,
            "learning_rate": self.state.schedule.get_last_lr()[0],
            "seconds": round(progress.seconds, 2),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        if self.validation is not None:
            scores = self._validate(batches)
            line |= {"val_overall": scores["overall"], "val_per_answer_type": scores["per_answer_type"]}
        is_best = progress.end_epoch(line)
        if self.processes.is_main:
            if is_best:
                splits = dict.fromkeys(progress.trained_before + self.settings.train.splits)
                facts = {"trained_on": list(splits)} | {key: line[key] for key in ("epoch", "val_overall")}
                save_weights(self.run.model, self.model, facts)
            self._write(line)
        self._save_checkpoint()
        self._report(line)  # last: a closed or full standard output ends the run

    def _validate(self, batches: Iterator[Batch]) -> Scores:
        """Scores the validation split; a signal ends it at once, and a resumed run validates again."""
        try:
            with self.stop.suspended():
                what = f"{self.run.path}: validation {self.progress.epoch}"
                of_split = self._next_batches(batches, len(self._validation_rows), what)
                given = (self.model, self.validation, self.settings, self.processes)
                classes = predict_classes(*given, prepare_images=self.images.prepare, what=what, batches=of_split)
                return self.task.score(classes)
        except (Interrupted, OSError, BrokenExecutor):  # as in `_train_epoch`
            self._save_if_alone()
            raise

    def _write(self, line: dict[str, Any]) -> None:
        self.run.write_metrics(self.progress.history)
        if self.writes_tensorboard:
            try:
                self.run.write_tensorboard(line)
            except NotWrittenError as error:
                print(f"{error}; training continues without TensorBoard", flush=True)
                self.writes_tensorboard = False

    def _report(self, line: dict[str, Any]) -> None:
        by_type = "  ".join(f"{kind} {value:.2f}" for kind, value in line.get("val_per_answer_type", {}).items())
        scored = "" if line["val_overall"] is None else f"  val {line['val_overall']:.2f} %  ({printable(by_type)})"
        epoch = f"epoch {line['epoch']}/{self.settings.train.epochs}"
        self.processes.say(f"{epoch}  loss {line['train_loss']:.4f}{scored}  {line['seconds']:.0f} s")

    def batches(self) -> Generator[Batch]:
        """This process's batches from the run's step on: of each epoch's training, then of its validation.

        One loader reads them all: starting worker processes takes seconds. A signal ends the wait for a batch.
        """
        loader = make_loader(Planned(self.training, self.validation), self._plan(), self.settings.workers, self.device)
        return readable(loader, self._stop_waiting_if_asked)

    def _plan(self) -> Iterator[tuple[int | None, list[int]]]:
        """The epoch of each batch, None for one of the validation, and its questions."""
        first, step = self.progress.epoch, self.progress.step
        for epoch in range(first, self.settings.train.epochs + 1):
            for rows in self.task.sampler(self.processes, epoch, start=step if epoch == first else 0):
                yield epoch, rows
            for rows in self._validation_rows:
                yield None, rows

    def _next_batches(self, batches: Iterator[Batch], total: int, what: str, done: int = 0) -> Iterator[Batch]:
        """The next batches until `total` are done, with their progress."""
        some = islice(batches, total - done)
        return shown(some, total, what, done) if self.processes.is_main else some

    def steps(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[float | NotFiniteError]:
        """Trains the model, or a wrapper of it, on batches as the settings say; yields and raises as `train_steps`."""

        def loss_of(batch: Batch, reduction: str) -> Tensor:
            logits = answer_logits(model, batch, self.images.prepare, self.settings.precision)
            return self.task.loss(logits, batch.labels, reduction)

        return train_steps(model, batches, loss_of, self.settings.train, self.state.optimiser, self.state.schedule)

    def _skip(self, error: NotFiniteError) -> None:
        """Counts a step that is skipped. Raises the error if the settings allow no more of them."""
        if self.progress.skipped == self.settings.train.skip_not_finite:
            raise error
        self.processes.say(f"{self._at_step(error)}; this step is skipped")
        self.progress.skipped += 1

    def _at_step(self, error: NotFiniteError) -> str:
        where = f"{self.run.path}: epoch {self.progress.epoch}, step {self.progress.step + 1}"
        return f"{where}: {error} {listed(self.task.training.ids[error.rows])}"

    def _stop_if_asked(self, save: bool = False) -> None:
        """Ends the run if any process received a signal; `save`: the last step is not saved yet."""
        if any(self.processes.gather(self.stop.made)):
            if save:
                self._save_checkpoint()
            self.stop.obey()

    def _stop_waiting_if_asked(self) -> None:
        """Ends the run if this process received a signal while it waits for a batch."""
        if self.stop.made:
            self._save_if_alone()
            self.stop.obey()

    def _save_checkpoint(self) -> None:
        self.state.save(self.run.checkpoint, self.processes, self.task.identity)

    def _save_if_alone(self) -> None:
        """Saves a checkpoint; several processes, which need each other for it, keep their last one."""
        if self.processes.world_size == 1:
            self._save_checkpoint()
