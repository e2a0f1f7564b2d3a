"""The GuessWhat?! oracle: features of an object and the question, concatenated → yes, no or n.a. (section 4)."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vqa.model import Condition, ConditionedModel, Output, answer_layers
from vqa.norms import Modulation
from vqa.predictor import Predictor
from vqa.question import QuestionEncoder, TextEncoder
from vqa.resnet import ModulatedResNet, StageMap

BOX = 8  # numbers that describe a box: `vqa.tasks.objects.spatial_features`


class Concatenation(nn.Module):
    """Concatenate vectors [B, …]; a hidden layer (if any) and the answers follow."""

    def __init__(self, size: int, hidden_size: int, answers: int, *, dropout: float) -> None:
        """`size` is that of all vectors together; the rest as in `answer_layers`."""
        super().__init__()
        self.answer = answer_layers(size, hidden_size, answers, dropout)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """→ logits [B, A]."""
        return self.answer(torch.cat(parts, 1))


class OracleModel(ConditionedModel):
    """Answers a question about one object from any of its crop, the whole image, its box, its category, the question.

    The crop and the whole image, its views, go through the same modulated ResNet; a view's features are the mean of its
    stage-4 map over the positions. Without a view the ResNet is not used.
    """

    def __init__(
        self,
        question: QuestionEncoder | TextEncoder | None,
        resnet: ModulatedResNet,
        predictor: Predictor | None,
        *,
        condition: Condition,
        question_size: int,
        inputs: Collection[str],
        categories: int,
        category_size: int,
        hidden_size: int,
        answers: int,
        dropout: float,
    ) -> None:
        """
        Args:
            question: question → e_q; None if it is not among the inputs.
            resnet, predictor, condition, question_size: as in `ConditionedModel`.
            inputs: any of `crop`, `image`, `spatial`, `category`, `question`.
            categories, category_size: of the embedding of the object's category.
            hidden_size, answers, dropout: of the answer layers.
        """
        sizes = {"crop": resnet.channels, "image": resnet.channels, "spatial": BOX}
        sizes |= {"category": category_size, "question": question_size}
        category = nn.Embedding(categories, category_size) if "category" in inputs else None
        fusion = Concatenation(sum(sizes[name] for name in set(inputs)), hidden_size, answers, dropout=dropout)
        super().__init__(question, resnet, predictor, condition, question_size, category=category, fusion=fusion)
        self.views = len({"crop", "image"} & set(inputs))
        self.sees_box = "spatial" in inputs

    def forward(
        self,
        images: Tensor | StageMap,
        tokens: Tensor,
        lengths: Tensor,
        *,
        places: Tensor | None = None,
        modulate: bool = True,
        spatial: Tensor | None = None,
        category: Tensor | None = None,
    ) -> Output:
        """Normalised views [I, 3, S, S] or a map computed from them, word ids [B, T], lengths [B], boxes [B, 8] and
        categories int64 [B] → logits [B, A] and modulation.

        The V views of question i are images places[i], [V] or one number; without `places` they follow one another,
        I = B * V. What is not among the model's inputs is ignored. With `modulate` False the ResNet is not modulated.
        """
        question, modulation = self.encode(images, tokens, lengths, places, modulate)
        parts = [] if self.question is None else [question]
        if self.views:
            deltas = None
            if modulation is not None:  # each view's
                count = len(tokens) * self.views
                of_views = (
                    part if part is None else part.repeat_interleave(count // len(part), 0) for part in modulation
                )
                deltas = Modulation(*of_views)
            maps = self.resnet(images, deltas, None if places is None else places.flatten())  # [B * V, C, H, W]
            parts.append(maps.mean((2, 3)).reshape(len(tokens), -1))
        if self.sees_box:
            parts.append(spatial)
        if self.category is not None:
            parts.append(self.category(category))
        return Output(self.fusion(parts), None, modulation)
