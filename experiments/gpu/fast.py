"""The steps of `main.py gpu-check` that measure speed on the device. Each yields rows of a table."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from data.batches import Batch
from experiments.bench.loading import prepared_scenes, time_training
from experiments.bench.setup import Rows, Setup
from experiments.bench.step import cases, compute, inputs_of, interleaved, peak_mib, rows_of, ways_of
from experiments.bench.vqa_sized_data import QUESTIONS
from experiments.gpu.right import CONFIG, random_model
from experiments.tasks.vqa import answer_loss
from experiments.training.loop import answer_logits, train_steps
from experiments.training.optimiser import build_optimiser, build_schedule
from vqa.kernels.modulate import modulate
from vqa.preprocessing import Preprocessing
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

HALF = ("precision=bfloat16",)
COMPILED = (*HALF, "speed.compile=true")
COMPILING = {f"compiling-{way}": f"{way}, compiled" for way in ("ours", "usual", "plain")} | {
    "compiling-modern": "modern"
}
SMALL = ("question.hidden_size=32", "cbn.hidden_size=8", "answer.fusion_size=32")


def ceilings_rows(setup: Setup) -> Rows:
    """The limits of the device: copying in its memory, bfloat16 products."""
    elements, width = setup.pick((2**20, 256), (2**31, 8192))
    source = torch.randn(elements // 2, device=setup.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=setup.device, dtype=torch.bfloat16) for _ in "ab")
    jobs = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    seconds = interleaved(jobs, setup.pick(1, 10), setup.device)
    copied, computed = 2 * source.nbytes / seconds["copy"], 2 * width**3 / seconds["product"]
    yield {"what": "copy, read and written, GB/s", "value": round(copied / 1e9, 1)}
    yield {"what": f"bfloat16 product of {width}, TFLOP/s", "value": round(computed / 1e12, 1)}


def operation_rows(setup: Setup) -> Rows:
    """`modulate` alone, forward and backward with a residual and a ReLU: `fused`, whose backward pass saves the least;
    `composed`, whose backward pass is autograd's; and that one `compiled`. Each reaches a share of the copy speed, as
    computed from the bytes that must be moved. The maps are so large that the time of launches does not count.
    """
    copy = next(ceilings_rows(setup))["value"] * 1e9
    composed = partial(modulate, relu=True, fused=False)
    ways = {
        "fused": partial(modulate, relu=True),
        "composed": composed,
        "compiled": torch.compile(composed, backend=setup.pick("eager", "inductor"), dynamic=False),
    }
    runs = setup.pick(1, 10)

    def run(way: Callable[..., Tensor], parts: list[Tensor], gradient: Tensor) -> None:
        for _ in range(runs):  # without a pause, so that launches overlap with work
            torch.autograd.grad(way(*parts), parts, gradient)

    for shape in setup.pick([(2, 16, 8, 8)], [(256, 256, 56, 56), (1024, 1024, 14, 14), (2048, 2048, 7, 7)]):
        maps = [torch.randn(shape, device=setup.device, dtype=torch.bfloat16) for _ in ("x", "residual", "gradient")]
        x, residual, gradient = (part.to(memory_format=torch.channels_last) for part in maps)
        scale, shift = (torch.randn(shape[:2], device=setup.device) for _ in "ab")
        parts = [part.requires_grad_() for part in (x, scale, shift, residual)]
        jobs = {name: partial(run, way, parts, gradient) for name, way in ways.items()}
        seconds = {name: s / runs for name, s in interleaved(jobs, setup.repeats, setup.device).items()}
        # forward x, residual, y; backward gradient, x, and the gradients of x and residual; one bit per element, twice
        moved = 7 * x.numel() * x.element_size() + x.numel() / 4
        yield {
            "shape": "x".join(map(str, shape)),
            **{f"{name}_us": round(1e6 * s, 1) for name, s in seconds.items()},
            "fused_to_compiled": round(seconds["fused"] / seconds["compiled"], 3),
            **{f"{name}_share_of_copy_speed": round(moved / s / copy, 3) for name, s in seconds.items()},
        }


def compiling_rows(setup: Setup, what: str) -> Rows:
    """How long compiling takes, of one compiled way of `bench step` or of the recipe `modern`. What is compiled here is
    then in torch's cache on the disk, so that `compiled` and `epoch` have time to measure.
    """
    if what == "modern":
        settings = _vqa_v1_settings(setup, what, setup.pick(HALF, COMPILED), images=setup.pick(8, 40))
        start = time.monotonic()
        time_training(settings, setup.folder / "run", 1, 2)
    else:
        case = next(case for case in cases(setup) if case.compiled)
        way, inputs = ways_of(case, setup)[what], inputs_of(case, setup.device)
        start = time.monotonic()
        for train in (False, True):
            compute(way, inputs, case.precision, train=train)
    yield {"what": what, "seconds": round(time.monotonic() - start, 1)}


def uncompiled_rows(setup: Setup) -> Rows:
    """`bench step` without the compiled ways."""
    for case in cases(setup):
        yield from rows_of(case._replace(compiled=False), setup)


def compiled_rows(setup: Setup) -> Rows:
    """The cases of `bench step` that have compiled ways."""
    for case in cases(setup):
        if case.compiled:
            yield from rows_of(case, setup)


def epoch_rows(setup: Setup) -> Rows:
    """Questions a second of the recipes for VQA v1, by the trainer itself from an h5 file of synthetic scenes; hence
    the hours of a run on VQA v1.
    """
    recipes = (
        ("modern", HALF),
        ("modern", COMPILED),
        ("baseline", HALF),
        ("finetune_bn", HALF),
        ("modern_448", HALF),
        ("modern", ()),
    )
    for number, (recipe, differences) in enumerate(recipes[:1] if setup.tiny else recipes):
        settings = _vqa_v1_settings(setup, recipe, differences, setup.pick(8, 400 if recipe == "modern_448" else 600))
        run = setup.folder / f"run_{number}"
        _, seconds, share = time_training(settings, run, *setup.pick((1, 3), (8, 60)))
        rate = settings.train.batch_size / seconds
        yield {
            "recipe": recipe,
            "pixels": settings.data.image_size,
            "batch": settings.train.batch_size,
            "precision": settings.precision,
            "compiled": settings.speed.compile,
            "questions_a_second": round(rate, 1),
            "share_waiting": round(share, 3),
            "hours_of_20_epochs_of_vqa_v1": round(20 * QUESTIONS["train"] / rate / 3600, 2),
        }


def _vqa_v1_settings(setup: Setup, recipe: str, differences: Sequence[str], images: int) -> Settings:
    """Settings of a recipe for VQA v1, but on so many synthetic scenes, with random weights and new embeddings."""
    workers = setup.pick(0, max((os.cpu_count() or 2) // 2, 1))
    size = setup.pick(64, 448 if recipe == "modern_448" else 224)
    scenes = prepared_scenes(
        setup._replace(folder=setup.folder / str(size)),
        f"data.image_size={size}",
        f"scenes.images={{train: {images}, val: 8}}",
        f"data.processes={workers or 1}",
        "data.answers=2000",  # as the recipes
    )
    words = [
        f"device={setup.device}",
        f"workers={workers}",
        f"data.h5={scenes.data.h5}",
        f"data.image_size={size}",
        "data.cache_gib=0",
        f"backbone.name={setup.pick('resnet10', 'resnet50')}",
        "backbone.weights=none",
        "question.glove=null",
        "speed.share_images=false",  # of VQA's 80 000 images few are twice in a batch, of these many
        *setup.pick(["train.batch_size=8", *SMALL], []),
        *differences,
    ]
    return load_settings(CONFIG / "vqa_v1" / f"{recipe}.yaml", words)


def largest_rows(setup: Setup) -> Rows:
    """The largest batch of MODERN-152 at 448 px in bfloat16: estimated from the peak memory of two batches, then tried;
    on a CPU a step is taken and nothing measured.
    """
    network = setup.pick(["backbone.name=resnet10", "data.image_size=64", *SMALL], ["backbone.name=resnet152"])
    words = [*network, "backbone.weights=none", "question.glove=null", "precision=bfloat16", f"device={setup.device}"]
    settings = load_settings(CONFIG / "vqa_v1" / "modern_448.yaml", words)
    if setup.device.type != "cuda":
        _train(settings, 2, setup.device)
        return

    def peak(batch: int) -> float:
        return peak_mib(partial(_train, settings, batch, setup.device), setup.device)

    few, more = peak(4), peak(12)
    an_image = (more - few) / 8
    available = torch.cuda.mem_get_info(setup.device)[1] / 2**20 * 0.97
    batch, largest = int((available - (few - 4 * an_image)) / an_image), None
    while largest is None:
        try:
            largest = peak(batch)
        except RuntimeError as error:
            # cuDNN finds no engine where there is no memory for its workspace
            if not isinstance(error, torch.OutOfMemoryError) and "unable to find an engine" not in str(error):
                raise
            torch.cuda.empty_cache()
            batch = int(batch * 0.95)
    yield {
        "network": settings.backbone.name,
        "pixels": settings.data.image_size,
        "precision": settings.precision,
        "mib_an_image": round(an_image, 1),
        "largest_batch": batch,
        "peak_gib": round(largest / 2**10, 1),
    }


def _train(settings: Settings, batch: int, device: torch.device) -> None:
    """Take two training steps on a random batch."""
    model, made = random_model(settings, batch, device)
    optimiser = build_optimiser(settings.train, model)
    schedule = build_schedule(settings.train, optimiser, 2)
    prepare_images = Preprocessing(settings.data.image_size).normalise

    def loss_of(batch: Batch, reduction: str) -> Tensor:
        logits = answer_logits(model, batch, prepare_images, settings.precision)
        return answer_loss(logits, batch.labels, settings.train.loss, reduction)

    list(train_steps(model, [made] * 2, loss_of, settings.train, optimiser, schedule))  # takes them
