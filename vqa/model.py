"""MODERN: a ResNet modulated by the question, attention, fusion, answers (section 3 of the paper)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqa.attention import Normalisation, attend, normalise_features
from vqa.cbn import CategoricalPredictor, Modulation, ModulationPredictor
from vqa.question import QuestionEncoder, QuestionKinds
from vqa.resnet import ModulatedResNet, StageMap

Condition = Literal["question", "kind", "constant", "mean_question", "shuffled"]


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
        question: QuestionEncoder | None,
        resnet: ModulatedResNet,
        predictor: ModulationPredictor | CategoricalPredictor | None,
        attention: nn.Module,
        fusion: Fusion,
        *,
        condition: Condition,
        normalise: Normalisation,
        scale: float,
        sees_image: bool = True,
    ) -> None:
        """
        Args:
            question: None for the control that does not hear the question: ones stand for its embedding.
            resnet: the network.
            predictor: what predicts the deltas, of embeddings [B, D] or (for the condition `kind`) of kinds [B].
            attention: scores of positions.
            fusion: e_q and e_v to answers.
            condition: what the predictor is given: the `question`, its `kind`, or for controls a `constant` (ones), the
                `mean_question` (one fixed vector, see `set_mean_question`) or another question of the batch
                (`shuffled`; ones where there is no other).
            normalise: what is done to the feature map before attention (`normalise_features`).
            scale: likewise.
            sees_image: False for the control that does not see the image: a map of ones stands for its features.
        """
        super().__init__()
        self.question, self.resnet, self.predictor = question, resnet, predictor
        self.attention, self.fusion = attention, fusion
        self.condition, self.normalise, self.scale = condition, normalise, scale
        self.kinds = QuestionKinds() if condition == "kind" else None
        self.sees_image = sees_image
        if condition == "mean_question":
            self.register_buffer("mean_question", torch.ones(fusion.question.in_features))

    @torch.no_grad()
    def set_mean_question(self, tokens: Tensor, lengths: Tensor) -> None:
        """Sets the fixed vector of the condition `mean_question`: the mean of the embeddings of these questions by the
        present encoder, rescaled to the mean of their norms. So the control begins with the deltas of an ordinary
        question, and not of a vector of another size.

        Args:
            tokens: word ids [N, T].
            lengths: [N].
        """
        embeddings = self.question(tokens, lengths)  # [N, D]
        mean = embeddings.mean(0)
        self.mean_question.copy_(mean * (embeddings.norm(dim=1).mean() / mean.norm()))

    def forward(
        self,
        images: Tensor | StageMap,
        tokens: Tensor,
        lengths: Tensor,
        *,
        places: Tensor | None = None,
        modulate: bool = True,
    ) -> Output:
        """Normalised images [I, 3, S, S] or a map made of them, word ids [B, T], lengths [B] → logits, attention and
        modulation.

        Question i is about image places[i], or without `places` about image i.
        With `modulate` False all deltas are zero: what the same model answers if its ResNet does not hear the question.
        """
        if self.question is not None:
            question = self.question(tokens, lengths)  # [B, D]
        else:
            question = torch.ones(len(tokens), self.fusion.question.in_features, device=tokens.device)
        modulation = None
        if self.predictor is not None and modulate:
            modulation = self.predictor(self._condition_of(question, tokens))
        if self.sees_image:
            features = self.resnet(images, modulation, places)  # [B, C, H, W]
        else:
            features = torch.ones(len(tokens), self.resnet.channels, 1, 1, device=tokens.device)
        features = normalise_features(features, self.normalise, self.scale)
        seen, weights = attend(features, self.attention(features, question))
        return Output(self.fusion(question, seen), weights, modulation)

    def _condition_of(self, question: Tensor, tokens: Tensor) -> Tensor:
        if self.kinds is not None:
            return self.kinds(tokens)
        if self.condition == "mean_question":
            return self.mean_question.expand_as(question)
        if self.condition == "constant" or (self.condition == "shuffled" and len(question) < 2):
            return torch.ones_like(question)
        if self.condition == "shuffled":
            # from half a batch away: in evaluation, where questions come image by image, one about another image
            return question.roll(len(question) // 2, dims=0)
        return question
