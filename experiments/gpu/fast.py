"""The steps of `main.py gpu-check` that say how fast it is on the device. Each gives rows for a table; one that takes
long gives them part by part.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from data.preprocess import preprocess
from experiments.bench import step
from experiments.bench.loading import Waiting
from experiments.bench.step import interleaved
from experiments.gpu.right import CONFIG, Check, Rows, normalised, random_model
from experiments.prepare import prepare_world, preprocessing_of
from experiments.process_group import Processes
from experiments.training.loop import answer_logits, train_steps
from experiments.training.optimiser import build_optimiser, build_schedule
from experiments.training.run_data import VQATask, answer_loss
from experiments.training.run_directory import RunDirectory
from experiments.training.trainer import prepare
from vqa.io.errors import InputError
from vqa.kernels.modulate import modulate
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

VQA_V1 = 248_349  # training questions
EPOCHS = 20  # of the paper


def ceilings_rows(check: Check) -> Rows:
    """What the device can do: copying in its memory, bfloat16 products."""
    elements, width = check.pick((2**20, 256), (2**31, 8192))
    source = torch.randn(elements // 2, device=check.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=check.device, dtype=torch.bfloat16) for _ in "ab")
    seconds = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: left @ right}, check.pick(1, 10), check.device
    )
    return [
        {"what": "copy, read and written, GB/s", "value": round(2 * source.nbytes / seconds["copy"] / 1e9, 1)},
        {"what": f"bfloat16 product of {width}, TFLOP/s", "value": round(2 * width**3 / seconds["product"] / 1e12, 1)},
    ]


def operation_rows(check: Check) -> Rows:
    """The operation alone, forward and backward with a residual and a ReLU: fused, composed, composed and compiled; and
    the share of the copy speed that the bytes it must move come to. Maps are so large that launching costs nothing.
    """
    shapes = check.pick([(2, 16, 8, 8)], [(256, 256, 56, 56), (1024, 1024, 14, 14), (2048, 2048, 7, 7)])
    copy = ceilings_rows(check)[0]["value"] * 1e9
    compiled = torch.compile(
        lambda *parts: modulate(*parts, relu=True, fused=False),
        backend=check.pick("aot_eager", "inductor"),
        dynamic=False,
    )
    rows = []
    for shape in shapes:
        x, residual, gradient = (
            torch.randn(shape, device=check.device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            for _ in "xrg"
        )
        scale, shift = (torch.randn(shape[:2], device=check.device) for _ in "ab")
        parts = [part.requires_grad_() for part in (x, scale, shift, residual)]
        ways: dict[str, Callable[..., Tensor]] = {
            "fused": lambda *parts: modulate(*parts, relu=True),
            "composed": lambda *parts: modulate(*parts, relu=True, fused=False),
            "compiled": compiled,
        }

        def step(way: Callable[..., Tensor], parts: list[Tensor] = parts, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(way(*parts), parts, gradient)

        seconds = _device_seconds({name: lambda way=way: step(way) for name, way in ways.items()}, check)
        # forward x, residual, y; backward gradient, x, and the gradients of x and residual; a bit an element twice
        moved = 7 * x.numel() * x.element_size() + x.numel() / 4
        told = {"shape": "x".join(map(str, shape))} | {f"{name}_us": round(1e6 * s, 1) for name, s in seconds.items()}
        rows.append(
            told
            | {
                "fused_to_compiled": round(seconds["fused"] / seconds["compiled"], 3),
                "share_of_copy_speed": round(moved / seconds["fused"] / copy, 3),
            }
        )
    return rows


def _device_seconds(functions: dict[str, Callable[[], Any]], check: Check) -> dict[str, float]:
    """Median seconds of each function on the device: several runs in a row, so that launching hides behind work."""
    if check.device.type != "cuda":
        return interleaved(functions, 1, check.device)
    inner, found = 10, {name: [] for name in functions}
    for turn in range(8):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
            begin.record()
            for _ in range(inner):
                function()
            end.record()
            end.synchronize()
            if turn:
                found[name].append(begin.elapsed_time(end) / 1e3 / inner)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def step_rows(check: Check) -> Iterator[Rows]:
    """`bench step`, a case at a time; compiled ways are a step of their own."""
    for case in step.TINY if check.tiny else step.cases(check.device):
        yield step.step_rows((case._replace(compiled=False),), check.pick(1, 7), check.device)


def compiled_rows(check: Check) -> Iterator[Rows]:
    """The cases that name compiled ways, with them."""
    if check.tiny:
        return
    for case in step.cases(check.device):
        if case.compiled:
            yield step.step_rows((case,), 7, check.device)


def largest_rows(check: Check) -> Rows:
    """The largest batch of MODERN-152 at 448 px in bfloat16: from the peak memory of two batches, then tried."""
    network = check.pick(["backbone.name=resnet10", "data.image_size=64"], ["backbone.name=resnet152"])
    recipe = CONFIG / "vqa_v1" / "modern_448.yaml"
    words = [*network, "backbone.weights=none", "question.glove=null", "precision=bfloat16", f"device={check.device}"]
    settings = load_settings(recipe, words)
    if check.device.type != "cuda":
        _train_some(settings, 2, 1, check)
        return []
    peaks = {batch: _train_some(settings, batch, 2, check) for batch in (4, 12)}
    an_image = (peaks[12] - peaks[4]) / 8
    free = torch.cuda.mem_get_info(check.device)[1] * 0.97
    batch = int((free - (peaks[4] - 4 * an_image)) / an_image)
    while batch:
        try:
            peak = _train_some(settings, batch, 2, check)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            batch = int(batch * 0.95)
    told = {"network": settings.backbone.name, "pixels": settings.data.image_size, "precision": "bfloat16"}
    return [
        told | {"mib_an_image": round(an_image / 2**20, 1), "largest_batch": batch, "peak_gib": round(peak / 2**30, 1)}
    ]


def _train_some(settings: Settings, batch: int, steps: int, check: Check) -> int:
    """Takes training steps on one random batch; returns the peak of the GPU's memory in bytes (0 on a CPU)."""
    model, made = random_model(settings, batch, check)
    optimiser = build_optimiser(settings.train, model)
    schedule = build_schedule(settings.train, optimiser, steps)

    def loss_of(batch: Batch, reduction: str) -> Tensor:
        logits = answer_logits(model, batch, normalised, settings.precision)
        return answer_loss(logits, batch.labels, settings.train.loss, reduction)

    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(check.device)
    for _ in train_steps(model, [made] * steps, loss_of, settings.train, optimiser, schedule):
        pass
    return torch.cuda.max_memory_allocated(check.device) if check.device.type == "cuda" else 0


def epoch_rows(check: Check) -> Iterator[Rows]:
    """Questions a second of the recipes for VQA v1 by the trainer itself, from an h5 file of generated scenes through
    worker processes; hence the hours of a run on VQA v1.
    """
    workers = check.pick(0, max((os.cpu_count() or 2) // 2, 1))
    made: set[int] = set()
    for recipe, words, table in (
        ("modern", ["precision=bfloat16"], 224),
        ("modern", ["precision=bfloat16", "train.batch_size=128"], 224),
        ("modern", ["precision=bfloat16", "speed.compile=true"], 224),
        ("baseline", ["precision=bfloat16"], 224),
        ("finetune_bn", ["precision=bfloat16"], 224),
        ("modern", [], 224),
        ("modern_448", ["precision=bfloat16"], 448),
    ):
        size = check.pick(64, table)
        data = _generated_data(check, size, make=size not in made)
        made.add(size)
        small = check.pick(["backbone.name=resnet10", "train.batch_size=8", "data.cache_gib=0"], ["data.cache_gib=0"])
        plain = ["backbone.weights=none", "question.glove=null", "train.validate_on=null", f"workers={workers}"]
        settings = load_settings(
            CONFIG / "vqa_v1" / f"{recipe}.yaml",
            [*data, *plain, f"device={check.device}", f"data.image_size={size}", *words, *small, f"name={recipe}"],
        )
        rate, share = _questions_a_second(settings, check)
        told = {"recipe": recipe, "pixels": size, "batch": settings.train.batch_size, "precision": settings.precision}
        told |= {"compiled": settings.speed.compile}
        told |= {"questions_a_second": round(rate, 1), "share_waiting": round(share, 3)}
        yield [told | {"hours_of_20_epochs_of_vqa_v1": round(EPOCHS * VQA_V1 / rate / 3600, 2)}]
        if check.tiny:
            return


def _generated_data(check: Check, size: int, make: bool) -> list[str]:
    """Settings of an h5 file of the large scenes, made at the first call."""
    folder = check.folder / f"scenes_{size}"
    images = check.pick(16, 1200 if size < 448 else 500)
    words = [f"data.folder={folder}", f"data.h5={folder}.h5", "data.splits={}", "data.answers=2000"]
    if make:
        settings = load_settings(
            CONFIG / "scenes_224.yaml",
            [
                *(word for word in words if word != "data.splits={}"),
                f"data.image_size={size}",
                f"scenes.images={{train: {images}, val: 8}}",
                f"data.processes={min(os.cpu_count() or 1, 16)}",
                "data.min_word_count=2",
            ],
        )
        prepare_world(settings)
        preprocess(**preprocessing_of(settings))
        shutil.rmtree(folder)
    return words


def _questions_a_second(settings: Settings, check: Check) -> tuple[float, float]:
    """Of up to sixty steps of a training, without the first ones; and the share of them spent waiting for data."""
    trainer = prepare(VQATask(settings), RunDirectory(check.folder / "runs" / settings.name), Processes())
    if settings.speed.compile:
        trainer.model.resnet.compile()
    unmeasured, most = check.pick((1, 3), (8, 60))
    ends: list[tuple[float, float]] = []
    waited = Waiting(itertools.islice(trainer.batches(epoch=1), most))
    for _ in trainer.steps(trainer.model, waited):
        ends.append((time.perf_counter(), waited.seconds))
    if len(ends) <= unmeasured + 1:
        raise InputError(f"{settings.name}: only {len(ends)} steps, too few to measure")
    seconds = ends[-1][0] - ends[unmeasured][0]
    steps = len(ends) - 1 - unmeasured
    return steps * settings.train.batch_size / seconds, (ends[-1][1] - ends[unmeasured][1]) / seconds
