"""Prepare what training reads: draw synthetic scenes, pretrain their backbone, make the h5 file."""

from pathlib import Path
from typing import Any

from data.preprocess import preprocess
from data.scenes.photos import changed_at_random
from data.scenes.write import PHOTOS, write_world
from data.vqa_files import SplitFiles
from experiments.pretrain import pretrain_backbone, pretrain_on_images
from vqa.devices import choose_device
from vqa.settings.schema import Settings


def prepare_world(settings: Settings) -> None:
    """Draws synthetic scenes with questions about them; existing ones are kept."""
    scenes, data = settings.scenes, settings.data
    write_world(
        Path(data.folder),
        seed=scenes.seed,
        images=scenes.images,
        world=scenes.world,
        size=data.image_size,
        look=scenes.look,
        questions_per_image=scenes.questions_per_image,
        processes=data.processes,
        source=data.photographs,
    )


def prepare_backbone(settings: Settings) -> float:
    """Pretrains the backbone on synthetic scenes, or keeps an existing one; returns its held-out accuracy, %."""
    scenes = settings.scenes
    if scenes.world == PHOTOS:
        made = pretrain_on_images(
            Path(settings.backbone.weights),
            settings.backbone.name,
            Path(settings.data.photographs),
            seed=scenes.seed,
            image_size=scenes.pretrain_size,
            epochs=scenes.pretrain_epochs,
            device=str(choose_device(settings.device)),
            change=changed_at_random,
        )
        return made["held_out_accuracy"]
    return pretrain_backbone(
        Path(settings.backbone.weights),
        settings.backbone.name,
        world=scenes.world,
        seed=scenes.seed,
        image_size=scenes.pretrain_size,
        images=scenes.pretrain_images,
        epochs=scenes.pretrain_epochs,
        precision=settings.precision,
        device=str(choose_device(settings.device)),
    )


def prepare(settings: Settings) -> None:
    """Makes everything that the training of a recipe reads, if it can be made.

    Raises:
        InputError: raw files are missing, or something of other settings is in the way.
    """
    if settings.scenes is not None:
        prepare_world(settings)
        if settings.backbone.weights != "none":
            prepare_backbone(settings)
    if settings.data.splits:
        preprocess(**preprocessing_of(settings))


def preprocessing_of(settings: Settings) -> dict[str, Any]:
    """The arguments of `data.preprocess.preprocess`."""
    data = settings.data
    names = ("image_size", "min_word_count", "answers", "vocabulary_from", "skip_bad_images")
    named = {name: getattr(data, name) for name in names}
    return {"splits": split_files(settings), "path": Path(data.h5), "threads": data.processes, **named}


def split_files(settings: Settings) -> dict[str, SplitFiles]:
    """The raw files of every split, below `data.folder`."""
    folder = Path(settings.data.folder)
    return {
        name: SplitFiles(
            folder / files.questions,
            folder / files.annotations if files.annotations else None,
            str(folder / files.images),
        )
        for name, files in settings.data.splits.items()
    }
