"""MODERN: a ResNet modulated by the question, attention, fusion, answers (sections 3 and 4 of the paper)."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqa.attention import Normalisation, attend, normalise_features
from vqa.norms import Modulation
from vqa.predictor import Predictor
from vqa.question import QuestionEncoder, QuestionKinds, TextEncoder
from vqa.resnet import ModulatedResNet, StageMap

Condition = Literal["question", "kind", "image", "constant", "mean_question", "shuffled"]


class Output(NamedTuple):
    """The output of a model for a batch."""

    logits: Tensor  # [B, A], before the softmax, or sigmoid with `bce`
    attention: Tensor | None  # [B, G, H, W], each glimpse sums to 1; None for a model without attention
    modulation: Modulation | None  # [B, sum of C] each; None if no norm is conditioned


def answer_layers(size: int, hidden_size: int, answers: int, dropout: float) -> nn.Sequential:
    """[B, size] → logits [B, A] through a hidden layer (none if `hidden_size` is 0); `dropout` is the probability of
    dropping a unit, before each layer.
    """
    hidden = [nn.Linear(size, hidden_size), nn.ReLU(), nn.Dropout(dropout)] if hidden_size else []
    return nn.Sequential(nn.Dropout(dropout), *hidden, nn.Linear(hidden_size or size, answers))


class Fusion(nn.Module):
    """P^T( tanh(U^T e_q) ∘ tanh(V^T e_v) ) + b: the logits, or with a hidden layer its units before their ReLU."""

    def __init__(
        self, question_size: int, visual_size: int, fusion_size: int, hidden_size: int, answers: int, *, dropout: float
    ) -> None:
        """`hidden_size` and `dropout` as in `answer_layers`."""
        super().__init__()
        self.question = nn.Linear(question_size, fusion_size, bias=False)
        self.visual = nn.Linear(visual_size, fusion_size, bias=False)
        self.answer = answer_layers(fusion_size, hidden_size, answers, dropout)

    def forward(self, question: Tensor, visual: Tensor) -> Tensor:
        """e_q [B, D], e_v [B, G * C] → logits [B, A]."""
        return self.answer(torch.tanh(self.question(question)) * torch.tanh(self.visual(visual)))


class ImageCondition(nn.Module):
    """A condition that the unmodulated ResNet computes from the image: the control of gating without a question.

    Squeeze-and-excitation (Hu et al., CVPR 2018), instance enhancement batch normalisation (Liang et al., AAAI 2020)
    and attentive normalisation (Li et al., ECCV 2020) gate each map by its own averages over positions. Here the
    averages of the unmodulated maps after the first conditioned stage and all later ones are standardised and mapped
    linearly to the size of a question's embedding, which MODERN's MLPs read: the linear map is all that this control
    adds. The averages need a second pass through the ResNet, without gradients.
    """

    DEVIATION = 0.2  # of initial conditions, about that of an LSTM's embeddings: deltas start as large as MODERN's

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))  # over images, see `ConditionedModel.set_image_statistics`
        self.register_buffer("var", torch.ones(channels))
        self.linear = nn.Linear(channels, size)
        nn.init.normal_(self.linear.weight, std=self.DEVIATION / channels**0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, averages: Tensor) -> Tensor:
        """[I, sum of C] → [I, D]."""
        return self.linear(F.batch_norm(averages, self.mean, self.var))


class ConditionedModel(nn.Module):
    """A question encoder, a ResNet and what predicts the ResNet's deltas; each task's model adds the way to answers."""

    def __init__(
        self,
        question: QuestionEncoder | TextEncoder | None,
        resnet: ModulatedResNet,
        predictor: Predictor | None,
        condition: Condition,
        question_size: int,
        **parts: nn.Module | None,
    ) -> None:
        """
        Args:
            question: question → e_q; None for the control without the question, where e_q is ones.
            resnet: images → F.
            predictor: condition → deltas; the condition is an embedding [B, D] or, for `kind`, a class [B].
            condition: input of the predictor: the `question`, its `kind`, or for controls the `image` (see
                `ImageCondition`), a `constant` (ones), the `mean_question` (one fixed vector, see `set_mean_question`)
                or another question of the batch (`shuffled`; ones where there is no other).
            question_size: D.
            parts: modules of the task's own, by name.

        Raises:
            ValueError: unknown condition.
        """
        super().__init__()
        if condition not in get_args(Condition):
            raise ValueError(f"unknown {condition!r}; there are {', '.join(get_args(Condition))}")
        self.question, self.resnet, self.predictor = question, resnet, predictor
        for name, part in parts.items():
            setattr(self, name, part)
        self.condition, self.question_size = condition, question_size
        self.kinds = QuestionKinds() if condition == "kind" else None
        self.image = None
        if condition == "image" and predictor is not None:
            first = max(resnet.layers[0].stage, 1)
            self.image = ImageCondition(sum(resnet.stage_channels[first - 1 :]), question_size)
        if condition == "mean_question":
            self.register_buffer("mean_question", torch.ones(question_size))

    @torch.no_grad()
    def set_mean_question(self, tokens: Tensor, lengths: Tensor) -> None:
        """Set the fixed vector of the condition `mean_question` from questions, word ids [N, T] and lengths [N].

        It is the mean of their present embeddings, rescaled to the mean of their norms, so that the control starts with
        deltas as large as those of a question.
        """
        embeddings = self.question(tokens, lengths)  # [N, D]
        mean = embeddings.mean(0)
        self.mean_question.copy_(mean * (embeddings.norm(dim=1).mean() / mean.norm()))

    @torch.no_grad()
    def set_image_statistics(self, batches: Iterable[Tensor]) -> None:
        """Standardise the averages of the condition `image` over normalised images [I, 3, S, S], batch by batch."""
        var, mean = torch.var_mean(torch.cat([self._averages(images) for images in batches]), dim=0, correction=0)
        self.image.mean.copy_(mean)
        self.image.var.copy_(var)

    @torch.no_grad()
    def _averages(self, images: Tensor | StageMap) -> Tensor:
        """The unmodulated maps from the first conditioned stage on, averaged over positions, [I, sum of C]."""
        first = max(self.resnet.layers[0].stage, 1)
        averages = [map_.mean((2, 3)) for map_ in self.resnet.stage_maps(images)[first - 5 :]]
        return torch.cat(averages, dim=1).to(self.image.mean.dtype)

    def encode(
        self,
        images: Tensor | StageMap,
        tokens: Tensor,
        lengths: Tensor,
        places: Tensor | None = None,
        modulate: bool = True,
    ) -> tuple[Tensor, Modulation | None]:
        """Arguments as of `forward` → e_q [B, D] and the ResNet's modulation, None with `modulate` False.

        Under the condition `image` a question about V images has V modulations, one after the other.
        """
        if self.question is not None:
            question = self.question(tokens, lengths)
        else:
            question = next(self.resnet.parameters()).new_ones(len(tokens), self.question_size)
        if self.predictor is None or not modulate:
            return question, None
        return question, self.predictor(self._condition_of(question, tokens, images, places))

    def _condition_of(
        self, question: Tensor, tokens: Tensor, images: Tensor | StageMap, places: Tensor | None
    ) -> Tensor:
        if self.condition == "image":
            seen = self.image(self._averages(images))
            return seen if places is None else seen[places.flatten()]
        if self.condition == "kind":
            return self.kinds(tokens)
        if self.condition == "mean_question":
            return self.mean_question.expand_as(question)
        if self.condition == "shuffled" and len(question) > 1:
            # half a batch away: evaluation asks image by image, and a neighbour may be about the same image
            return question.roll(len(question) // 2, dims=0)
        return question if self.condition == "question" else torch.ones_like(question)


class VQAModel(ConditionedModel):
    """MODERN; with `predictor` None, the paper's baseline, whose ResNet is not modulated."""

    def __init__(
        self,
        question: QuestionEncoder | TextEncoder | None,
        resnet: ModulatedResNet,
        predictor: Predictor | None,
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
            question, resnet, predictor, condition: as in `ConditionedModel`.
            attention: F, e_q → scores of positions.
            fusion: e_q, e_v → answers.
            normalise, scale: how `normalise_features` treats F before attention.
            sees_image: False for the control without the image, where F is ones.
        """
        size = fusion.question.in_features
        super().__init__(question, resnet, predictor, condition, size, attention=attention, fusion=fusion)
        self.normalise, self.scale, self.sees_image = normalise, scale, sees_image

    def forward(
        self,
        images: Tensor | StageMap,
        tokens: Tensor,
        lengths: Tensor,
        *,
        places: Tensor | None = None,
        modulate: bool = True,
    ) -> Output:
        """Normalised images [I, 3, S, S] or a map computed from them, word ids [B, T], lengths [B] → logits, attention
        and modulation.

        Question i is about image places[i], or without `places` about image i. With `modulate` False the ResNet is not
        modulated.
        """
        question, modulation = self.encode(images, tokens, lengths, places, modulate)
        if self.sees_image:
            features = self.resnet(images, modulation, places)  # [B, C, H, W]
        else:
            features = self.fusion.visual.weight.new_ones(len(tokens), self.resnet.channels, 1, 1)
        features = normalise_features(features, self.normalise, self.scale)
        seen, weights = attend(features, self.attention(features, question))
        return Output(self.fusion(question, seen), weights, modulation)
