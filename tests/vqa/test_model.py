"""The question encoder, attention, fusion and the whole model: padding, conditioning, weights that sum to one."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.tasks.vqa import answer_loss, answer_targets
from experiments.training.optimiser import build_optimiser
from vqa import question
from vqa.attention import MLBAttention, SpatialAttention, attend, normalise_features
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.metrics import question_accuracy
from vqa.question import KINDS, QuestionEncoder, QuestionKinds
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings
from vqa.text.answers import NO_ANSWER, NOT_GIVEN
from vqa.text.tokenizer import PAD_ID


@pytest.fixture
def settings(tiny):
    return load_settings(tiny)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def example(batch=3, words=5, vocabulary=20):
    images = torch.randn(batch, 3, 64, 64)
    tokens = torch.randint(2, vocabulary, (batch, words))
    return images, tokens, torch.full((batch,), words)


def test_the_encoder_pads_as_the_tokenizer():
    assert question.PAD_ID == PAD_ID


@pytest.mark.parametrize("encoder", ["lstm", "gru", "bag_of_words"])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_changes_nothing(encoder, layers):
    model = QuestionEncoder(20, 8, 16, encoder=encoder, layers=layers, fixed_size=4)
    tokens = torch.randint(2, 20, (1, 4))
    expected = model(tokens, torch.tensor([4]))
    for junk in (0, 1, 7):
        padded = F.pad(tokens, (0, 3), value=junk)
        torch.testing.assert_close(model(padded, torch.tensor([4])), expected)
    assert not torch.allclose(model(tokens, torch.tensor([3])), expected)


def test_the_embedding_is_the_last_valid_state_of_packed_sequences():
    model = QuestionEncoder(20, 8, 16, encoder="lstm", layers=2)
    tokens, lengths = torch.randint(2, 20, (4, 6)), torch.tensor([6, 1, 3, 5])
    packed = nn.utils.rnn.pack_padded_sequence(model.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
    _, (state, _) = model.recurrent(packed)
    torch.testing.assert_close(model(tokens, lengths), state[-1])


def test_fixed_vectors_are_read_and_never_trained():
    model = QuestionEncoder(6, 3, 4, encoder="lstm", layers=1, fixed_size=2)
    tokens, lengths = torch.tensor([[2, 3]]), torch.tensor([2])
    before = model(tokens, lengths)
    model.set_fixed(torch.randn(6, 2))
    assert not torch.allclose(model(tokens, lengths), before)
    model(tokens, lengths).sum().backward()
    assert model.fixed.weight.grad is None


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


def test_feature_normalisation():
    features = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(normalise_features(features, "map", 2.0).flatten(1).norm(dim=1), torch.full((2,), 2.0))
    torch.testing.assert_close(normalise_features(features, "position", 8.0).norm(dim=1), torch.full((2, 3, 3), 8.0))
    assert torch.equal(normalise_features(features, "none", 1.0), features)


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


def test_the_baseline_hears_the_question_only_after_the_resnet(tiny):
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
    from vqa.io.errors import InputError

    with pytest.raises(InputError, match="cbn"):
        build_model(load_settings(tiny, ["cbn.gamma=false", "cbn.beta=false"]), 20, 10, pretrained=False)


def test_soft_targets_clip_counts_at_three():
    labels = torch.tensor([[0] * 8 + [1] * 2, [2] * 10, [0] + [NO_ANSWER] * 9, [NO_ANSWER] * 10])
    targets = answer_targets(labels, 4, "soft")
    torch.testing.assert_close(targets, torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]]))


@pytest.mark.parametrize(
    "given", [["a"] * 10, ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["other"], ["a", "b", "b"], ["other", "a"], ["a"]]
)
def test_bce_sums_over_answers_with_the_official_accuracy_of_each_as_its_target(given):
    answers = ["a", "b", "c", "d"]
    labels = [answers.index(answer) if answer in answers else NO_ANSWER for answer in given]
    labels = torch.tensor([labels + [NOT_GIVEN] * (10 - len(given))] * 2)
    targets = torch.tensor([[question_accuracy(answer, given) for answer in answers]] * 2)
    torch.testing.assert_close(answer_targets(labels, 4, "bce"), targets)
    logits = torch.tensor([[3.0, -2.0, 0.5, 0.0], [0.0, 1.0, -90.0, 90.0]])
    summed = nn.BCEWithLogitsLoss(reduction="sum")
    expected = torch.stack([summed(logits[row], targets[row]) for row in range(2)])
    torch.testing.assert_close(answer_loss(logits, labels, "bce", "none"), expected)
    torch.testing.assert_close(answer_loss(logits, labels, "bce"), expected.mean())


def test_hard_targets_are_the_most_common_answer():
    labels = torch.tensor([[0] * 4 + [1] * 6, [NO_ANSWER] * 9 + [3], [NO_ANSWER] * 10])
    assert answer_targets(labels, 4, "hard").tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_bfloat16_on_a_cpu_stays_near_float32(settings):
    from vqa.devices import autocast

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


def model_of(tiny, *words):
    torch.manual_seed(0)
    model = build_model(load_settings(tiny, words), 20, 5, pretrained=False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_bag_of_words_knows_no_order():
    model = QuestionEncoder(20, 8, 16, encoder="bag_of_words", layers=1)
    tokens = torch.randint(2, 20, (1, 4))
    lengths = torch.tensor([4])
    torch.testing.assert_close(model(tokens.flip(1), lengths), model(tokens, lengths))
    expected = torch.tanh(model.bag(model.embedding(tokens).mean(1)))
    torch.testing.assert_close(model(tokens, lengths), expected)


def test_a_kind_is_the_first_two_words():
    kinds = QuestionKinds()
    kinds.set_from(torch.tensor([[5, 6], [5, 6], [5, 6], [7, 0], [7, 0], [8, 9]]))
    asked = torch.tensor([[5, 6, 2], [8, 9, 3], [7, 0, 0], [5, 7, 2], [6, 5, 2]])
    assert kinds(asked).tolist() == [0, 2, 1, KINDS, KINDS]
    assert kinds(torch.tensor([[7]])).tolist() == [1]
    assert kinds(torch.tensor([[4]])).tolist() == [KINDS]


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


def test_a_loaded_model_predicts_the_same_deltas_in_one_product_as_one_by_one(trained):
    model = load_model(trained).model
    hidden = torch.randn(3, len(model.predictor.gamma.hidden_bias))
    for mlps in (model.predictor.gamma, model.predictor.beta):
        torch.testing.assert_close(mlps._in_one_product(hidden), mlps._one_by_one(hidden))
