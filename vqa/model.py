"""MODERN: a ResNet modulated by the question, attention, fusion, answers (section 3 of the paper)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqa.attention import Normalisation, attend, normalise_features
from vqa.cbn import Modulation, ModulationPredictor
from vqa.question import QuestionEncoder
from vqa.resnet import ModulatedResNet


class Output(NamedTuple):
    """What the model says of a batch."""

    logits: Tensor  # [B, A], before the softmax
    attention: Tensor  # [B, G, H, W], each glimpse sums to 1
    modulation: Modulation | None  # [B, sum of C] each; None if no norm is conditioned


class Fusion(nn.Module):
    """P^T( tanh(U^T e_q) ∘ tanh(V^T e_v) ) + b, then a hidden layer (if any) and the answers."""

    def __init__(
        self, question_size: int, visual_size: int, fusion_size: int, hidden_size: int, answers: int, *, dropout: float
    ) -> None:
        """`hidden_size` 0 leaves the hidden layer out; `dropout` is the probability of dropping a unit."""
        super().__init__()
        self.question = nn.Linear(question_size, fusion_size, bias=False)
        self.visual = nn.Linear(visual_size, fusion_size, bias=False)
        hidden = [nn.Linear(fusion_size, hidden_size), nn.ReLU(), nn.Dropout(dropout)] if hidden_size else []
        self.answer = nn.Sequential(nn.Dropout(dropout), *hidden, nn.Linear(hidden_size or fusion_size, answers))

    def forward(self, question: Tensor, visual: Tensor) -> Tensor:
        """e_q [B, D], e_v [B, G * C] → logits [B, A]."""
        return self.answer(torch.tanh(self.question(question)) * torch.tanh(self.visual(visual)))


class VQAModel(nn.Module):
    """The parts put together; with `predictor` None it is the paper's baseline."""

    def __init__(
        self,
        question: QuestionEncoder,
        resnet: ModulatedResNet,
        predictor: ModulationPredictor | None,
        attention: nn.Module,
        fusion: Fusion,
        *,
        normalise: Normalisation,
        scale: float,
    ) -> None:
        """`normalise` and `scale` say what is done to the feature map before attention (`normalise_features`)."""
        super().__init__()
        self.question, self.resnet, self.predictor = question, resnet, predictor
        self.attention, self.fusion = attention, fusion
        self.normalise, self.scale = normalise, scale

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, *, modulate: bool = True) -> Output:
        """Normalised images [B, 3, S, S], word ids [B, T], lengths [B] → logits, attention and modulation.

        With `modulate` False all deltas are zero: what the same model answers if its ResNet does not hear the question.
        """
        question = self.question(tokens, lengths)  # [B, D]
        modulation = self.predictor(question) if self.predictor and modulate else None
        features = normalise_features(self.resnet(images, modulation), self.normalise, self.scale)  # [B, C, H, W]
        seen, weights = attend(features, self.attention(features, question))
        return Output(self.fusion(question, seen), weights, modulation)
