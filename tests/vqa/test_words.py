"""Words and answers: tokenizer, answer classes, tables of questions, GloVe vectors."""

import dataclasses
import json
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer

from data.glove import read_glove
from data.h5_file import Store
from data.question_table import joined, question_table
from data.vqa_files import read_questions
from tests.conftest import fuzzed
from tests.raw_files import TRAIN, make
from vqa.io.errors import InputError
from vqa.text.answers import NO_ANSWER, NOT_GIVEN, answer_vocabulary
from vqa.text.tokenizer import PAD_ID, UNKNOWN_ID, encode, load_tokenizer, save_tokenizer, train_tokenizer, words


def test_padding_and_unknown_are_different_words(tmp_path):
    tokenizer = train_tokenizer(["what's the colour?", "the cat", "the cat"], 2)
    assert tokenizer.token_to_id("<pad>") == PAD_ID == 0
    assert tokenizer.token_to_id("<unk>") == UNKNOWN_ID == 1
    assert set(tokenizer.get_vocab()) == {"<pad>", "<unk>", "the", "cat"}
    tokens, lengths = encode(tokenizer, ["The cat barks", "", "?", "CAT"])
    assert lengths.tolist() == [3, 1, 1, 1]
    the, cat = tokenizer.token_to_id("the"), tokenizer.token_to_id("cat")
    assert tokens.tolist() == [the, cat, UNKNOWN_ID, UNKNOWN_ID, UNKNOWN_ID, cat]
    assert words(tokenizer, "What’s THE cat's-paw?") == ["what’s", "the", "cat's", "-", "paw", "?"]
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_words_are_those_of_the_whole_question():
    known = train_tokenizer(["what's the colour of σς é e ́ it?", "<pad> 3,000 a  b\tc\u3000d\x1fe"], 1)
    asked = [
        "What's  the\tcolour",
        "ΣΑΣ of ΟΣ?",
        "e\u0301 e \u0301",
        " é?<pad> <unk>it ",
        "a\u3000b\x1fc d\n?",
        "  ",
        "3,000!",
    ]
    tokens, lengths = encode(known, asked)
    whole = [known.encode(text).ids or [UNKNOWN_ID] for text in asked]
    assert lengths.tolist() == [len(ids) for ids in whole]
    assert tokens.tolist() == [id_ for ids in whole for id_ in ids]
    assert encode(known, [])[0].tolist() == []


@fuzzed(max_examples=60)
@given(st.lists(st.text("ab'’ é\u0301?<ΣσΑ1,\t\u3000") | st.text(max_size=9)), st.integers(1, 3))
def test_the_vocabulary_is_that_of_a_trainer(questions, min_count):
    ours = train_tokenizer(questions, min_count)
    theirs = Tokenizer(WordLevel(unk_token="<unk>"))
    theirs.normalizer, theirs.pre_tokenizer = ours.normalizer, ours.pre_tokenizer
    trainer = WordLevelTrainer(min_frequency=min_count, special_tokens=["<pad>", "<unk>"], show_progress=False)
    theirs.train_from_iterator(questions, trainer)
    assert ours.to_str() == theirs.to_str()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("आज मौसम कैसा है भाई?", ["आज", "मौसम", "कैसा", "है", "भाई", "?"]),
        ("İstanbul e\u0301x\u0323é's", ["i\u0307stanbul", "éx\u0323é's"]),
        ("می\u200cخواهم क्\u200dष", ["می\u200cخواهم", "क्\u200dष"]),
        ("สวัสดี ครับ", ["สวัสดี", "ครับ"]),
        ("❤\ufe0fabc 1\ufe0f\u20e3 \u0301", ["❤\ufe0f", "abc", "1\ufe0f\u20e3", "\u0301"]),
    ],
)
def test_words_keep_their_combining_marks(question, expected):
    tokenizer = train_tokenizer([question], 1)
    assert words(tokenizer, question) == expected
    assert encode(tokenizer, [question])[1].tolist() == [len(expected)]
    assert UNKNOWN_ID not in encode(tokenizer, [question])[0]


def test_special_tokens_are_never_made_from_text(tmp_path):
    from transformers import PreTrainedTokenizerFast

    questions = ["is <pad> there?", "<unk><pad>", "<PAD>"]
    tokenizer = train_tokenizer(questions, 1)
    save_tokenizer(tokenizer, tmp_path)
    for known in (tokenizer, load_tokenizer(tmp_path)):
        tokens, lengths = encode(known, questions)
        assert lengths.tolist() == [6, 6, 3]
        assert not {PAD_ID, UNKNOWN_ID} & set(tokens.tolist())
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(questions[1])["input_ids"] == tokens[6:12].tolist()
    assert (theirs.pad_token_id, theirs.unk_token_id) == (PAD_ID, UNKNOWN_ID)
    assert theirs("a dog")["input_ids"] == [UNKNOWN_ID, UNKNOWN_ID]


def test_a_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["pre_tokenizer"]["pattern"].update(Regex="(a+)+$"),
        lambda content: content.update(normalizer=None),
        lambda content: content.update(post_processor={"type": "ByteLevel", "add_prefix_space": True}),
        lambda content: content["added_tokens"].append({**content["added_tokens"][1], "id": 2, "content": "what"}),
        lambda content: content["model"].update(
            type="WordPiece", continuing_subword_prefix="", max_input_chars_per_word=9
        ),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(raw, tmp_path, edit):
    save_tokenizer(train_tokenizer(["what is it"], 1), tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    assert len(load_tokenizer(tmp_path).encode("what is it").ids) == 3
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json: (is not a tokenizer of this program|cannot be read)"):
        load_tokenizer(tmp_path)
    make(raw, tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as opened:
        opened["tokenizer"][()] = json.dumps(content)
    with pytest.raises(InputError, match="data.h5: (is not a tokenizer of this program|cannot be read)"):
        Store(tmp_path / "data.h5")


def test_answer_classes_are_normal_forms_in_their_commonest_spelling():
    answers = ["lamp, chair"] * 3 + ["lamp chair"] + ["2"] * 2 + ["two"] * 3 + ["a dog"] * 2 + ["b"] * 2 + [" ", ""]
    assert answer_vocabulary(answers, 3) == ["two", "lamp, chair", "b"]
    assert answer_vocabulary(answers, 100) == ["two", "lamp, chair", "b", "a dog"]


def test_a_table_keeps_what_was_asked_and_answered(raw):
    tokenizer = train_tokenizer([text for _, _, text, _ in TRAIN], 1)
    train = question_table(
        read_questions(raw["train"].questions, raw["train"].annotations), np.array([0, 0, 1]), tokenizer, ["2", "yes"]
    )
    assert train.labels().tolist() == [[NO_ANSWER] * 10, [0] * 10, [1] * 7 + [NO_ANSWER] * 3]
    assert train.answers(1) == ["2"] * 6 + ["two"] * 4
    assert tokenizer.decode(train.words(2).tolist()) == "is it day ?"
    unanswered, val = (
        question_table(read_questions(raw["val"].questions, answers), np.array([5, 5]), tokenizer, ["2", "yes"])
        for answers in (None, raw["val"].annotations)
    )
    tables = [dataclasses.replace(of, extras={"row": of.ids + 0.5}) for of in (train, unanswered, val, train)]
    whole = joined(tables)
    assert whole.ids.tolist() == [10, 11, 12, 20, 21, 20, 21, 10, 11, 12]
    assert whole.images.tolist() == [0, 0, 1, 5, 5, 5, 5, 0, 0, 1]
    assert [whole.answers(row) for row in (3, 5, 9)] == [[], ["lilac"] * 10, ["yes"] * 7 + ["no"] * 3]
    assert whole.labels()[8].tolist() == [0] * 10
    assert whole.labels()[3].tolist() == [NOT_GIVEN] * 10  # not given, and so no answer outside the vocabulary
    picked = whole.select(np.array([9, 3]))
    assert picked.ids.tolist() == [12, 20]
    assert picked.extras["row"].tolist() == [12.5, 20.5]
    assert picked.words(0).tolist() == train.words(2).tolist()
    assert picked.answers(0) == train.answers(2)


def test_glove_rows_of_known_words_only(tmp_path):
    text = "the 1 2 3\ncat 4 5 6\n. . . 7 8 9\nunknown 0 0 0\n"
    (tmp_path / "glove.txt").write_text(text)
    with zipfile.ZipFile(tmp_path / "glove.zip", "w") as archive:
        archive.writestr("glove.txt", text)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + b"cat 4 5 6\r\n. . . 7 8 9\r\n")
    (tmp_path / "word2vec.txt").write_text(f"4 3\n{text}")
    for name in ("glove.txt", "glove.zip", "windows.txt", "word2vec.txt"):
        vectors, found = read_glove(tmp_path / name, {"<pad>": 0, "cat": 1, ". . .": 2}, 3)
        assert found == 2
        assert vectors.tolist() == [[0, 0, 0], [4, 5, 6], [7, 8, 9]]


def test_a_word_with_two_vectors_counts_once(tmp_path):
    (tmp_path / "glove.txt").write_text("the 1 2\ncat 4 5\ncat 6 7\n")
    vectors, found = read_glove(tmp_path / "glove.txt", {"<pad>": 0, "cat": 1}, 2)
    assert found == 1
    assert vectors.tolist() == [[0, 0], [6, 7]]


def test_a_file_of_a_glove_archive_can_be_named(tmp_path):
    file = tmp_path / "glove.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("glove.2d.txt", "cat 1 2\n")
        archive.writestr("__MACOSX/._glove.2d.txt", b"\0\5\x16\7")
    assert read_glove(file, {"cat": 0}, 2)[1] == 1
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("all/glove.3d.txt", "cat 1 2 3\n")
    assert read_glove(file / "all/glove.3d.txt", {"cat": 0}, 3)[0].tolist() == [[1, 2, 3]]
    for asked in (file, file / "absent.txt"):
        with pytest.raises(InputError, match=r"question.glove=.*glove.zip/NAME; it holds glove.2d.txt, .*glove.3d.txt"):
            read_glove(asked, {"cat": 0}, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat 1 2\n", "line 1: expected a word and 3 numbers"),
        ("long.txt", b"cat 1 2 3 4 5\n", "its vectors have 5 numbers, question.glove_size is 3"),
        ("b.txt", b"the 1 2 3\ncat 1 x 3\n", "line 2"),
        ("c.txt", b"dog 1 2 3\n", "holds none of the 1 known words"),
        ("d.zip", b"no zip", "not a zip file"),
    ],
)
def test_wrong_glove_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_glove(tmp_path / name, {"cat": 0}, 3)
    with pytest.raises(InputError, match="no such file"):
        read_glove(tmp_path / "absent.txt", {"cat": 0}, 3)
