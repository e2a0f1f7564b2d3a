"""Write a trained model as a folder that `transformers` loads; `vqa.load` loads it too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from vqa.hub.model import ModernConfig, ModernForVisualQuestionAnswering
from vqa.hub.processor import ModernImageProcessor, ModernProcessor
from vqa.io.files import write_text
from vqa.saved_model import SavedModel
from vqa.saved_model.files import HUB_PREFIX, Training, save_weights
from vqa.settings.schema import CONDITIONS
from vqa.text.tokenizer import transformers_options

_CARD = Path(__file__).with_name("templates") / "card.md"


def save_hub_folder(saved: SavedModel, folder: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    """Write the configuration, the processor, a model card and the weights.

    Args:
        saved: the model.
        folder: where to.
        scores: rows of the card: each with `split`, `questions`, `overall` (percent) and the `file` it comes from.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=saved.tokenizer, **transformers_options(saved.tokenizer))
    ModernConfig(
        saved.settings.model_dump(),
        saved.tokenizer.get_vocab_size(),
        saved.text_encoder,
        tokenizer.pad_token_id,
        id2label=dict(enumerate(saved.answers)),
        label2id={answer: place for place, answer in enumerate(saved.answers)},
        architectures=[ModernForVisualQuestionAnswering.__name__],
        dtype="float32",
    ).save_pretrained(folder)
    made = saved.preprocessing
    images = ModernImageProcessor({"height": made.size, "width": made.size}, made.mean, made.std)
    images.save_pretrained(folder)
    ModernProcessor(images, tokenizer).save_pretrained(folder)
    write_text(folder / "README.md", _card(saved, scores))
    save_weights(folder, saved.model, saved.training, prefix=HUB_PREFIX)


def _card(saved: SavedModel, scores: Sequence[Mapping[str, Any]]) -> str:
    settings, layers = saved.settings, saved.model.resnet.layers
    options = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
    return jinja2.Template(_CARD.read_text(encoding="utf-8"), **options).render(
        Training.model_validate(saved.training).model_dump(),
        name=settings.name,
        backbone=settings.backbone.name,
        condition=CONDITIONS[settings.cbn.condition],
        norms=len(layers),
        channels=sum(layer.channels for layer in layers),
        answers=len(saved.answers),
        words=saved.tokenizer.get_vocab_size() - 2,  # without padding and the unknown word
        text_encoder=saved.text_encoder and saved.text_encoder["model_type"],
        longest=saved.text_encoder and saved.tokenizer.truncation["max_length"],
        size=saved.preprocessing.size,
        validate_on=settings.train.validate_on,
        scores=scores,
    )
