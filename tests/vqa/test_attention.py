"""Attention: weights that sum to one, an MLP over the concatenation, normalised features."""

import pytest
import torch
from torch.nn import functional as F

from vqa.attention import MLBAttention, SpatialAttention, attend, normalise_features


@pytest.mark.parametrize("kind", [SpatialAttention, MLBAttention])
@pytest.mark.parametrize("glimpses", [1, 3])
def test_attention_weights_sum_to_one_over_positions_and_differ(kind, glimpses):
    attention = kind(6, 4, 8, glimpses)
    features, question = torch.randn(2, 6, 3, 5), torch.randn(2, 4)
    seen, weights = attend(features, attention(features, question))
    assert seen.shape == (2, glimpses * 6)
    assert weights.shape == (2, glimpses, 3, 5)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, glimpses))
    assert weights.std((2, 3)).min() > 1e-4
    expected = torch.einsum("bghw,bchw->bgc", weights, features).flatten(1)
    torch.testing.assert_close(seen, expected)
    assert not torch.allclose(attention(features, question + 1), attention(features, question))


def test_spatial_attention_is_an_mlp_over_the_concatenation():
    attention = SpatialAttention(6, 4, 8)
    features, question = torch.randn(2, 6, 3, 3), torch.randn(2, 4)
    weight = torch.cat([attention.feature.weight[:, :, 0, 0], attention.question.weight], dim=1)
    for h in range(3):
        joined = torch.cat([features[:, :, h, 0], question], dim=1)
        hidden = F.relu(F.linear(joined, weight, attention.feature.bias))
        score = F.linear(hidden, attention.score.weight[:, :, 0, 0], attention.score.bias)
        torch.testing.assert_close(attention(features, question)[:, :, h, 0], score)


def test_mlb_attention_is_a_product_of_two_projections():
    attention = MLBAttention(6, 4, 8)
    features, question = torch.randn(2, 6, 3, 3), torch.randn(2, 4)
    seen = F.linear(features.permute(0, 2, 3, 1), attention.feature.weight[:, :, 0, 0], attention.feature.bias).tanh()
    joined = seen * attention.question(question).tanh()[:, None, None]
    scores = F.linear(joined, attention.score.weight[:, :, 0, 0], attention.score.bias)
    torch.testing.assert_close(attention(features, question), scores.permute(0, 3, 1, 2))


def test_feature_normalisation():
    features = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(normalise_features(features, "map", 2.0).flatten(1).norm(dim=1), torch.full((2,), 2.0))
    torch.testing.assert_close(normalise_features(features, "position", 8.0).norm(dim=1), torch.full((2, 3, 3), 8.0))
    torch.testing.assert_close(normalise_features(features, "none", 3.0), 3 * features)
    with pytest.raises(ValueError, match="unknown 'channel'; there are none, map, position"):
        normalise_features(features, "channel")
