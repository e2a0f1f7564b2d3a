"""The question encoders: padding, packed sequences, fixed vectors, bags of words, kinds of questions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqa import question
from vqa.question import KINDS, QuestionEncoder, QuestionKinds, TextEncoder
from vqa.text.tokenizer import PAD_ID


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


def test_unknown_encoders_and_poolings_are_refused():
    with pytest.raises(ValueError, match="unknown 'LSTM'; there are lstm, gru, bag_of_words"):
        QuestionEncoder(20, 8, 16, encoder="LSTM", layers=1)
    with pytest.raises(ValueError, match="unknown 'first'; there are last, mean"):
        TextEncoder(nn.Identity(), 16, pooling="first", frozen=True)


def test_the_embedding_is_the_last_valid_state_of_packed_sequences():
    model = QuestionEncoder(20, 8, 16, encoder="lstm", layers=2)
    tokens, lengths = torch.randint(2, 20, (4, 6)), torch.tensor([6, 1, 3, 5])
    packed = nn.utils.rnn.pack_padded_sequence(model.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
    _, (state, _) = model.recurrent(packed)
    torch.testing.assert_close(model(tokens, lengths), state[-1])


@pytest.mark.parametrize(("encoder", "forget"), [("lstm", [0, 1, 0, 0]), ("gru", [0, 0, 0])])
def test_recurrent_layers_start_gate_by_gate(encoder, forget):
    """In the order of torch's gates, input, forget, cell, output: 1 is the bias of the forget gate alone."""
    recurrent = QuestionEncoder(20, 8, 16, encoder=encoder, layers=2).recurrent
    for layer, size in ((0, 8), (1, 16)):
        biases = getattr(recurrent, f"bias_ih_l{layer}") + getattr(recurrent, f"bias_hh_l{layer}")
        assert torch.equal(biases.view(-1, 16), torch.tensor(forget).float()[:, None].expand(-1, 16))
        for gate in getattr(recurrent, f"weight_hh_l{layer}").split(16):
            torch.testing.assert_close(gate @ gate.T, torch.eye(16))
        bound = (6 / (size + 16)) ** 0.5  # Glorot's, of a uniform distribution
        for gate in getattr(recurrent, f"weight_ih_l{layer}").split(16):
            assert 0.9 * bound < gate.abs().max() <= bound


def test_fixed_vectors_are_read_and_never_trained():
    model = QuestionEncoder(6, 3, 4, encoder="lstm", layers=1, fixed_size=2)
    tokens, lengths = torch.tensor([[2, 3]]), torch.tensor([2])
    before = model(tokens, lengths)
    model.set_fixed(torch.randn(6, 2))
    assert not torch.allclose(model(tokens, lengths), before)
    model(tokens, lengths).sum().backward()
    assert model.fixed.weight.grad is None


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
