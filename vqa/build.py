"""Build the model of a recipe."""

from collections.abc import Sequence

import torch
from torch import nn

from vqa.attention import ATTENTIONS
from vqa.io.errors import InputError
from vqa.model import ConditionedModel, Fusion, VQAModel
from vqa.predictor import CategoricalPredictor, ModulationPredictor, Predictor
from vqa.question import KINDS, QuestionEncoder, TextEncoder
from vqa.resnet import ConditionedNorm, ModulatedResNet
from vqa.settings.schema import Settings
from vqa.tasks.guesswhat import OracleModel


def build_model(
    settings: Settings,
    vocabulary_size: int,
    answers: int,
    *,
    pretrained: bool,
    text_encoder: nn.Module | None = None,
    categories: int = 0,
) -> ConditionedModel:
    """The model of a recipe, with only the parameters it names trainable.

    Args:
        settings: the recipe.
        vocabulary_size: number of known words V, including padding and unknown.
        answers: number of answer classes A.
        pretrained: load the backbone's weights; False if all weights are loaded afterwards.
        text_encoder: of `vqa.text.encoder`, for the encoder `transformers`.
        categories: number of categories of objects, of the task guesswhat.

    Raises:
        InputError: the backbone or its weights do not exist as named, or settings exclude each other: conditioned
            stages that predict nothing or lack an input, a trained backbone without an image, instance norm of stage 4
            at 32 px, gating by the image with batch statistics.
    """
    if settings.backbone.train != "none" and not settings.views:
        raise InputError("backbone.train: a model that is given no image does not use its ResNet; it must be none")
    resnet = _build_resnet(settings, pretrained)
    predictor = _build_predictor(settings, resnet.layers)
    question = _build_question(settings, vocabulary_size, text_encoder) if "question" in settings.inputs else None
    if settings.guesswhat is not None:
        model = _build_oracle(settings, question, resnet, predictor, answers, categories)
    else:
        model = _build_vqa(settings, question, resnet, predictor, answers)
    model.to(memory_format=torch.channels_last if settings.speed.channels_last else torch.contiguous_format)
    for parameter in resnet.trainable(settings.backbone.train):
        parameter.requires_grad_(True)
    return model


def _build_resnet(settings: Settings, pretrained: bool) -> ModulatedResNet:
    backbone, cbn = settings.backbone, settings.cbn
    try:
        return ModulatedResNet(
            backbone.name,
            backbone.weights if pretrained and backbone.weights != "none" else None,
            cbn.stages,
            stem=cbn.stem,
            shortcuts=cbn.shortcuts,
            statistics="batch" if backbone.statistics == "batch" else "population",
            normaliser=cbn.normaliser,
            fused=settings.speed.fused,
            recompute=settings.speed.recompute,
        )
    except ValueError as error:
        raise InputError(f"backbone: {error}") from None


def _build_vqa(
    settings: Settings,
    question: QuestionEncoder | TextEncoder | None,
    resnet: ModulatedResNet,
    predictor: Predictor | None,
    answers: int,
) -> VQAModel:
    attention, answer, size = settings.attention, settings.answer, settings.question.hidden_size
    sizes = (size, resnet.channels * attention.glimpses, answer.fusion_size, answer.hidden_size, answers)
    return VQAModel(
        question,
        resnet,
        predictor,
        ATTENTIONS[attention.kind](resnet.channels, size, attention.units, attention.glimpses),
        Fusion(*sizes, dropout=answer.dropout),
        condition=settings.cbn.condition,
        normalise=attention.normalise,
        scale=attention.scale,
        sees_image="image" in settings.inputs,
    )


def _build_oracle(
    settings: Settings,
    question: QuestionEncoder | TextEncoder | None,
    resnet: ModulatedResNet,
    predictor: Predictor | None,
    answers: int,
    categories: int,
) -> OracleModel:
    return OracleModel(
        question,
        resnet,
        predictor,
        condition=settings.cbn.condition,
        question_size=settings.question.hidden_size,
        inputs=settings.inputs,
        categories=categories,
        category_size=settings.guesswhat.category_size,
        hidden_size=settings.answer.hidden_size,
        answers=answers,
        dropout=settings.answer.dropout,
    )


def _build_question(
    settings: Settings, vocabulary_size: int, text_encoder: nn.Module | None
) -> QuestionEncoder | TextEncoder:
    asked = settings.question
    if asked.encoder == "transformers":
        return TextEncoder(text_encoder, asked.hidden_size, pooling=asked.pooling, frozen=asked.frozen)
    fixed, sizes = asked.glove_size if asked.glove else 0, (asked.embedding_size, asked.hidden_size)
    return QuestionEncoder(vocabulary_size, *sizes, encoder=asked.encoder, layers=asked.layers, fixed_size=fixed)


def _build_predictor(settings: Settings, layers: Sequence[ConditionedNorm]) -> Predictor | None:
    cbn = settings.cbn
    if not layers:
        return None
    if cbn.normaliser == "instance" and settings.data.image_size <= 32 and any(layer.stage == 4 for layer in layers):
        raise InputError("cbn.normaliser: stage 4 has one position at 32 px, which instance norm cannot normalise")
    if "question" not in settings.inputs or not settings.views:
        inputs = " and ".join(settings.inputs)
        raise InputError(f"inputs: a model of {inputs} alone has nothing to condition; set cbn.stages=[]")
    if not (cbn.gamma or cbn.beta):
        raise InputError("cbn: gamma and beta are both false; set cbn.stages=[] to condition nothing")
    if cbn.condition == "image" and settings.backbone.statistics == "batch":
        raise InputError("cbn.condition: image needs population statistics; its extra pass would move the batch's, too")
    names, channels = [layer.name for layer in layers], [layer.channels for layer in layers]
    if cbn.condition == "kind":
        return CategoricalPredictor(KINDS + 1, channels, gamma=cbn.gamma, beta=cbn.beta)
    size = settings.question.hidden_size
    return ModulationPredictor(size, names, channels, cbn.hidden_size, gamma=cbn.gamma, beta=cbn.beta)
