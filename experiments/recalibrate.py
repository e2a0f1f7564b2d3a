"""Re-estimate the statistics of a trained model's norms on other images (AdaBN; Li et al. 2016)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data.batches import EpochSampler
from experiments.evaluate import find_settings, split_data
from experiments.training.loop import read_batches
from vqa.devices import autocast, choose_device
from vqa.io.errors import InputError
from vqa.saved_model.files import WEIGHTS, load_model, save_companions, save_weights, settings_file


def recalibrate(run: Path, out: Path, split: str, overrides: Sequence[str] = (), *, batches: int = 200) -> int:
    """Writes `out/model`: the model of `run` with running statistics of its batch norms estimated on other images.

    The statistics of a modulated network depend on the questions, so these are used; answers are not.

    Args:
        run: a run directory, or a `model/` directory.
        out: where the new model is written.
        split: the split whose images and questions are used, in random order.
        overrides: `key=value` words over the model's settings: where the data are, the device, the batch size.
        batches: the greatest number of batches.

    Returns:
        The number of questions that were used.

    Raises:
        InputError: no model, no data, a model without batch norms, or `out` holds a trained model.
    """
    folder, settings = find_settings(run, overrides)
    copied = (out / "model" / WEIGHTS).exists() and not load_model(out).training.get("recalibrated_on")
    if copied or settings_file(out).exists() or out.resolve() == folder.parent.resolve():
        raise InputError(f"{out}: holds a trained model; --out must name another directory")
    device = choose_device(settings.device)
    saved = load_model(folder, device)
    if not settings.views or not saved.model.resnet.batch_norms():
        raise InputError(f"{folder}: this model uses no statistics of batch norms")
    if saved.model.image is not None:
        raise InputError(f"{folder}: cbn.condition=image passes each image through the norms twice, modulated and not")
    if (policy := saved.settings.backbone.statistics) != "batch":
        print(
            f"{folder}: trained with backbone.statistics={policy}, whose statistics stay as they were in training: new "
            "ones can lower its accuracy on any images (docs/experiments.md); evaluate both"
        )
    data = split_data(saved, settings, split)
    rows = list(EpochSampler(data.table.images, settings.train.batch_size, settings.seed, epoch=1))[:batches]
    if len(rows[0]) < (needed := saved.model.resnet.least_batch(settings.data.image_size)):
        raise InputError(
            f"train.batch_size: statistics at {settings.data.image_size} px need batches of {needed} questions, not "
            f"{len(rows[0])}"
        )
    model = saved.model
    bad, questions = torch.as_tensor(data.images.bad), 0
    with torch.inference_mode(), model.resnet.estimating_statistics():
        for batch in read_batches(data, rows, settings, device, "re-estimating"):
            good = ~bad[data.table.images[batch.rows]].reshape(len(batch.rows), -1).any(1)  # stand-ins are not used
            if good.sum() < needed:
                continue
            questions += int(good.sum())
            moved = (batch if good.all() else batch.of(good.nonzero().flatten())).to(device)
            with autocast(device, settings.precision):
                # one image per question, as in training
                images = saved.preprocessing.normalise(moved.images)[moved.places.flatten()]
                model(images, moved.tokens, moved.lengths, **moved.extras)
        if not questions:
            raise InputError(f"split {split!r}: too few of its images can be read")
    parts = saved.settings, saved.tokenizer, saved.answers, saved.preprocessing, saved.text_encoder, saved.categories
    save_companions(out / "model", *parts)
    save_weights(out / "model", model, saved.training | {"recalibrated_on": split})
    return questions
