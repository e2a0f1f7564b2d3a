"""Text encoders of `transformers`: their tokens, e_q whatever the padding, what is frozen, what is refused."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from tests.tiny_encoder import SIZE, WORDS, write_encoder
from vqa.io.errors import InputError
from vqa.question import TextEncoder
from vqa.settings.recipes import load_settings
from vqa.text.encoder import LONGEST, _quiet, check_tokenizer, empty_encoder, load_encoder, read_pretrained
from vqa.text.tokenizer import encode, load_tokenizer, save_tokenizer, special_ids, words

KINDS = ("bert", "roberta", "gpt2", "t5")
QUESTIONS = ["what?", "what color is the reds circle?", "How many  are there [SEP] left of the <pad> zebra?", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(write_encoder(tmp_path_factory.mktemp("encoders") / kind, kind)) for kind in KINDS}


def embed(encoder, tokenizer, questions):
    """e_q of questions in one batch, padded."""
    tokens, lengths = encode(tokenizer, questions)
    rows = torch.from_numpy(tokens).long().split(lengths.tolist())
    return encoder(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.from_numpy(lengths).long())


def question_encoder(folder, hidden_size=SIZE, pooling="mean", frozen=True):
    return TextEncoder(load_encoder(folder), hidden_size, pooling=pooling, frozen=frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_changes_nothing_and_the_states_are_the_encoders(folders, kind, pooling):
    encoder = question_encoder(folders[kind], pooling=pooling).eval()
    tokenizer, _ = read_pretrained(folders[kind])
    together = embed(encoder, tokenizer, QUESTIONS)
    alone = torch.cat([embed(encoder, tokenizer, [text]) for text in QUESTIONS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    theirs = AutoModel.from_pretrained(folders[kind]).eval()
    theirs = theirs.get_encoder() if kind == "t5" else theirs
    states = theirs(AutoTokenizer.from_pretrained(folders[kind])(QUESTIONS[1], return_tensors="pt")["input_ids"])[0][0]
    expected = states.mean(0) if pooling == "mean" else states[-1]
    torch.testing.assert_close(together[1], expected, rtol=1e-4, atol=1e-5)


def test_another_size_is_mapped_linearly(folders):
    tokenizer, _ = read_pretrained(folders["bert"])
    plain, mapped = (question_encoder(folders["bert"], hidden_size=size).eval() for size in (SIZE, 24))
    expected = mapped.projection(embed(plain, tokenizer, QUESTIONS))
    torch.testing.assert_close(embed(mapped, tokenizer, QUESTIONS), expected, rtol=1e-4, atol=1e-5)
    assert not list(plain.projection.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_has_neither_gradients_nor_dropout(folders, frozen):
    encoder, (tokenizer, _) = question_encoder(folders["bert"], 24, frozen=frozen), read_pretrained(folders["bert"])
    encoder.train()
    assert encoder.encoder.training is not frozen
    assert embed(encoder, tokenizer, QUESTIONS).equal(embed(encoder, tokenizer, QUESTIONS)) is frozen
    embed(encoder, tokenizer, QUESTIONS).sum().backward()
    for name, parameter in encoder.named_parameters():
        trained = name.startswith("projection.") or not frozen
        assert (parameter.grad is not None) is trained, name  # of all: averaging gradients needs each one
    assert not any(module.training for module in encoder.eval().modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_buffer_is_among_the_weights(folders, kind):
    """Models are built without memory: a buffer that is not saved would be garbage."""
    encoder, configuration = load_encoder(folders[kind]), read_pretrained(folders[kind])[1]
    assert {name for name, _ in encoder.named_buffers()} <= encoder.state_dict().keys()
    with torch.device("meta"):
        empty = empty_encoder(json.loads(json.dumps(configuration)), "test")
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.to_empty(device="cpu")
    empty.load_state_dict(encoder.state_dict())
    ids = torch.tensor([[4, 5, 6]])
    assert empty.eval()(ids)[0].equal(encoder(ids)[0])


def test_its_tokenizer_is_kept_whole(folders, tmp_path):
    for kind in KINDS:
        theirs = AutoTokenizer.from_pretrained(folders[kind], split_special_tokens=True)
        tokenizer, _ = read_pretrained(folders[kind])
        save_tokenizer(tokenizer, tmp_path / kind)
        kept = load_tokenizer(tmp_path / kind, ours=False)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        longest = tokenizer.truncation["max_length"]
        for text in QUESTIONS[:3]:
            ids = encode(kept, [text])[0].tolist()
            assert ids == theirs(text, truncation=True, max_length=longest)["input_ids"], (kind, text)
            assert ids == again(text, truncation=True)["input_ids"], (kind, text)
        tokens, lengths = encode(kept, QUESTIONS)
        assert lengths.sum() == len(tokens)
        assert lengths.min() >= 1
    expected = "how many are there [ sep ] left of the < pad > zebra ?"
    assert words(kept, QUESTIONS[2]) == expected.split()


@pytest.mark.parametrize(
    "called",
    [
        {"padding": "max_length", "max_length": 30, "truncation": True},
        {"max_length": 5, "truncation": True},
        {"padding": False, "truncation": False},
    ],
    ids=str,
)
def test_the_librarys_last_call_changes_no_words(folders, tmp_path, called):
    """`transformers` saves a tokenizer with the options that it was called with."""
    tokenizer, configuration = read_pretrained(folders["bert"])
    save_tokenizer(tokenizer, tmp_path / "kept")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "kept")
    theirs(QUESTIONS[0], **called)
    theirs.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again", ours=False)
    check_tokenizer(again, configuration, "test")
    asked = [*QUESTIONS, "what " * 1000]
    for ours, others in zip(encode(tokenizer, asked), encode(again, asked), strict=True):
        assert np.array_equal(ours, others)


def test_what_stands_for_no_word_is_known(folders):
    tokenizer, _ = read_pretrained(folders["bert"])
    assert special_ids(tokenizer) == [0, 1, 2, 3]
    tokens, _ = encode(tokenizer, ["[SEP] zebra"])
    assert np.isin(tokens, special_ids(tokenizer)).all(), "all of its words are unknown"
    assert encode(tokenizer, ["reds"])[0].tolist() == [2, *(4 + WORDS.index(part) for part in ("re", "##d", "##s")), 3]


@pytest.mark.parametrize(("kind", "longest"), [("bert", 38), ("roberta", 22), ("gpt2", 38), ("t5", LONGEST)])
def test_long_questions_are_cut_to_what_the_encoder_takes(folders, kind, longest):
    tokenizer, _ = read_pretrained(folders[kind])
    tokens, lengths = encode(tokenizer, ["what " * 1000])
    assert lengths.tolist() == [longest]
    if kind != "gpt2":
        assert tokens[-1] == 3, "its end is kept"
    assert embed(question_encoder(folders[kind]), tokenizer, ["what " * 1000]).isfinite().all()


def test_it_prints_nothing_and_leaves_the_librarys_settings(folders, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    read_pretrained(folders["t5"])
    load_encoder(folders["t5"])
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_threads_leave_the_librarys_verbosity():
    before, (begun, met, ended) = logging.get_verbosity(), (threading.Event() for _ in range(3))

    def first():
        with _quiet("first"):
            begun.set()
            met.wait(0.3)

    def second():
        begun.wait()
        with _quiet("second"):
            met.set()
            ended.wait()

    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(first), pool.submit(second)
        others[0].result()
        ended.set()
        others[1].result()
    assert logging.get_verbosity() == before


def broken(folder, tmp_path, **changed):
    made = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | changed))
    return made


def test_one_line_says_what_is_wrong_with_a_folder(folders, tmp_path):
    def told(name, function=read_pretrained):
        with pytest.raises(InputError) as refused:
            function(str(name))
        assert str(refused.value).startswith(f"question.text_encoder: {name}: ")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert told(tmp_path / "absent").endswith("no such folder")
    assert told("./absent").endswith("no such folder")
    (tmp_path / "empty").mkdir()
    assert "cannot be read as a text encoder" in told(tmp_path / "empty")
    last = 3 + len(WORDS)
    other = broken(folders["bert"], tmp_path, vocab_size=last)
    assert f"its tokenizer has ids up to {last}, the encoder only {last} tokens" in told(other)
    assert "cannot be read as a text encoder" in told(other, load_encoder)
    shutil.rmtree(other)
    deeper = broken(folders["bert"], tmp_path, num_hidden_layers=3)
    assert "weights are missing: encoder.layer.2" in told(deeper, load_encoder)
    (deeper / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    assert "cannot be read as a text encoder" in told(deeper, load_encoder)
    for configuration in ({}, {"model_type": "absent"}, {"model_type": "bert", "hidden_size": "x"}):
        with pytest.raises(InputError, match="here: no configuration of a text encoder"):
            empty_encoder(configuration, "here")


def test_without_a_network_a_name_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("We couldn't connect\nCheck your internet connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fails)
    with pytest.raises(InputError) as refused:
        read_pretrained("us/absent")
    assert str(refused.value) == (
        "question.text_encoder: us/absent: no such folder, and as a name on the Hub cannot be read as a text encoder "
        "(We couldn't connect)"
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["question.encoder=transformers"],
            "question.text_encoder: encoder transformers needs a model's name or folder",
        ),
        (
            ["question.text_encoder=x"],
            "question.text_encoder: only encoder transformers uses it; for lstm it must be null",
        ),
        (
            ["question.encoder=transformers", "question.text_encoder=x", "question.glove=y.txt"],
            "question.glove: encoder transformers has its own word vectors; it must be null",
        ),
        (
            ["question.encoder=transformers", "question.text_encoder=x", "cbn.condition=kind"],
            "cbn.condition: kind needs whole words; question.encoder transformers uses parts of words",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else " ",
)
def test_settings_that_mean_nothing_together_are_refused(tiny, given, says):
    with pytest.raises(InputError) as refused:
        load_settings(tiny, given)
    assert str(refused.value) == f"command line: {says}"
