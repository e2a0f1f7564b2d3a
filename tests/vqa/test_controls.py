"""Controls: what each replaces the question or the image by, and that nothing else reaches the model."""

import pytest
import torch
from torch.nn import functional as F

from tests.models import example, model_of
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings


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


def seen_by(model, images, first=1):
    """The averages of the pretrained network's maps after stage `first` and later ones, [I, sum of C]."""
    return torch.cat([map_.mean((2, 3)) for map_ in model.resnet.stage_maps(images)[first - 1 :]], dim=1)


def test_a_condition_on_the_image_does_not_depend_on_the_question(tiny):
    model = model_of(tiny, "cbn.condition=image")
    images, tokens, lengths = example()
    others = torch.randn(8, 3, 64, 64)
    model.set_image_statistics([others[:3], others[3:]])
    deltas = model(images, tokens, lengths).modulation
    for one, other in zip(deltas, model(images, tokens.flip(1), lengths).modulation, strict=True):
        assert torch.equal(one, other)
    assert (deltas.gamma[0] - deltas.gamma[1]).abs().mean() > 0.1 * deltas.gamma.abs().mean()
    averages, known = seen_by(model, images), seen_by(model, others)
    standardised = (averages - known.mean(0)) / (known.var(0, correction=0) + 1e-5).sqrt()
    expected = model.predictor(model.image.linear(standardised))
    torch.testing.assert_close(deltas, expected, rtol=1e-3, atol=1e-4)
    # two questions on the second image, and from the stem's stored map
    places = torch.tensor([1, 1, 0])
    shared = model(images, tokens, lengths, places=places).modulation.gamma
    torch.testing.assert_close(shared, deltas.gamma[places], rtol=1e-4, atol=1e-5)
    stored = model(model.resnet.prefix(images, 0), tokens, lengths, places=places).modulation.gamma
    torch.testing.assert_close(stored, shared)


@pytest.mark.parametrize(("words", "first"), [([], 1), (["cbn.stages=[3,4]"], 3), (["cbn.stem=true"], 1)])
def test_a_condition_on_the_image_adds_one_linear_map_from_the_conditioned_stages(tiny, words, first):
    settings = [load_settings(tiny, [*words, f"cbn.condition={which}"]) for which in ("image", "question")]
    gated, modern = (build_model(one, 20, 5, pretrained=False) for one in settings)
    count = [sum(value.numel() for value in model.parameters()) for model in (gated, modern)]
    channels, size = sum(gated.resnet.stage_channels[first - 1 :]), settings[0].question.hidden_size
    assert gated.resnet.stage_channels == [16, 32, 64, 128]
    assert count[0] - count[1] == (channels + 1) * size
    images, tokens, lengths = example()
    stored = gated.resnet.prefix(images, first - 1)
    found, expected = (gated.encode(given, tokens, lengths, None, True)[1] for given in (stored, images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_condition_on_the_image_starts_near_the_pretrained_network_and_does_not_train_it(tiny):
    settings = load_settings(tiny, ["cbn.condition=image", "backbone.train=batchnorm"])
    model = build_model(settings, 20, 5, pretrained=False)
    images, tokens, lengths = example(batch=8)
    model.set_image_statistics([images])
    length = model.image(seen_by(model, images)).norm(dim=1).mean().item()
    assert length == pytest.approx(0.2 * settings.question.hidden_size**0.5, rel=0.3)
    plain = model.resnet(images)
    deltas = model(images, tokens, lengths).modulation
    assert 0 < (model.resnet(images, deltas) - plain).abs().mean() < 0.2 * plain.abs().mean()
    deltas.gamma.sum().backward()
    assert model.image.linear.weight.grad.abs().max() > 0
    assert all(value.grad is None for value in model.resnet.parameters())


def test_a_condition_on_the_image_is_refused_with_the_batchs_statistics(tiny):
    with pytest.raises(InputError, match="image needs population statistics"):
        build_model(load_settings(tiny, ["cbn.condition=image", "backbone.statistics=batch"]), 20, 5, pretrained=False)
