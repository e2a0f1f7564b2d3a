"""The whole model: conditioning, a batch in any order, what is trained, floating types."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.training.optimiser import build_optimiser
from tests.models import example
from vqa.build import build_model
from vqa.devices import autocast
from vqa.io.errors import InputError
from vqa.model import ConditionedModel, Fusion
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


@pytest.fixture
def settings(tiny):
    return load_settings(tiny)


def test_the_feature_map_moves_when_only_the_question_changes(settings):
    model = build_model(settings, 20, 10, pretrained=False).eval()
    images, tokens, lengths = example()
    seen = []
    model.resnet.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(images, tokens, lengths)
    model(images, tokens.flip(1), lengths)
    assert not torch.allclose(seen[0], seen[1])
    plain = model(images, tokens, lengths, modulate=False)
    assert plain.modulation is None
    torch.testing.assert_close(seen[2], model.resnet(images))


def test_an_unknown_condition_is_refused(settings):
    resnet = build_model(settings, 20, 10, pretrained=False).resnet
    with pytest.raises(ValueError, match="unknown 'kinds'; there are question, kind, image, constant"):
        ConditionedModel(None, resnet, None, "kinds", 8)


def test_the_baseline_gets_the_question_only_after_the_resnet(tiny):
    model = build_model(load_settings(tiny, ["cbn.stages=[]"]), 20, 10, pretrained=False).eval()
    assert model.predictor is None
    images, tokens, lengths = example()
    seen = []
    model.resnet.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    one, other = model(images, tokens, lengths), model(images, tokens.flip(1), lengths)
    assert torch.equal(seen[0], seen[1])
    assert one.modulation is None
    assert not torch.allclose(one.logits, other.logits)


def test_a_batch_is_its_samples_in_any_order(settings):
    model = build_model(settings, 20, 10, pretrained=False).eval()
    images, tokens, lengths = example(batch=4)
    together = model(images, tokens, lengths).logits
    for i in range(4):
        alone = model(images[i : i + 1], tokens[i : i + 1], lengths[i : i + 1]).logits
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-3, atol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        model(images[order], tokens[order], lengths).logits, together[order], rtol=1e-3, atol=1e-4
    )


def test_padding_does_not_change_the_answer(settings):
    model = build_model(settings, 20, 10, pretrained=False).eval()
    images, tokens, lengths = example()
    padded = F.pad(tokens, (0, 4), value=0)
    torch.testing.assert_close(model(images, padded, lengths).logits, model(images, tokens, lengths).logits)


@pytest.mark.parametrize("attention", ["spatial", "mlb"])
def test_the_loss_at_the_start_is_near_log_a(tiny, attention):
    model = build_model(load_settings(tiny, [f"attention.kind={attention}"]), 20, 50, pretrained=False)
    images, tokens, lengths = example(batch=16)
    loss = F.cross_entropy(model(images, tokens, lengths).logits, torch.randint(50, (16,)))
    assert loss.item() == pytest.approx(math.log(50), rel=0.1)


def test_fusion_is_its_formula():
    fusion, question, visual = Fusion(4, 6, 5, 7, 3, dropout=0.5).eval(), torch.randn(2, 4), torch.randn(2, 6)
    first, last = (layer for layer in fusion.answer if isinstance(layer, nn.Linear))
    fused = (question @ fusion.question.weight.T).tanh() * (visual @ fusion.visual.weight.T).tanh()
    hidden = (fused @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(fusion(question, visual), hidden @ last.weight.T + last.bias)


def test_attention_gets_features_of_the_length_that_the_settings_name(tiny):
    model = build_model(load_settings(tiny, ["attention.scale=7"]), 20, 10, pretrained=False).eval()
    seen = []
    model.attention.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(*example())
    torch.testing.assert_close(seen[0].norm(dim=1), torch.full((3, 2, 2), 7.0))


def test_dropout_is_the_probability_of_dropping(tiny):
    model = build_model(load_settings(tiny, ["answer.dropout=0.9"]), 20, 10, pretrained=False)
    dropped = [F.dropout(torch.ones(10_000), layer.p) for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert len(dropped) == 2
    assert all(float((part == 0).float().mean()) == pytest.approx(0.9, abs=0.02) for part in dropped)


RECIPES = {
    "cbn.stages=[]": set(),
    "cbn.stages=[4]": {"predictor"},
    "backbone.train=stage4": {"predictor", "layer4"},
    "backbone.train=batchnorm": {"predictor", "norms"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_the_recipe_names_changes(tiny, recipe):
    model = build_model(load_settings(tiny, [recipe]), 20, 10, pretrained=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = build_optimiser(load_settings(tiny, [recipe, "train.learning_rate=0.01"]).train, model)
    for _ in range(2):
        model.train()
        logits = model(*example()).logits
        optimiser.zero_grad()
        F.cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
        optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    in_resnet = {name for name in changed if name.startswith("resnet.")}
    expected = set()
    for name, _ in model.resnet.named_parameters():
        stage4 = "layer4" in RECIPES[recipe] and "layer4" in name
        norm = "norms" in RECIPES[recipe] and (".bn" in name or ".downsample.1." in name)
        if stage4 or norm:
            expected.add(f"resnet.{name}")
    assert in_resnet == expected
    assert any(name.startswith("predictor.") for name in changed) == ("predictor" in RECIPES[recipe])
    assert "question.embedding.weight" in changed
    assert "fusion.answer.1.weight" in changed


def test_a_conditioned_network_must_predict_something(tiny):
    with pytest.raises(InputError, match="cbn"):
        build_model(load_settings(tiny, ["cbn.gamma=false", "cbn.beta=false"]), 20, 10, pretrained=False)


def test_bfloat16_on_a_cpu_stays_near_float32(settings):
    model = build_model(settings, 20, 10, pretrained=False).eval()
    batch = example()
    with autocast(torch.device("cpu"), "bfloat16"):
        low = model(*batch)
    exact = model(*batch)
    torch.testing.assert_close(low.logits.float(), exact.logits, rtol=0.1, atol=0.05)
    torch.testing.assert_close(low.attention.float().sum((2, 3)), torch.ones(3, 1), rtol=0.02, atol=0.02)


WAYS = [
    [],
    ["attention.normalise=position"],
    ["attention.normalise=none"],
    ["attention.kind=mlb"],
    ["question.encoder=bag_of_words"],
    ["question.encoder=gru"],
    ["cbn.normaliser=group"],
    ["cbn.condition=image", "cbn.normaliser=adaptive"],
    ["backbone.statistics=batch"],
    ["inputs=[image]", "cbn.stages=[]"],
    ["inputs=[question]", "cbn.stages=[]"],
]


@pytest.mark.parametrize("words", WAYS, ids=" ".join)
@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_a_model_of_another_floating_type_answers_and_trains_in_it(tiny, words, kind, close):
    model = build_model(load_settings(tiny, words), 20, 10, pretrained=False).eval()
    images, tokens, lengths = example()
    expected = model(images, tokens, lengths)
    found = model.to(kind)(images.to(kind), tokens, lengths)
    assert found.logits.dtype == found.attention.dtype == kind
    torch.testing.assert_close(found.logits.float(), expected.logits, rtol=close, atol=close)
    model.train()(images.to(kind), tokens, lengths).logits.sum().backward()


def tensors_in(value, seen):
    """Every tensor that can be reached from a value, whether or not it is a parameter or a buffer."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part, seen)
    elif isinstance(value, nn.Module):
        yield from tensors_in(vars(value), seen)


def test_nothing_of_a_loaded_model_is_left_on_meta(trained):
    """Models are built on the meta device before their weights are loaded."""
    model = load_model(trained).model
    found = list(tensors_in(model, set()))
    assert len(found) > len(list(model.parameters()))
    assert not [tensor.shape for tensor in found if tensor.is_meta]
