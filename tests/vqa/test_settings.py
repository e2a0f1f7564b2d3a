"""Settings: strict keys and types, inheritance, overrides; and the shipped recipes."""

import pytest
import yaml

from experiments.prepare import preprocessing_of
from tests.conftest import ROOT
from vqa.io.errors import InputError
from vqa.settings.recipes import _OTHER_NAMES, load_settings
from vqa.settings.schema import ROLES, different_keys

RECIPES = sorted(path for path in (ROOT / "config").rglob("*.yaml"))
PAPER = {"baseline", "finetune_stage4", "finetune_bn", "modern", "modern_448", "modern_mlb_448"}


@pytest.fixture
def base(tmp_path):
    """A recipe over base.yaml."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {ROOT}/config/base.yaml\nname: mine\n")
    return file


def test_base_names_every_key_and_no_other():
    def keys(section, prefix=""):
        for key, value in section.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{key}.")

    base = set(keys(yaml.safe_load((ROOT / "vqa/settings/base.yaml").read_text())))
    for recipe, section in ((ROOT / "config/demo.yaml", "scenes"), (ROOT / "config/guesswhat/cbn.yaml", "guesswhat")):
        base |= set(keys(yaml.safe_load(recipe.read_text())[section], f"{section}."))
    assert {key for key in base if not key.startswith("scenes.images.")} == set(ROLES)


def test_every_line_of_base_is_explained():
    text = (ROOT / "vqa/settings/base.yaml").read_text()
    lines = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith("#")]
    uncommented = {line.split(":")[0].strip() for line in lines if "#" not in line}
    assert uncommented <= {"learning_rate", "decay_by", "epochs", "scenes", "guesswhat"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_what_it_is(recipe):
    settings = load_settings(recipe)
    text = recipe.read_text()
    assert text.startswith("# ")
    if recipe.stem != "base":
        assert "python main.py" in text
        assert "Paper" in text
        assert "Cost: " in text
        assert settings.name != "unnamed"


def test_the_papers_hyper_parameters():
    found = {path.stem: load_settings(path) for path in (ROOT / "config/vqa_v1").glob("*.yaml")}
    assert set(found) == PAPER
    modern = found["modern"]
    assert modern.cbn.stages == [1, 2, 3, 4]
    assert (modern.cbn.hidden_size, modern.cbn.stem, modern.cbn.shortcuts) == (512, False, False)
    assert (modern.question.embedding_size, modern.question.glove_size, modern.question.hidden_size) == (300, 300, 1024)
    assert modern.question.glove
    assert modern.question.layers == 2
    assert (modern.attention.units, modern.answer.fusion_size, modern.answer.hidden_size) == (512, 1024, 512)
    assert (modern.train.learning_rate, modern.train.clip, modern.train.batch_size) == (2e-4, 5, 32)
    assert (modern.train.epochs, modern.data.answers, modern.data.image_size) == (20, 2000, 224)
    assert (modern.backbone.name, modern.backbone.train) == ("resnet50", "none")
    assert found["baseline"].cbn.stages == found["finetune_bn"].cbn.stages == found["finetune_stage4"].cbn.stages == []
    assert found["finetune_bn"].backbone.train == "batchnorm"
    assert found["finetune_stage4"].backbone.train == "stage4"
    assert found["modern_448"].data.image_size == found["modern_mlb_448"].data.image_size == 448
    mlb = found["modern_mlb_448"].attention
    assert (mlb.kind, mlb.glimpses, mlb.units) == ("mlb", 2, 256)


def test_names_and_h5_files_of_recipes_do_not_collide():
    settings = [load_settings(path) for path in RECIPES]
    assert len({one.name for one in settings}) == len(settings)
    made = {}
    for one in settings:
        asked = preprocessing_of(one)
        asked |= {"threads": None, "source": asked["source"].settings}
        assert made.setdefault(one.data.h5, asked) == asked


def test_the_recipes_of_vqa_v2_are_those_of_vqa_v1_on_other_data():
    found = {path.stem: load_settings(path) for path in (ROOT / "config/vqa_v2").glob("*.yaml")}
    assert set(found) == {"baseline", "finetune_bn", "modern", "modern_trainval"}
    trainval = found.pop("modern_trainval")
    for name, one in found.items():
        other = load_settings(ROOT / "config/vqa_v1" / f"{name}.yaml")
        assert different_keys(one, other) == ["data.folder", "data.h5", "data.splits", "name"]
        assert list(one.data.splits) == ["train", "val", "test-dev", "test"]
    changed = ["data.h5", "data.vocabulary_from", "name", "train.splits", "train.validate_on"]
    assert different_keys(trainval, found["modern"]) == changed
    assert trainval.data.vocabulary_from == trainval.train.splits == ["train", "val"]
    assert trainval.train.validate_on is None


def test_numbers_as_people_write_them(base):
    base.write_text(base.read_text() + "train: {learning_rate: 1e-3, clip: 2}\n")
    assert load_settings(base).train.learning_rate == 0.001
    assert load_settings(base, ["train.learning_rate=2.5e-4"]).train.learning_rate == 0.00025
    assert load_settings(base, ["question.glove=null"]).question.glove is None


@pytest.mark.parametrize("text", ["010", "-0_7", "1:30", "1:30.5", "2024-01-01"])
def test_yaml_1_1_changes_no_value(base, tmp_path, text):
    with pytest.raises(InputError, match=f"train.epochs: input should be a valid integer, got '{text}'"):
        load_settings(base, [f"train.epochs={text}"])
    named = load_settings(base, [f"data.h5={text}"])
    assert named.data.h5 == text
    named.save(tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == named


def test_a_word_keeps_what_yaml_would_read_as_a_comment(base):
    assert load_settings(base, ["data.folder=photos #2"]).data.folder == "photos #2"
    assert load_settings(base, ["data.folder='photos #2' # of two"]).data.folder == "photos #2"


def test_files_override_their_base_and_words_override_files(tmp_path, base):
    (tmp_path / "child.yaml").write_text("base: mine.yaml\ntrain: {epochs: 7}\ncbn: {stages: [4]}\n")
    settings = load_settings(tmp_path / "child.yaml", ["train.batch_size=8", "cbn.stages=[3, 4]"])
    assert (settings.name, settings.train.epochs, settings.train.batch_size) == ("mine", 7, 8)
    assert settings.cbn.stages == [3, 4]
    assert settings.train.clip == load_settings(base).train.clip


def test_a_tilde_is_the_home_folder_as_in_a_shell(base, monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    made = load_settings(base, ["data.h5=~/vqa.h5", "data.folder=~/vqa", "question.glove=~/glove.zip"])
    assert made.data.h5 == "/home/one/vqa.h5"
    assert made.data.folder == "/home/one/vqa"
    assert made.question.glove == "/home/one/glove.zip"


@pytest.mark.parametrize("word", ["train.learning_rate=1e-5", "name='1e-3'", "name='1.5'", "name='no'"])
def test_saved_settings_are_the_same_settings(base, tmp_path, word):
    settings = load_settings(base, [word])
    settings.save(tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.epoch=2", "unknown key train.epoch; did you mean train.epochs?"),
        ("epochs=2", "unknown key epochs; did you mean train.epochs?"),
        ("TRAIN.Epochs=2", "did you mean train?"),
        ("SEED=2", "unknown key SEED; did you mean seed?"),
        ("data.root=raw", "unknown key data.root; did you mean data.folder?"),
        ("train.lr=1e-3", "unknown key train.lr; did you mean train.learning_rate?"),
        ("bs=8", "unknown key bs; did you mean train.batch_size?"),
        ("train.batch=8", "unknown key train.batch; did you mean train.batch_size?"),
        ("train.grad-accum=2", "unknown key train.grad-accum; did you mean train.accumulate?"),
        ("train.max_grad_norm=1", "did you mean train.clip?"),
        ("num_epochs=3", "did you mean train.epochs?"),
        ("num_workers=3", "did you mean workers?"),
        ("arch=resnet18", "did you mean backbone.name?"),
        ("train.wd=0.1", "unknown key train.wd; did you mean train.weight_decay?"),
        ("data.splits.val={questions: q, images: i/{image_id}.jpg}", "quotes, as '{image_id}.jpg'"),
        ("data.splits.val={questions: q, images: {image_id}}", "images: .*quotes, as '{image_id}.jpg'"),
        ("data.splits.train={questions: q, images: i, image: j}", "data.splits.train.image"),
        ("use_cbn=true", "unknown key use_cbn"),
        ("cbn.use=true", "unknown key cbn.use"),
        ("train.epochs=two", "train.epochs: .*integer"),
        ("backbone.seed=2", "backbone.seed: needs weights that are pretrained here, .*, not 'IMAGENET1K_V1'"),
        ("backbone={seed: 2, weights: none}", "backbone.seed: needs weights that are pretrained here, .*, not 'none'"),
        ("backbone={seed: 2, weights: b.safetensors}", "backbone.seed: belongs to a recipe with scenes"),
        ("train.epochs=2.5", "train.epochs: .*integer"),
        ("train.epochs=0", "train.epochs: .*greater than or equal to 1"),
        ("cbn.stages=[5]", "cbn.stages.0: input should be 1, 2, 3 or 4, got 5"),
        ("cbn.gamma=1", "cbn.gamma: .*boolean"),
        ("speed.fused=maybe", "speed.fused: input should be True, False or 'eager', got 'maybe'"),
        ("answer.dropout=1.0", "answer.dropout: .*less than 1"),
        ("device=gpu", "device: must be auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        ("name=a//b", "name: must be parts of letters, digits, _ . and - with single slashes between them, got 'a//b'"),
        ("train.splits=[a/b]", "train.splits.0: must be of letters, digits, _ . and -, got 'a/b'"),
        ('data.h5="a\\0"', "data.h5: must hold no NUL"),
        ("name=../elsewhere", "name: "),
        ("train.validate_on=train", "split 'train' is trained on"),
        (
            "data.splits={train: {questions: q, images: i}, val: {questions: q, images: j}}",
            "data.splits: 'val' has the questions of 'train'; train.validate_on has it",
        ),
        ("train.epochs=2 # short", "train.epochs: .*integer"),
        ("train.warm_up=0.1", "train.warm_up: only schedules cosine and steps use it; for constant it must be 0"),
        ("train.schedule=steps", r"train.decay_at: schedule steps needs shares of the training, as \[0.6, 0.8\]"),
        ("train.decay_at=[0.5]", r"train.decay_at: schedule constant must have \[\]"),
        ("train.decay_at=[5]", "train.decay_at.0: .*less than 1"),
        ("train.hflip=true", "did you mean train.augment?"),
        ("train.milestones=[5]", "did you mean train.decay_at?"),
        ("data.vocabulary_from=[train, val, train]", "data.vocabulary_from: duplicate value"),
        ("train.splits=[train, extra, train]", "train.splits: duplicate value"),
        ("inputs=[image, question, image]", "inputs: duplicate value"),
        ("data.vocabulary_from=[]", "data.vocabulary_from: .*at least 1"),
        ("train.epochs", "is not a setting; write key.sub=value"),
        ("train.epochs=[", "command line: train.epochs"),
        ("train=5", "train: input should be a valid dictionary, got 5"),
        ("cbn.stages=3", r"cbn.stages: input should be a valid list, as \[3\], got 3"),
        ("cbn.stages=[3,", "cbn.stages: line 1: .*; a blank ends a word: quote one that holds blanks"),
        ("name=", "name: input should be a valid string, got nothing"),
    ],
)
def test_wrong_words_are_one_clear_line(base, word, message):
    with pytest.raises(InputError, match=message) as caught:
        load_settings(base, [word])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 3, epochs: 4}", "line 1: key 'epochs' is given twice"),
        ("a: 1\nb: [", r"wrong.yaml: line \d"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("base: nowhere.yaml", "nowhere.yaml: no such file"),
        ("base: wrong.yaml", "leads back to itself"),
        ("base: 5", "must be a file name"),
        ("name: x", "is missing"),
        ("? [a]\n: 1", "wrong.yaml"),
        ("data:\n  images: {image_id}.jpg\n", "line 2: .*; a text with braces must be in quotes, as '{image_id}.jpg'"),
        ("data: {images: COCO_{image_id:012d}.jpg}", "line 1: .*; a text with braces must be in quotes"),
    ],
)
def test_wrong_files_are_one_clear_line(here, text, message):
    (here / "wrong.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_settings(here / "wrong.yaml")
    assert "\n" not in str(caught.value)


def test_other_programs_names_lead_to_settings_that_exist():
    names = [name for names in _OTHER_NAMES.values() for name in names.split()]
    assert _OTHER_NAMES.keys() <= set(ROLES)
    assert len(names) == len(set(names))
    assert not set(names) & {key.rsplit(".", 1)[-1] for key in ROLES}


def test_a_split_of_the_base_can_be_removed():
    settings = load_settings(ROOT / "config/vqa_v2/modern.yaml", ["data.splits.test=null", "data.splits.test-dev=null"])
    assert list(settings.data.splits) == ["train", "val"]
