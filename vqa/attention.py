"""Attention over the positions of the feature map: the paper's MLP, and the glimpses of MLB (Kim et al. 2017)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Normalisation = Literal["none", "map", "position"]


def normalise_features(features: Tensor, kind: Normalisation, scale: float = 1.0) -> Tensor:
    """L2-normalise a map [B, C, H, W] as a whole (`map`) or at each position (`position`), then multiply it by `scale`.

    The norm is computed in float32 or finer; the result has the type of the map. Raises ValueError for another kind.
    """
    if kind not in get_args(Normalisation):
        raise ValueError(f"unknown {kind!r}; there are {', '.join(get_args(Normalisation))}")
    if kind == "none":
        return scale * features
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    return (scale * F.normalize(exact, dim=(1, 2, 3) if kind == "map" else 1)).to(features.dtype)


def attend(features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the positions of a map F [B, C, H, W], weighted by a softmax of the scores ξ [B, G, H, W] over all of them.

    Returns e_v [B, G * C], one glimpse after the other, and the weights α [B, G, H, W]; those of a glimpse sum to 1.
    """
    weights = scores.flatten(2).softmax(dim=2)  # [B, G, HW]
    seen = weights.to(features.dtype) @ features.flatten(2).transpose(1, 2)  # [B, G, C]
    return seen.flatten(1), weights.view_as(scores)


class SpatialAttention(nn.Module):
    """ξ = MLP([F_hw ; e_q]) with one hidden layer, shared by all positions (section 4 of the paper)."""

    def __init__(self, channels: int, question_size: int, units: int, glimpses: int = 1) -> None:
        """`channels` C, `question_size` D, hidden `units`, `glimpses` G."""
        super().__init__()
        # The first layer over the concatenation is the sum of its two blocks; the question's is computed once.
        self.feature = nn.Conv2d(channels, units, 1)
        self.question = nn.Linear(question_size, units, bias=False)
        self.score = nn.Conv2d(units, glimpses, 1)

    def forward(self, features: Tensor, question: Tensor) -> Tensor:
        """F [B, C, H, W], e_q [B, D] → scores ξ [B, G, H, W]."""
        return self.score(torch.relu(self.feature(features) + self.question(question)[:, :, None, None]))


class MLBAttention(nn.Module):
    """ξ^g = P_g^T( tanh(U'^T e_q) ∘ tanh(V'^T F_hw) ), U' and V' are shared by the G glimpses."""

    def __init__(self, channels: int, question_size: int, units: int, glimpses: int = 2) -> None:
        """As `SpatialAttention`."""
        super().__init__()
        self.feature = nn.Conv2d(channels, units, 1)
        self.question = nn.Linear(question_size, units)
        self.score = nn.Conv2d(units, glimpses, 1)

    def forward(self, features: Tensor, question: Tensor) -> Tensor:
        """F [B, C, H, W], e_q [B, D] → scores ξ [B, G, H, W]."""
        return self.score(torch.tanh(self.feature(features)) * torch.tanh(self.question(question))[:, :, None, None])


ATTENTIONS = {"spatial": SpatialAttention, "mlb": MLBAttention}
