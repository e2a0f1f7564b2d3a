"""Training: sets a run up, loops over epochs, keeps the best model, and can be killed and resumed at any step."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.errors import InputError, NotWrittenError
from data.glove import read_glove
from data.interruption import Interrupted, StopRequest
from data.loading import Batch, EpochSampler, batches_by_image, check_shared_memory, make_loader, readable
from data.locks import held
from data.progress import progress as shown
from vqa import bundle
from vqa.build import build_model, build_optimiser, build_schedule, choose_device, trained_parameters
from vqa.checkpoint import Progress, load_checkpoint, random_state, save_checkpoint, set_random_state
from vqa.distributed import Processes, averaging_gradients, this_process, together
from vqa.engine import predict_classes, train_steps
from vqa.metrics import Scores, score
from vqa.model import VQAModel
from vqa.not_finite import NotFiniteError
from vqa.run_directory import RunDirectory, peak_memory_mib
from vqa.settings import Settings
from vqa.training_data import TrainingData, first_words

MEAN_OF = 4096  # training questions whose mean embedding is the control `mean_question`


def train(settings: Settings, *, resume: bool = False, runs: Path = Path("runs")) -> RunDirectory:
    """Trains a recipe into `runs/NAME`.

    Args:
        settings: the recipe; its h5 file must be there.
        resume: go on from the last checkpoint, if there is one.
        runs: where run directories are.

    Raises:
        InputError: the data, the backbone or the run directory are not as the recipe needs them, another process
            trains there, the loss is not finite, or the disk is full.
        Interrupted: by a signal, after the step it came in, with a checkpoint of it.
    """
    run = RunDirectory(runs / settings.name)
    processes = this_process()
    with together(processes, choose_device(settings.device, processes)), ExitStack() as stack:
        refusal = None
        if processes.is_main:
            try:
                stack.enter_context(held(run.lock, run.path))
            except InputError as error:
                refusal = str(error)
        # Every process decides from what all of them see, and none writes before all have looked.
        seen = processes.gather((refusal or run.refusal(settings, resume), run.checkpoint.exists()))
        if refusals := [refusal for refusal, _ in seen if refusal]:
            raise InputError(refusals[0])
        if len({exists for _, exists in seen}) > 1:
            raise InputError(f"{run.checkpoint}: not seen by every process; runs/ must be on a disk that all share")
        training = Training(settings, run, processes)
        training.run_epochs()
    return run


class Training:
    """One process's part of a run: its data, model, optimiser, and where it is: at the last checkpoint, if any."""

    def __init__(self, settings: Settings, run: RunDirectory, processes: Processes) -> None:
        self.settings, self.run, self.processes = settings, run, processes
        self.device = choose_device(settings.device, processes)
        if settings.train.batch_size % processes.world_size:
            raise InputError(
                f"train.batch_size: {settings.train.batch_size} questions cannot be shared equally by "
                f"{processes.world_size} processes"
            )
        self.data = TrainingData(settings)

        torch.manual_seed(settings.seed)  # the same initial weights in every process
        self.model = self._new_model()
        self._check_batch_statistics()
        torch.manual_seed(settings.seed + processes.rank)  # but dropout of its own
        self.trained_count = sum(parameter.numel() for parameter in trained_parameters(self.model))
        self.optimiser = build_optimiser(settings.train, self.model)
        steps = settings.train.epochs * len(self.sampler(epoch=1))
        self.schedule = build_schedule(settings.train, self.optimiser, steps)
        self.progress = Progress()
        self.stop = StopRequest()
        self.writes_tensorboard = settings.train.tensorboard
        if run.checkpoint.exists():
            self._resume()
        if not self.progress.finished:
            self.data.read_stored_maps(self.model.resnet, self.device, processes)
            check_shared_memory(self.data.training, self.sampler(self.progress.epoch), settings.workers)
        if processes.is_main and not self.progress.finished:
            run.start(settings, self.device, processes.world_size, self.trained_count)
            store = self.data.store
            bundle.save_companions(run.model, settings, store.tokenizer, store.vocabulary, self.data.preprocessing)

    def _new_model(self) -> VQAModel:
        vocabulary = self.data.store.tokenizer.get_vocab()
        fresh = not self.run.checkpoint.exists()  # else all weights come from the checkpoint
        model = build_model(self.settings, len(vocabulary), len(self.data.store.vocabulary), pretrained=fresh)
        if model.question is not None and model.question.fixed is not None and fresh:
            file = Path(self.settings.question.glove)
            vectors, found = read_glove(file, vocabulary, self.settings.question.glove_size)
            self._say(f"{file}: vectors for {found} of {len(vocabulary)} words")
            model.question.set_fixed(torch.from_numpy(vectors))
        if model.kinds is not None and fresh:
            model.kinds.set_from(torch.from_numpy(first_words(self.data.training.table)))
        if model.condition == "mean_question" and fresh:
            model.set_mean_question(*self.data.training.words(range(min(len(self.data.training), MEAN_OF))))
        return model.to(self.device)

    def _check_batch_statistics(self) -> None:
        """Raises InputError where a step would take the statistics of one value a channel."""
        train, resnet = self.settings.train, self.model.resnet
        mine = self.sampler(epoch=1).batch_size // self.processes.world_size
        part = -(-mine // train.accumulate)
        fewest = (mine % part or part) * self.processes.world_size  # the last part is the smallest
        needed = resnet.least_batch(self.settings.data.image_size)
        if self.model.sees_image and resnet.statistics == "batch" and fewest < needed:
            raise InputError(
                f"backbone.statistics: at {self.settings.data.image_size} px a batch's statistics need {needed} "
                f"questions; train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts gives "
                f"{fewest}: take a larger batch, larger images, or population"
            )

    def sampler(self, epoch: int, start: int = 0) -> EpochSampler:
        """The batches of an epoch from `start` on, as far as they are this process's."""
        return self.data.sampler(epoch, start, self.processes)

    def _resume(self) -> None:
        """Takes everything from the last checkpoint.

        Raises:
            InputError: it is damaged, or of other data or another number of processes.
        """
        saved = load_checkpoint(self.run.checkpoint)
        store = self.data.store
        if saved["data"] not in (self.data.identity, store.identity(store.splits)):  # of all splits: as it was once
            raise InputError(f"{self.data.store.path}: not the data that {self.run.path} was trained on")
        mine, count = self.processes.rank, len(saved["processes"])
        if count != self.processes.world_size:
            raise InputError(f"{self.run.checkpoint}: made by {count} process(es); resume with as many")
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        for parameter, state in self.optimiser.state.items():  # a fused step needs them in one layout, and
            for name, value in state.items():  # `speed.channels_last` may be another than before
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)
        self.schedule.load_state_dict(saved["schedule"])
        self.progress = Progress(**saved["progress"] | {"loss_sum": saved["processes"][mine]["loss_sum"]})
        self.progress.finished = self._is_finished()  # more epochs may be asked for than before
        set_random_state(saved["processes"][mine]["random"], self.device)
        self._say(f"{self.run.path}: goes on at epoch {self.progress.epoch}, step {self.progress.step}")

    def _is_finished(self) -> bool:
        """Whether all epochs are trained, or the last `train.patience` of them brought no better model."""
        trained, train = len(self.progress.history), self.settings.train
        return trained >= train.epochs or 0 < train.patience <= trained - self.progress.best_epoch

    def run_epochs(self) -> None:
        """Trains until the last epoch or early stopping; does nothing if that is past."""
        if self.progress.finished:
            early = len(self.progress.history) < self.settings.train.epochs
            why = ", stopped early by train.patience (which may be raised)" if early else ""
            self._say(f"{self.run.path}: finished{why}, nothing to do")
            return
        self._say(
            f"{self.run.path}: {len(self.data.training)} questions, {self.trained_count:,} trained parameters, "
            f"on {self.device}"
        )
        if self.data.stand_ins:
            self._say(
                f"{self.data.store.path}: {self.data.stand_ins} image(s) were missing or unreadable: their questions "
                "are not trained on, and validated with a stand-in of the mean colour"
            )
        # Wrapped here and not kept: a wrapper that outlives its process group can abort at exit (gloo).
        if self.settings.speed.compile:
            self.model.resnet.compile()
        wrapped: nn.Module = self.model
        if self.processes.world_size > 1:
            wrapped = averaging_gradients(self.model)
        with self.stop:  # a signal waits until what it may not cut in two is done
            while not self.progress.finished:
                self._train_epoch(wrapped)
                self._end_epoch()
                self._stop_if_asked()

    def _stop_if_asked(self, save: bool = False) -> None:
        """Ends the run where a signal waits in any process; `save` says that it is not saved yet."""
        if self.processes.any(self.stop.made, self.device):
            if save:
                self._save_checkpoint()
            self.stop.obey()

    def _stop_waiting_if_asked(self) -> None:
        """Ends the run where a signal waits while batches do not come."""
        if self.stop.made:
            if self.processes.world_size == 1:  # several have their last checkpoint
                self._save_checkpoint()
            self.stop.obey()

    def _train_epoch(self, model: nn.Module) -> None:
        settings, progress = self.settings, self.progress
        sampler = self.sampler(progress.epoch, progress.step)
        loader = make_loader(self.data.training, sampler, settings.workers, self.device)
        begun = time.monotonic() - progress.seconds

        def after_step(loss: float | None) -> None:
            progress.step += 1
            progress.loss_sum += loss or 0.0
            progress.left_out += loss is None
            progress.seconds = time.monotonic() - begun
            every = settings.train.checkpoint_every
            due = bool(every) and (progress.step % every == 0 or progress.step == sampler.batches)
            if due:
                self._save_checkpoint()
            self._stop_if_asked(save=not due)

        batches = readable(loader, self._stop_waiting_if_asked)
        bar = shown(batches, sampler.batches, f"epoch {progress.epoch}", done=progress.step)
        try:
            self.take_steps(model, bar if self.processes.is_main else batches, after_step)
        except NotFiniteError as error:
            raise InputError(
                f"{self._at_step(error)}; a lower train.learning_rate or train.clip under another `name` may help, "
                "train.skip_not_finite leaves such steps out; the last checkpoint is kept"
            ) from None

    def take_steps(
        self, model: nn.Module, batches: Iterable[Batch], after_step: Callable[[float | None], None]
    ) -> None:
        """Trains the model, or a wrapper of it, on batches as the settings say; `after_step` is as in `train_steps`.

        Raises:
            NotFiniteError: as `train_steps`.
        """
        train = self.settings.train
        train_steps(
            model,
            batches,
            see=self.data.seen,
            loss=train.loss,
            precision=self.settings.precision,
            optimiser=self.optimiser,
            schedule=self.schedule,
            clip=train.clip,
            accumulate=train.accumulate,
            device=self.device,
            after_step=after_step,
            leave_out=self._leave_out if train.skip_not_finite else None,
        )

    def _leave_out(self, error: NotFiniteError) -> bool:
        """Whether a step that is not finite is left out, as far as the settings allow; says so."""
        if self.progress.left_out == self.settings.train.skip_not_finite:
            return False
        self._say(f"{self._at_step(error)}; this step is left out")
        return True

    def _at_step(self, error: NotFiniteError) -> str:
        where = f"{self.run.path}: epoch {self.progress.epoch}, step {self.progress.step + 1}"
        return f"{where}: {error.of(self.data.training.table.ids)}"

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
            "learning_rate": self.schedule.get_last_lr()[0],
            "seconds": round(progress.seconds, 2),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        if self.data.validation is not None:
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
                bundle.save_weights(self.run.model, self.model, self._training_facts())
        progress.finished = self._is_finished()
        self._report(line)
        progress.epoch, progress.step, progress.left_out = progress.epoch + 1, 0, 0
        progress.loss_sum, progress.seconds = 0.0, 0.0
        self._save_checkpoint()

    def _training_facts(self) -> dict[str, Any]:
        facts = {"trained_on": self.settings.train.splits, "epoch": self.progress.best_epoch}
        return facts | {"val_overall": self.progress.best_overall}

    def _validate(self) -> Scores:
        data, processes = self.data.validation, self.processes
        sampler = batches_by_image(data.table, self.settings.train.batch_size, processes.rank, processes.world_size)
        batches = readable(make_loader(data, sampler, self.settings.workers, self.device))
        bar = shown(batches, len(sampler), f"validation {self.progress.epoch}")
        try:
            rows, classes = predict_classes(
                self.model,
                bar if processes.is_main else batches,
                see=self.data.seen,
                precision=self.settings.precision,
                device=self.device,
            )
        except NotFiniteError as error:
            raise InputError(
                f"{self.run.path}: after epoch {self.progress.epoch}, {error.of(data.table.ids)}"
            ) from None
        everyone = processes.gather((rows.numpy(), classes.numpy()))
        if not processes.is_main:
            return processes.gather(None)[0]
        answers = np.empty(len(data), np.int64)
        for their_rows, their_classes in everyone:
            answers[their_rows] = their_classes
        scores = score([self.data.store.vocabulary[answer] for answer in answers], data.table)
        return processes.gather(scores)[0]

    def _report(self, line: dict[str, Any]) -> None:
        if not self.processes.is_main:
            return
        self.run.write_metrics(self.progress.history)
        if self.writes_tensorboard:
            try:
                self.run.write_tensorboard(line)
            except NotWrittenError as error:
                self._say(f"{error}; training goes on without TensorBoard")
                self.writes_tensorboard = False
        by_type = "  ".join(f"{kind} {value:.2f}" for kind, value in line.get("val_per_answer_type", {}).items())
        scored = "" if line["val_overall"] is None else f"  val {line['val_overall']:.2f} %  ({by_type})"
        epochs = self.settings.train.epochs
        print(
            f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.4f}{scored}  {line['seconds']:.0f} s",
            flush=True,
        )

    def _save_checkpoint(self) -> None:
        mine = {"random": random_state(self.device), "loss_sum": self.progress.loss_sum}
        everyone = self.processes.gather(mine)
        if self.processes.is_main:
            save_checkpoint(
                self.run.checkpoint,
                model=self.model,
                optimiser=self.optimiser,
                schedule=self.schedule,
                progress=self.progress,
                processes=everyone,
                data=self.data.identity,
            )

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)
