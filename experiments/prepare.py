"""Prepare what training reads: draw synthetic scenes, pretrain their backbone, make the h5 file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.guesswhat.source import GuessWhatSource
from data.h5_file import read_provenance
from data.preprocess import preprocess
from data.scenes.photos import changed_at_random
from data.scenes.write import GAMES, PHOTOS, WORLD, write_world
from data.sources import Source
from data.vqa_files import SplitFiles
from experiments.pretrain import pretrain_backbone, pretrain_on_images
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
    scenes, backbone = settings.scenes, settings.backbone
    file, made = Path(backbone.weights), {"image_size": scenes.pretrain_size, "epochs": scenes.pretrain_epochs}
    made |= {"seed": scenes.seed if backbone.seed is None else backbone.seed, "device": settings.device}
    if scenes.world == PHOTOS:
        photographs = Path(settings.data.photographs)
        header = pretrain_on_images(file, backbone.name, photographs, change=changed_at_random, **made)
        return header["held_out_accuracy"]
    made |= {"images": scenes.pretrain_images, "precision": settings.precision}
    world = "small" if scenes.world == GAMES else scenes.world  # the games' objects are those of the small scenes
    return pretrain_backbone(file, backbone.name, world=world, **made)


def check_world(settings: Settings) -> None:
    """Raises InputError if `data.folder` holds synthetic scenes of other settings; it may hold none, beside the h5."""
    source = settings.data.photographs
    drawn = settings.scenes is not None and (Path(settings.data.folder) / WORLD).exists()
    if drawn and (source is None or Path(source).exists()):
        prepare_world(settings)


def prepare_scenes(settings: Settings) -> None:
    """Draws the scenes of a recipe and pretrains their backbone, if it has any."""
    if settings.scenes is not None:
        prepare_world(settings)
        if settings.backbone.weights != "none":
            prepare_backbone(settings)


def prepare_data(settings: Settings) -> None:
    """Draws the scenes of a recipe, if it has any, and makes its h5 file. Raises InputError as `prepare`."""
    if settings.scenes is not None:
        prepare_world(settings)
    if settings.data.splits:
        preprocess(**preprocessing_of(settings))


def prepare(settings: Settings) -> None:
    """Makes everything that the training of a recipe reads, if it can be made.

    Raises:
        InputError: raw files are missing, or something of other settings is in the way.
    """
    prepare_scenes(settings)
    prepare_data(settings)


def preprocessing_of(settings: Settings) -> dict[str, Any]:
    """The arguments of `data.preprocess.preprocess`."""
    data = settings.data
    named = data.model_dump(include={"image_size", "min_word_count", "vocabulary_from", "skip_bad_images"})
    path, views = Path(data.h5), ["crop", *({"image"} & set(settings.inputs))]
    if settings.guesswhat is not None and path.exists():  # whole images that it holds are no reason to make it again
        stored = read_provenance(path)["settings"].get("guesswhat.images", views)
        views = stored if set(views) <= set(stored) else views
    named |= {"splits": split_files(settings), "source": source_of(settings, views)}
    return {"path": path, "threads": data.processes, **named}


def source_of(settings: Settings, views: Sequence[str], categories: Sequence[str] | None = None) -> Source:
    """The reader of a recipe's raw files; views and categories of GuessWhat?! as `GuessWhatSource` takes them."""
    games = settings.guesswhat
    if games is None:
        return Source(settings.data.answers)
    return GuessWhatSource(games.status, games.crop_factor, views, categories)


def split_files(settings: Settings) -> dict[str, SplitFiles]:
    """The raw files of every split, below `data.folder`."""
    folder = Path(settings.data.folder)
    plain = str(folder).replace("{", "{{").replace("}", "}}")  # only the recipe's part is a pattern
    return {
        name: SplitFiles(
            folder / files.questions,
            folder / files.annotations if files.annotations else None,
            str(Path(plain) / files.images),
            within=files.images,
        )
        for name, files in settings.data.splits.items()
    }
