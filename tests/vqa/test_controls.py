"""Controls: what each replaces the question or the image by, and that nothing else reaches the model."""

import pytest
import torch
from torch.nn import functional as F

from tests.models import example, model_of
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_kind_of_a_question_alone_moves_the_feature_map(tiny):
    model = model_of(tiny, "cbn.condition=kind")
    model.kinds.set_from(torch.tensor([[5, 6], [7, 8]]))
    images = torch.randn(1, 3, 64, 64).expand(3, -1, -1, -1)
    tokens = torch.tensor([[5, 6, 2], [5, 6, 3], [7, 8, 2]])
    deltas = model(images, tokens, torch.full((3,), 3)).modulation
    torch.testing.assert_close(deltas.gamma[0], deltas.gamma[1])
    assert not torch.allclose(deltas.gamma[0], deltas.gamma[2])


def test_a_constant_condition_gives_every_question_the_same_deltas(tiny):
    images, tokens, lengths = example()
    deltas = model_of(tiny, "cbn.condition=constant")(images, tokens, lengths).modulation
    assert deltas.gamma.abs().max() > 0
    torch.testing.assert_close(deltas.gamma[:1].expand(3, -1), deltas.gamma)


def test_the_mean_question_is_one_vector_as_long_as_a_question(tiny):
    model = model_of(tiny, "cbn.condition=mean_question")
    images, tokens, lengths = example()
    model.set_mean_question(tokens, lengths)
    embeddings = model.question(tokens, lengths).detach()
    assert model.mean_question.norm() == pytest.approx(embeddings.norm(dim=1).mean().item(), rel=1e-5)
    assert F.cosine_similarity(model.mean_question, embeddings.mean(0), dim=0) == pytest.approx(1, abs=1e-5)
    expected = model.predictor(model.mean_question[None].expand(3, -1)).gamma
    torch.testing.assert_close(model(images, tokens, lengths).modulation.gamma, expected)
    before = model.mean_question.clone()
    model.train()(images, tokens.flip(1), lengths).logits.sum().backward()
    assert torch.equal(model.mean_question, before)


def test_a_shuffled_condition_gives_a_sample_the_deltas_of_another(tiny):
    images, tokens, lengths = example(batch=4)
    model, own = model_of(tiny, "cbn.condition=shuffled"), model_of(tiny)
    own.load_state_dict(model.state_dict())
    shuffled, straight = (m(images, tokens, lengths).modulation.gamma for m in (model, own))
    torch.testing.assert_close(shuffled, straight[[2, 3, 0, 1]])
    alone = [model(images[:1], some, lengths[:1]).modulation.gamma for some in (tokens[:1], tokens[1:2])]
    torch.testing.assert_close(*alone)  # no other question: not its own either


def test_a_model_without_image_or_question_does_not_depend_on_it(tiny):
    images, tokens, lengths = example()
    others, reworded = images.flip(0), tokens.flip(1)
    blind = model_of(tiny, "inputs=[question]", "cbn.stages=[]")
    torch.testing.assert_close(blind(images, tokens, lengths).logits, blind(others, tokens, lengths).logits)
    assert not torch.allclose(blind(images, tokens, lengths).logits, blind(images, reworded, lengths).logits)
    deaf = model_of(tiny, "inputs=[image]", "cbn.stages=[]")
    torch.testing.assert_close(deaf(images, tokens, lengths).logits, deaf(images, reworded, lengths).logits)
    assert not torch.allclose(deaf(images, tokens, lengths).logits, deaf(others, tokens, lengths).logits)


def test_controls_have_nothing_to_condition(tiny):
    with pytest.raises(InputError, match="set cbn.stages="):
        build_model(load_settings(tiny, ["inputs=[image]"]), 20, 5, pretrained=False)
