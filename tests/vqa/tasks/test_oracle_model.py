"""The oracle's model: its inputs, its views, and a ResNet that is torchvision's until it is modulated."""

import pytest
import torch
from torchvision.models import resnet18

from tests.conftest import ROOT
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings

SMALL = [
    *("backbone.name=resnet10", "backbone.weights=none", "data.image_size=32", "cbn.hidden_size=4"),
    *("question.embedding_size=8", "question.hidden_size=12", "answer.hidden_size=16", "guesswhat.category_size=6"),
]
ALL = "[crop, image, spatial, category, question]"


def model_of(*words, seed=0):
    settings = load_settings(ROOT / "config" / "guesswhat" / "cbn.yaml", [*SMALL, *words])
    torch.manual_seed(seed)
    return build_model(settings, 20, 3, pretrained=False, categories=5).eval()


def example(batch=3, views=1):
    torch.manual_seed(1)
    return {
        "images": torch.randn(batch * views, 3, 32, 32),
        "tokens": torch.randint(2, 20, (batch, 4)),
        "lengths": torch.full((batch,), 4),
        "spatial": torch.rand(batch, 8),
        "category": torch.arange(batch),
    }


def moved_by(model, asked, name, change):
    """Whether the answers move when one argument does."""
    return not torch.equal(model(**asked).logits, model(**asked | {name: change(asked[name])}).logits)


@pytest.mark.parametrize("inputs", ["crop", "image", "spatial", "category", "question"])
def test_a_model_takes_its_inputs_and_no_other(inputs):
    model, asked = model_of(f"inputs=[{inputs}]", "cbn.stages=[]"), example()
    changes = {
        "images": lambda images: images + torch.randn_like(images),
        "tokens": lambda tokens: tokens.flip(0),
        "spatial": lambda spatial: -spatial,
        "category": lambda category: category + 1,
    }
    of = {"crop": "images", "image": "images", "question": "tokens"}.get(inputs, inputs)
    assert {name for name, change in changes.items() if moved_by(model, asked, name, change)} == {of}
    assert model(**asked).logits.shape == (3, 3)
    assert model(**asked).attention is None


def test_without_a_view_the_resnet_does_not_compute():
    model, asked = model_of("inputs=[spatial, category, question]", "cbn.stages=[]"), example()
    model.resnet.register_forward_hook(lambda *_: pytest.fail("the ResNet was used"))
    assert model(**asked | {"images": None}).logits.isfinite().all()


def test_the_crop_moves_with_the_question_and_zero_deltas_are_torchvisions_network():
    model, asked = model_of("inputs=[crop, question]", "backbone.name=resnet18"), example()
    plain = resnet18()
    plain.load_state_dict(
        {name.replace("network.", ""): value for name, value in model.resnet.state_dict().items()}, strict=False
    )
    assert plain.fc.in_features == model.resnet.channels
    features = torch.nn.Sequential(*list(plain.eval().children())[:-1], torch.nn.Flatten())(asked["images"])
    seen = []
    model.fusion.register_forward_pre_hook(lambda _module, parts: seen.append(parts[0][1]))
    model(**asked, modulate=False)
    torch.testing.assert_close(seen[0], features, rtol=1e-4, atol=1e-4)
    for part in (model.predictor.gamma, model.predictor.beta):
        for value in (part.weight, part.bias):
            torch.nn.init.normal_(value, std=0.05)
    model(**asked)
    model(**asked | {"tokens": asked["tokens"].flip(0)})
    assert not torch.allclose(seen[1], seen[2])
    for part in (model.predictor.gamma, model.predictor.beta):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    model(**asked)
    torch.testing.assert_close(seen[3], features, rtol=1e-4, atol=1e-4)


def test_two_views_share_the_network_and_the_modulation():
    model, asked = model_of(f"inputs={ALL}"), example(views=2)
    seen = []
    model.fusion.register_forward_pre_hook(lambda _module, parts: seen.append(parts[0][1]))
    output = model(**asked)
    views = asked["images"].view(3, 2, 3, 32, 32)
    each = [model.resnet(views[:, view], output.modulation).mean((2, 3)) for view in (0, 1)]
    torch.testing.assert_close(seen[0], torch.cat(each, 1))
    assert not torch.allclose(*each)


def test_shared_images_are_the_same_images():
    """Two questions have the same whole image, which is stored once."""
    model, asked = model_of(f"inputs={ALL}"), example(views=2)
    asked["images"][3] = asked["images"][1]
    places = torch.tensor([[0, 1], [2, 1], [3, 4]])
    shared = asked | {"images": asked["images"][[0, 1, 2, 4, 5]], "places": places}
    torch.testing.assert_close(model(**shared).logits, model(**asked).logits)
    one = model_of("inputs=[crop, question]")
    asked = example()
    repeated = asked | {"images": asked["images"][[0, 0, 1]]}
    shared = asked | {"images": asked["images"][:2], "places": torch.tensor([0, 0, 1])}
    torch.testing.assert_close(one(**shared).logits, one(**repeated).logits)


def test_a_batch_is_its_samples_in_any_order():
    model, asked = model_of(f"inputs={ALL}"), example(views=2)
    together = model(**asked).logits
    for sample in range(3):
        alone = {name: value[sample : sample + 1] for name, value in asked.items()}
        alone["images"] = asked["images"][2 * sample : 2 * sample + 2]
        torch.testing.assert_close(model(**alone).logits, together[sample : sample + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", ["kind", "constant", "mean_question", "shuffled"])
def test_the_controls_are_those_of_vqa(condition):
    model, asked = model_of("inputs=[crop, question]", f"cbn.condition={condition}"), example()
    assert model(**asked).modulation.gamma.shape[0] == 3


def test_conditioned_on_the_image_each_view_has_deltas_of_its_own():
    model, asked = model_of(f"inputs={ALL}", "cbn.condition=image"), example(views=2)
    deltas = model(**asked).modulation.gamma
    assert len(deltas) == 6
    places = torch.tensor([[0, 1], [2, 3], [4, 5]])
    torch.testing.assert_close(model(**asked, places=places).modulation.gamma, deltas)
    alone = model(**{name: value[:2] if name == "images" else value[:1] for name, value in asked.items()})
    torch.testing.assert_close(alone.modulation.gamma, deltas[:2])
    assert not torch.allclose(deltas[0], deltas[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inputs=[crop, spatial]"], "inputs: a model of crop and spatial alone has nothing to condition"),
        (["inputs=[spatial, category, question]"], "nothing to condition; set cbn.stages="),
        (
            ["inputs=[spatial, question]", "cbn.stages=[]", "backbone.train=stage4"],
            "backbone.train: a model that is given no image does not use its ResNet",
        ),
        (
            ["guesswhat=null", "inputs=[question]", "cbn.stages=[]", "backbone.train=batchnorm"],
            "backbone.train: a model that is given no image",
        ),
        (["guesswhat=null"], "category, crop, spatial belongs to the task guesswhat"),
    ],
)
def test_what_makes_no_sense_is_refused(words, says):
    with pytest.raises(InputError, match=says):
        model_of(*words)


@pytest.mark.parametrize("train", ["stage4", "batchnorm", "none"])
def test_only_what_the_recipe_names_is_trained(train):
    model = model_of("inputs=[crop, question]", "cbn.stages=[]", f"backbone.train={train}").train()
    model(**example()).logits.square().sum().backward()
    moved = {name for name, value in model.resnet.named_parameters() if value.grad is not None}
    expected = {
        "none": set(),
        "stage4": {name for name, _ in model.resnet.named_parameters() if "layer4" in name},
        "batchnorm": {name for name, value in model.resnet.named_parameters() if value.dim() == 1},
    }
    assert moved == expected[train]
