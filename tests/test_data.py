"""Raw files to batches: readers, words, answers, GloVe, the h5 file, and the order of the questions."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from data import store
from data.answers import answer_vocabulary
from data.errors import InputError
from data.glove import read_glove
from data.images import Preprocessing, decode_image
from data.loading import EpochSampler, FileImages, InOrderSampler, QuestionDataset, make_loader
from data.preprocess import preprocess
from data.store import H5Images, Store
from data.table import NO_ANSWER, joined, question_table
from data.tokenizer import PAD_ID, UNKNOWN_ID, encode, load_tokenizer, save_tokenizer, train_tokenizer, words
from data.vqa_files import Question, SplitFiles, read_questions
from tests.conftest import ROOT

# ---- official files


def write_split(folder: Path, name: str, entries, annotated=True) -> SplitFiles:
    """Writes official files of (question id, image id, question, answers)."""
    questions = [{"question_id": q, "image_id": i, "question": text} for q, i, text, _ in entries]
    annotations = [
        {
            "question_id": q,
            "image_id": i,
            "question_type": text.split()[0] if text else "",
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
        }
        for q, i, text, answers in entries
    ]
    (folder / f"{name}_q.json").write_text(json.dumps({"questions": questions}))
    (folder / f"{name}_a.json").write_text(json.dumps({"annotations": annotations}))
    for i in {entry[1] for entry in entries}:
        Image.new("RGB", (40, 30), (i % 256, 0, 100)).save(folder / f"{name}_{i:012d}.png")
    pattern = str(folder / (name + "_{image_id:012d}.png"))
    return SplitFiles(folder / f"{name}_q.json", folder / f"{name}_a.json" if annotated else None, pattern)


TRAIN = [
    (10, 1, "What colour is the cat?", ["black"] * 10),
    (11, 1, "How many cats are there?", ["2"] * 6 + ["two"] * 4),
    (12, 2, "Is it day?", ["yes"] * 7 + ["no"] * 3),
]
VAL = [(20, 3, "What zebra is the cat?", ["lilac"] * 10), (21, 3, "", ["yes"] * 10)]


@pytest.fixture
def raw(tmp_path):
    return {"train": write_split(tmp_path, "train", TRAIN), "val": write_split(tmp_path, "val", VAL)}


def make(splits, path, **changed):
    settings = {"image_size": 32, "min_word_count": 1, "answers": 10, "skip_bad_images": False, "processes": 1}
    preprocess(splits, path, **(settings | changed))


def test_questions_are_joined_with_their_annotations(raw):
    first, second, _ = read_questions(raw["train"].questions, raw["train"].annotations)
    assert first == Question(10, 1, "What colour is the cat?", "What", "other", ("black",) * 10)
    assert second.answers[-1] == "two"
    assert read_questions(raw["train"].questions, None)[0] == Question(10, 1, "What colour is the cat?")


def change(file: Path, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["questions"].pop(0), "train_q.json: no entry for 1 question"),
        (lambda c: c["questions"].append({"question_id": 99, "image_id": 1, "question": "?"}), "train_a.json: .*99"),
        (lambda c: c["questions"].append(c["questions"][0]), "question_id 10 occurs twice"),
        (lambda c: c["questions"][1].pop("question"), r"questions\[1\] needs 'question' \(str\), got None"),
        (lambda c: c["questions"][1].update(image_id="1"), r"questions\[1\] needs 'image_id' \(int\)"),
        (lambda c: c["questions"][0].update(image_id=7), "annotation of question 10: image_id 1"),
        (lambda c: c["questions"][0].update(question="a\0b"), "has a question that cannot be stored"),
        (lambda c: c["questions"][0].update(question="\ud800"), "has a question that cannot be stored"),
        (lambda c: c["questions"][0].update(image_id=10**30), "has a image_id that cannot be stored"),
        (lambda c: c["questions"].clear(), "the list 'questions' is empty"),
        (lambda c: c.pop("questions"), "not an official VQA file"),
    ],
)
def test_wrong_question_files_are_named(raw, edit, message):
    change(raw["train"].questions, edit)
    with pytest.raises(InputError, match=message):
        read_questions(raw["train"].questions, raw["train"].annotations)


def test_malformed_json_is_named_with_its_line(raw):
    raw["train"].questions.write_text('{"questions": [\n{"question_id": 1,}\n]}')
    with pytest.raises(InputError, match="train_q.json: line 2"):
        read_questions(raw["train"].questions, None)
    with pytest.raises(InputError, match="absent.json: no such file"):
        read_questions(Path("absent.json"), None)


def test_a_pattern_without_an_image_id_is_refused():
    with pytest.raises(InputError, match="image_id"):
        SplitFiles(Path("q"), None, "images/{id}.jpg").image(3)
    with pytest.raises(InputError, match="image_id"):
        SplitFiles(Path("q"), None, "images/one.jpg").image(3)
    for pattern in ("{image_id.x}", "{image_id[0]}", "{image_id:x y}", "{"):
        with pytest.raises(InputError, match="image_id"):
            SplitFiles(Path("q"), None, pattern).image(3)
    files = SplitFiles(Path("q"), None, "val2014/COCO_val2014_{image_id:012d}.jpg")
    assert files.image(42) == Path("val2014/COCO_val2014_000000000042.jpg")


# ---- words and answers


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


def test_transformers_loads_the_tokenizer(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_tokenizer(["what colour is the cat?"], 1)
    save_tokenizer(tokenizer, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    asked = "What colour is the dog?"
    assert theirs(asked)["input_ids"] == tokenizer.encode(asked).ids
    assert (theirs.pad_token_id, theirs.unk_token_id) == (PAD_ID, UNKNOWN_ID)


def test_a_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_answer_classes_are_normal_forms_in_their_commonest_spelling():
    answers = ["lamp, chair"] * 3 + ["lamp chair"] + ["2"] * 2 + ["two"] * 3 + ["b"] * 2 + ["a dog"] * 2 + [" ", ""]
    assert answer_vocabulary(answers, 3) == ["two", "lamp, chair", "b"]
    assert answer_vocabulary(answers, 100) == ["two", "lamp, chair", "b", "a dog"]


def test_a_table_keeps_what_was_asked_and_answered(raw):
    tokenizer = train_tokenizer([text for _, _, text, _ in TRAIN], 1)
    train = question_table(
        read_questions(raw["train"].questions, raw["train"].annotations), {1: 0, 2: 1}, tokenizer, ["2", "yes"]
    )
    assert train.labels().tolist() == [[NO_ANSWER] * 10, [0] * 10, [1] * 7 + [NO_ANSWER] * 3]
    assert train.answers(1) == ["2"] * 6 + ["two"] * 4
    assert tokenizer.decode(train.words(2).tolist()) == "is it day ?"
    unanswered = question_table(read_questions(raw["val"].questions, None), {3: 5}, tokenizer, ["2", "yes"])
    both = joined([train, unanswered, train])
    assert both.ids.tolist() == [10, 11, 12, 20, 21, 10, 11, 12]
    assert both.images.tolist() == [0, 0, 1, 5, 5, 0, 0, 1]
    assert [both.answers(row) for row in (0, 3, 7)] == [["black"] * 10, [], ["yes"] * 7 + ["no"] * 3]
    assert both.labels()[6].tolist() == [0] * 10
    picked = both.select(np.array([7, 3]))
    assert picked.ids.tolist() == [12, 20]
    assert picked.words(0).tolist() == train.words(2).tolist()
    assert picked.answers(0) == train.answers(2)


def test_glove_rows_of_known_words_only(tmp_path):
    text = "the 1 2 3\ncat 4 5 6\n. . . 7 8 9\nunknown 0 0 0\n"
    (tmp_path / "glove.txt").write_text(text)
    with zipfile.ZipFile(tmp_path / "glove.zip", "w") as archive:
        archive.writestr("glove.txt", text)
    for name in ("glove.txt", "glove.zip"):
        vectors, found = read_glove(tmp_path / name, {"<pad>": 0, "cat": 1, ". . .": 2}, 3)
        assert found == 2
        assert vectors.tolist() == [[0, 0, 0], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat 1 2\n", "line 1: expected a word and 3 numbers"),
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


# ---- images


def test_images_are_plainly_resized_rgb(tmp_path):
    picture = Image.new("RGB", (90, 30))
    picture.paste((255, 0, 0), (0, 0, 45, 30))
    picture.paste((0, 0, 255), (45, 0, 90, 30))
    picture.save(tmp_path / "wide.png")
    pixels = decode_image(tmp_path / "wide.png", 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels[16, 4].tolist() == [255, 0, 0]
    assert pixels[16, 28].tolist() == [0, 0, 255]
    for mode in ("L", "CMYK", "P"):
        picture.convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        assert decode_image(next(tmp_path.glob(f"{mode}.*")), 16).shape == (16, 16, 3)


def test_sixteen_bits_a_pixel_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = decode_image(tmp_path / "deep.png", 64)
    assert abs(pixels.mean() - 127.5) < 2


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_images_are_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(InputError, match="bad.jpg: cannot be read as an image"):
        decode_image(tmp_path / "bad.jpg", 16)


def test_normalisation_is_torchvisions(tmp_path):
    from torchvision.transforms.v2.functional import normalize, to_dtype

    preprocessing = Preprocessing(8)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = normalize(to_dtype(images.permute(0, 3, 1, 2), scale=True), preprocessing.mean, preprocessing.std)
    torch.testing.assert_close(preprocessing.normalise(images), expected, rtol=1e-5, atol=1e-5)
    preprocessing.save(tmp_path / "p.json")
    assert Preprocessing.load(tmp_path / "p.json") == preprocessing
    good = {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "bilinear"}
    for wrong in ({"size": "big"}, {"mean": [0, 0]}, {"std": [1, 0, 1]}, {"resize": "nearest"}, {"std": None}):
        (tmp_path / "p.json").write_text(json.dumps(good | wrong))
        with pytest.raises(InputError, match="p.json"):
            Preprocessing.load(tmp_path / "p.json")


# ---- the h5 file


def test_the_file_holds_everything_and_where_it_came_from(raw, tmp_path, capsys):
    path = tmp_path / "data.h5"
    make(raw, path)
    with h5py.File(path) as file:
        assert file.attrs["complete"]
        assert file["images/pixels"].dtype == np.uint8
        assert file["images/pixels"].shape == (3, 32, 32, 3)
        assert file["images/pixels"].chunks is None
    opened = Store(path)
    assert opened.splits == ["train", "val"]
    train, val = opened.table("train"), opened.table("val")
    assert train.ids.tolist() == [10, 11, 12]
    assert train.images.tolist() == [0, 0, 1]
    assert val.texts == ["What zebra is the cat?", ""]
    assert val.lengths.tolist() == [6, 1]
    assert train.question_types == ["What", "How", "Is"]
    assert opened.vocabulary == ["2", "black", "yes", "no"]
    sources = opened.provenance["sources"]["train"]["files"]
    assert sources[0]["name"] == "train_q.json"
    assert sources[0]["bytes"] == raw["train"].questions.stat().st_size
    assert len(sources[1]["sha256"]) == 64
    image = H5Images(path)[1]
    assert np.array_equal(image, decode_image(raw["train"].image(2), 32))
    capsys.readouterr()
    make(raw, path)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_vocabularies_are_of_the_training_split_only(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    opened = Store(tmp_path / "data.h5")
    assert "zebra" not in opened.tokenizer.get_vocab()
    assert UNKNOWN_ID in opened.table("val").words(0)
    assert "lilac" not in opened.vocabulary
    assert (opened.table("val").labels()[0] == NO_ANSWER).all()


def test_an_image_two_splits_share_is_stored_once(raw, tmp_path):
    make(
        raw | {"dev": raw["val"], "test": SplitFiles(raw["val"].questions, None, raw["val"].images)}, tmp_path / "d.h5"
    )
    opened = Store(tmp_path / "d.h5")
    assert len(opened.usable) == 3
    assert opened.table("test").images.tolist() == opened.table("val").images.tolist()
    assert opened.table("test").given.shape == (2, 0)


@pytest.mark.parametrize("changed", [{"image_size": 48}, {"answers": 2}, {"min_word_count": 2}])
def test_a_finished_file_of_other_settings_is_not_touched(raw, tmp_path, changed):
    make(raw, tmp_path / "data.h5")
    before = (tmp_path / "data.h5").read_bytes()
    with pytest.raises(InputError, match=f"made with {next(iter(changed))}"):
        make(raw, tmp_path / "data.h5", **changed)
    change(raw["val"].questions, lambda c: c["questions"][0].update(question="Other?"))
    with pytest.raises(InputError, match="split 'val' was made from other files"):
        make(raw, tmp_path / "data.h5")
    assert (tmp_path / "data.h5").read_bytes() == before


def many(folder, count):
    entries = [(n, n, f"what is {n}", ["yes"] * 10) for n in range(count)]
    return {"train": write_split(folder, "train", entries)}


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    splits, path = many(tmp_path, 600), tmp_path / "data.h5"
    real, decoded = store.fill, []

    def stopping(file, rows, pixels, usable=True):
        decoded.extend(rows)
        if len(decoded) > 300:
            raise KeyboardInterrupt
        real(file, rows, pixels, usable)

    monkeypatch.setattr(store, "fill", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(splits, path)
    assert not path.exists()
    with pytest.raises(InputError, match="not finished"):
        Store(path)
    monkeypatch.setattr(
        store, "fill", lambda file, rows, pixels, usable=True: (again.extend(rows), real(file, rows, pixels, usable))
    )
    again = []
    make(splits, path)
    assert sorted(again) == list(range(256, 600))
    whole = tmp_path / "whole.h5"
    make(splits, whole)
    with h5py.File(path) as one, h5py.File(whole) as other:
        assert np.array_equal(one["images/pixels"][:], other["images/pixels"][:])


KILLED_IN_A_FLUSH = """
import os, sys
from pathlib import Path
from data import store
from data.preprocess import preprocess
from data.vqa_files import SplitFiles
import data.preprocess
data.preprocess._CHUNKS_A_FLUSH = 1
real, flushes = store._to_disk, []
def killed(file):
    flushes.append(1)
    if len(flushes) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    real(file)
store._to_disk = killed
folder = Path(sys.argv[1])
images = str(folder / "train_{image_id:012d}.png")
splits = {"train": SplitFiles(folder / "train_q.json", folder / "train_a.json", images)}
preprocess(splits, folder / "data.h5", image_size=32, min_word_count=1, answers=10, skip_bad_images=False, processes=1)
"""


def test_a_run_killed_at_any_flush_keeps_what_it_marked(tmp_path):
    splits = many(tmp_path, 100)
    whole = tmp_path / "whole.h5"
    make(splits, whole)
    with h5py.File(whole) as file:
        expected = file["images/pixels"][:]
    partial = store.partial_path(tmp_path / "data.h5")
    # the first flush ends the creation; then two for every 32 images: of the pixels, and of the marks
    for flush in (1, 2, 3, 4):
        arguments = [sys.executable, "-c", KILLED_IN_A_FLUSH, str(tmp_path), str(flush)]
        ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False)
        assert ended.returncode == -9
        assert not (tmp_path / "data.h5").exists()
        if partial.exists():
            with h5py.File(partial) as file:
                filled = file["images/filled"][:]
                assert np.array_equal(file["images/pixels"][:][filled], expected[filled])
    make(splits, tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5") as file:
        assert np.array_equal(file["images/pixels"][:], expected)
    assert not partial.exists()


def test_a_begun_file_of_other_settings_is_kept(raw, tmp_path):
    raw["train"].image(1).unlink()
    path = tmp_path / "data.h5"
    with pytest.raises(InputError, match="missing or unreadable"):
        make(raw, path)
    before = store.partial_path(path).read_bytes()
    with pytest.raises(InputError, match="made with answers 10, now 3"):
        make(raw, path, answers=3)
    assert store.partial_path(path).read_bytes() == before


def test_a_file_that_another_process_fills_is_left_to_it(raw, tmp_path):
    raw["train"].image(1).unlink()
    path = tmp_path / "data.h5"
    with pytest.raises(InputError, match="missing"):
        make(raw, path)
    hold = "import h5py, sys, time; f = h5py.File(sys.argv[1], 'r+'); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, store.partial_path(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another process is working on it"):
        make(raw, path)
    holder.kill()
    holder.wait()


def test_the_folder_of_the_sources_may_move(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    moved = tmp_path / "moved"
    moved.mkdir()
    again = {"train": write_split(moved, "train", TRAIN), "val": write_split(moved, "val", VAL)}
    with pytest.raises(InputError, match="other files"):  # other bytes: the patterns' last folder is another one
        make(again, tmp_path / "data.h5")
    same = {
        name: SplitFiles(f.questions, f.annotations, f"{tmp_path}/./{Path(f.images).name}") for name, f in raw.items()
    }
    make(same, tmp_path / "data.h5")


def test_few_answers_are_warned_of(tmp_path, capsys):
    make({"train": write_split(tmp_path, "train", [(1, 1, "is it?", ["yes"])])}, tmp_path / "data.h5")
    assert "1 question(s) have fewer than 4 answers" in capsys.readouterr().out


def test_several_processes_give_the_same_file(tmp_path):
    splits = many(tmp_path, 80)
    make(splits, tmp_path / "one.h5")
    make(splits, tmp_path / "three.h5", processes=3)
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "three.h5") as other:
        assert np.array_equal(one["images/pixels"][:], other["images/pixels"][:])


def test_bad_images_are_all_listed_and_can_be_left_out(raw, tmp_path, capsys):
    raw["train"].image(1).unlink()
    raw["val"].image(3).write_bytes(b"no image")
    path = tmp_path / "data.h5"
    write_split(tmp_path, "val", [*VAL, (22, 4, "Is it?", ["yes"] * 10)])
    raw["val"].image(3).write_bytes(b"no image")
    with pytest.raises(InputError, match="2 image.*by id: 1, 3; .*data.skip_bad_images=true"):
        make(raw, path)
    out = capsys.readouterr().out
    assert f"1: {raw['train'].image(1)}: no such file" in out
    assert f"3: {raw['val'].image(3)}: cannot be read" in out
    assert not path.exists()
    make(raw, path, skip_bad_images=True)
    opened = Store(path)
    assert opened.usable.tolist() == [False, True, False, True]
    assert len(opened.table("train")) == 3
    assert np.ptp(H5Images(path)[0], axis=(0, 1)).tolist() == [0, 0, 0]


def test_a_split_without_any_image_is_refused_before_the_work(raw, tmp_path):
    wrong = SplitFiles(raw["val"].questions, raw["val"].annotations, str(tmp_path / "test2015/{image_id}.jpg"))
    with pytest.raises(InputError, match="test2015/3.jpg: no such file, nor any other image of split 'val'"):
        make(raw | {"val": wrong}, tmp_path / "data.h5")
    assert not store.partial_path(tmp_path / "data.h5").exists()


def test_a_training_split_is_needed(raw, tmp_path):
    with pytest.raises(InputError, match="'train'"):
        make({"val": raw["val"]}, tmp_path / "data.h5")
    blank = SplitFiles(raw["train"].questions, None, raw["train"].images)
    with pytest.raises(InputError, match="needs annotations"):
        make({"train": blank}, tmp_path / "data.h5")


def test_other_files_are_refused(raw, tmp_path):
    path = tmp_path / "data.h5"
    with pytest.raises(InputError, match="no such file"):
        Store(path)
    path.write_bytes(b"no h5")
    with pytest.raises(InputError, match="cannot be read as an h5 file"):
        Store(path)
    path.unlink()
    make(raw, path)
    with pytest.raises(InputError, match="no split 'test'; it holds train, val"):
        Store(path).table("test")
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(InputError, match="version 99"):
        Store(path)
    with h5py.File(path, "r+") as file:
        file.attrs.update(version=store.VERSION, complete=False)
    with pytest.raises(InputError, match="not complete"):
        Store(path)


def test_a_file_with_an_empty_row_is_never_finished(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["images/filled"][1] = False
    with pytest.raises(RuntimeError, match="not every image"):
        store.finish(tmp_path / "data.h5", tmp_path / "final.h5")


# ---- batches


@pytest.fixture
def dataset(tiny):
    opened = Store(tiny.parent / "world.h5")
    return QuestionDataset(opened.table("train"), H5Images(opened.path))


def test_a_batch_is_its_questions(dataset):
    batch = dataset.__getitems__([5, 0, 17])
    assert batch.images.shape == (3, 64, 64, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.shape == (3, 10)
    for place, row in enumerate([5, 0, 17]):
        length = int(batch.lengths[place])
        assert batch.tokens[place, :length].tolist() == dataset.table.words(row).tolist()
        assert (batch.tokens[place, length:] == PAD_ID).all()
        assert np.array_equal(batch.images[place], dataset.images[dataset.table.images[row]])


def test_the_order_is_a_formula_of_seed_and_epoch():
    def order(**changed):
        return list(EpochSampler(**({"size": 50, "batch_size": 8, "seed": 1, "epoch": 1} | changed)))

    assert order() == order()
    assert order() != order(seed=2) != order(epoch=2)
    assert len(order()) == 6
    assert len({row for batch in order() for row in batch}) == 48
    late = EpochSampler(50, 8, 1, 1)
    late.start = 4
    assert list(late) == order()[4:]
    assert len(late) == 2
    parts = [list(EpochSampler(50, 8, 1, 1, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in order()]
    assert len(list(EpochSampler(5, 8, 1, 1))) == 1


def test_evaluation_meets_every_question_once(dataset):
    for world in (1, 3):
        met = [r for rank in range(world) for batch in InOrderSampler(dataset.table, 7, rank, world) for r in batch]
        assert sorted(met) == list(range(len(dataset)))


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_open_the_file_themselves(dataset, workers):
    dataset.images[0]  # the parent's handle is open when the workers start
    sampler = EpochSampler(len(dataset), 8, 0, 1)
    expected = [dataset.__getitems__(rows) for rows in EpochSampler(len(dataset), 8, 0, 1)]
    for batch, true in zip(make_loader(dataset, sampler, workers, torch.device("cpu")), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, true, strict=True))


def test_a_dataset_holds_no_pixels(dataset):
    dataset.__getitems__([0, 1, 2])
    assert Store(dataset.images.path).usable.size * 64 * 64 * 3 > 200_000
    assert len(pickle.dumps(dataset)) < 30_000


def test_a_handle_is_not_handed_to_another_process(dataset):
    images = dataset.images
    images[0]
    copy = pickle.loads(pickle.dumps(images))
    assert copy._file is None
    assert np.array_equal(copy[0], images[0])
    images._process = -5  # as after a fork
    before = images._file
    images[0]
    assert images._file is not before


def test_images_from_files_equal_those_of_the_h5(tiny, dataset):
    files = [
        tiny.parent / "world" / "train" / name.name for name in sorted((tiny.parent / "world/train").glob("*.png"))
    ]
    assert np.array_equal(FileImages(files, 64)[3], dataset.images[3])
