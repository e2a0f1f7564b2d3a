"""The folder for `transformers`: its round trip, and what `PreTrainedModel` would do to a model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    AutoTokenizer,
)

import vqa
from tests.hub import QUESTIONS, logits
from vqa.build import build_model
from vqa.hub import ModernConfig, ModernForVisualQuestionAnswering, ModernImageProcessor, ModernProcessor
from vqa.io.errors import InputError
from vqa.text.encoder import read_pretrained

WEIGHTS = "model.safetensors"


def one_by_one(saved, images):
    return torch.cat([saved.run(image, question).logits for image, question in zip(images, QUESTIONS, strict=True)])


def test_the_auto_classes_find_ours(folder, hub, saved):
    assert type(AutoConfig.from_pretrained(folder)) is ModernConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is ModernImageProcessor
    assert type(hub[0]) is type(AutoModel.from_pretrained(folder)) is ModernForVisualQuestionAnswering
    assert set(hub[1].model_input_names) >= {"pixel_values", "input_ids", "attention_mask"}
    assert type(hub[1]) is ModernProcessor
    assert (
        AutoTokenizer.from_pretrained(folder)(QUESTIONS[2])["input_ids"]
        == (AutoTokenizer.from_pretrained(saved.folder)(QUESTIONS[2])["input_ids"])
    )
    assert list(hub[0].config.id2label.values()) == saved.answers
    assert hub[0].config.to_settings() == saved.settings


def test_it_answers_as_the_model_does(hub, saved, images):
    torch.testing.assert_close(logits(hub, images), one_by_one(saved, images), rtol=1e-5, atol=1e-6)
    for image, question in zip(images, QUESTIONS, strict=True):
        assert logits(hub, image, question).equal(saved.run(image, question).logits)
    with torch.inference_mode():
        output, expected = hub[0](**hub[1](images=images[0], text=QUESTIONS[0])), saved.run(images[0], QUESTIONS[0])
    assert output.attention.equal(expected.attention)
    assert output.gamma.equal(expected.modulation.gamma)
    assert output.beta.equal(expected.modulation.beta)


def test_a_mask_with_a_gap_is_refused(hub, images):
    inputs = hub[1](images=images[0], text="is there a red circle?")
    with torch.inference_mode():
        expected = hub[0](**inputs).logits
        padded = {name: torch.nn.functional.pad(inputs[name], (0, 2)) for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(hub[0](inputs["pixel_values"], **padded).logits, expected)
        inputs["attention_mask"][0, 3] = 0
        with pytest.raises(ValueError, match="without a masked word between"):
            hub[0](**inputs)


def test_what_it_saves_is_equal_again(hub, images, saved, tmp_path):
    for part in hub:
        part.save_pretrained(tmp_path / "again")
    again = [auto.from_pretrained(tmp_path / "again") for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor)]
    assert logits(again, images).equal(logits(hub, images))
    assert vqa.load(tmp_path / "again").ask(images[0], QUESTIONS) == saved.ask(images[0], QUESTIONS)


def test_a_model_in_a_subfolder_is_read(hub, folder, images, tmp_path):
    shutil.copytree(folder, tmp_path / "repository" / "modern")
    where = {"pretrained_model_name_or_path": tmp_path / "repository", "subfolder": "modern"}
    read = [auto.from_pretrained(**where) for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor)]
    assert logits(read, images).equal(logits(hub, images))


def test_weights_that_it_saves_in_several_files_are_read(hub, images, saved, tmp_path, done, refused):
    again = tmp_path / "again"
    for part, options in zip(hub, ({"max_shard_size": "100KB"}, {}), strict=True):
        part.save_pretrained(again, **options)
    files = sorted(again.glob("model-*.safetensors"))
    assert len(files) > 1
    assert not (again / WEIGHTS).exists()
    read = [auto.from_pretrained(again) for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor)]
    assert logits(read, images).equal(logits(hub, images))
    assert vqa.load(again).ask(images[0], QUESTIONS) == saved.ask(images[0], QUESTIONS)
    done("export", "--run", again, "--to", tmp_path / "one")
    assert vqa.load(tmp_path / "one").ask(images[0], QUESTIONS) == saved.ask(images[0], QUESTIONS)
    asked = ("ask", "--run", again, "--image", images[0], "--question", "what?")
    files[0].unlink()
    assert f"{files[0].name}: cannot be read as weights" in refused(*asked)
    (again / f"{WEIGHTS}.index.json").write_text("{}")
    assert f"{WEIGHTS}.index.json: must name the file of each weight in weight_map" in refused(*asked)


def test_the_library_and_the_commands_take_the_folder(folder, saved, images, done, trained, tmp_path):
    loaded = vqa.load(folder)
    assert loaded.ask(images, QUESTIONS) == saved.ask(images, QUESTIONS)
    assert loaded.inspect(images[0], QUESTIONS[0]) == saved.inspect(images[0], QUESTIONS[0])
    assert (loaded.training, loaded.preprocessing, loaded.answers) == (
        saved.training,
        saved.preprocessing,
        saved.answers,
    )
    scored = [done("eval", "--run", run, "--out", tmp_path / run.name) for run in (trained, folder)]
    assert scored[0].out == scored[1].out


def test_building_initialises_as_the_project_does(folder):
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(3)
    made = AutoModelForVisualQuestionAnswering.from_config(config).model
    torch.manual_seed(3)
    ours = build_model(config.to_settings(), config.vocab_size, config.num_labels, pretrained=False)
    for (name, theirs), (_, expected) in zip(made.state_dict().items(), ours.state_dict().items(), strict=True):
        assert theirs.equal(expected), name


def test_building_reads_and_downloads_no_weights(folder):
    config = AutoConfig.from_pretrained(folder)
    config.settings = config.settings | {"backbone": config.settings["backbone"] | {"weights": "absent.pth"}}
    with torch.device("meta"):
        made = ModernForVisualQuestionAnswering(config)
    assert all(value.is_meta for value in made.state_dict().values())


@pytest.mark.parametrize("condition", ["question", "kind", "image", "mean_question"])
def test_every_buffer_is_saved(folder, condition):
    config = AutoConfig.from_pretrained(folder)
    config.settings = config.settings | {"cbn": config.settings["cbn"] | {"condition": condition}}
    made = ModernForVisualQuestionAnswering(config)
    assert {name for name, _ in made.named_buffers()} <= made.state_dict().keys()


@pytest.mark.parametrize("trained_too", ["none", "batchnorm"])
def test_what_was_frozen_is_frozen(folder, trained_too):
    config = AutoConfig.from_pretrained(folder)
    config.settings = config.settings | {"backbone": config.settings["backbone"] | {"train": trained_too}}
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folder, config=config)
    ours = build_model(config.to_settings(), config.vocab_size, config.num_labels, pretrained=False)
    flags = [{name: value.requires_grad for name, value in part.named_parameters()} for part in (model.model, ours)]
    assert flags[0] == flags[1]
    assert set(flags[0].values()) == {True, False}
    model.train()
    assert not any(norm.training for norm in model.model.resnet.batch_norms())


def test_weights_and_statistics_are_float32(hub, folder, images, tmp_path):
    expected = logits(hub, images)
    hub[0].half().save_pretrained(tmp_path)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(logits((model, hub[1]), images), expected, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="dtype=torch.bfloat16: the weights and statistics are float32"):
        AutoModelForVisualQuestionAnswering.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device_map: not supported"):
        AutoModelForVisualQuestionAnswering.from_pretrained(folder, device_map="auto")


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(folder, tmp_path, change):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / WEIGHTS)
    name = "model.fusion.question.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[{"unexpected": "model.other", "mismatched": name}[change]] = torch.ones(2, 3)
    save_file(weights, broken / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="fusion.question.weight|other"):
        AutoModelForVisualQuestionAnswering.from_pretrained(broken)
    with pytest.raises(InputError, match="not the weights of this folder's config.json"):
        vqa.load(broken)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "[]", "config.json: holds no `settings` of a model"),
        ("config.json", {"settings": {"colour": 1}}, "config.json: unknown key colour"),
        ("config.json", {"id2label": {"0": "yes", "2": "no"}}, "config.json: id2label must name the answers from 0 on"),
        ("config.json", {"id2label": {"0": 3}}, "config.json: must be a list of texts"),
        ("processor_config.json", {"image_processor": {}}, "processor_config.json: holds no image_processor with size"),
        ("processor_config.json", None, "processor_config.json: no such file"),
        ("tokenizer.json", "{}", "tokenizer.json: cannot be read as a tokenizer"),
    ],
)
def test_a_broken_folder_is_named(folder, tmp_path, refused, images, file, content, says):
    broken = shutil.copytree(folder, tmp_path / "broken")
    if isinstance(content, dict):
        whole = json.loads((broken / file).read_text())
        content = json.dumps(whole | content)
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    assert says in refused("ask", "--run", broken, "--image", images[0], "--question", "what?")


def test_a_name_that_is_not_on_the_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="us/other: no such folder, and no model of this name could be downloaded"):
        vqa.load("us/other")


@pytest.mark.parametrize("uploaded", ["exported", "model/"])
def test_of_a_model_on_the_hub_all_that_it_needs_is_downloaded(folder, saved, images, tmp_path, monkeypatch, uploaded):
    there = folder if uploaded == "exported" else saved.folder

    def download(asked, allow_patterns):
        assert asked == "us/modern"
        for name in filter_repo_objects([file.name for file in there.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(there / name, tmp_path)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert vqa.load("us/modern").ask(images[0], "what?") == saved.ask(images[0], "what?")


@pytest.mark.parametrize("path", ["runs/absent", "./absent", "/absent", "~/absent", "absent/", "runs/a/b"])
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(here, monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked for"))
    (here / "runs").mkdir()
    with pytest.raises(InputError, match=r"no model here \(no such folder\)"):
        vqa.load(path)
    with pytest.raises(InputError, match=f"question.text_encoder: {path}: no such folder"):
        read_pretrained(path)


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """A folder in the place of the Hub: what is uploaded to OWNER/NAME lies there."""

    def commit(_api, repo_id, operations, **_):
        for added in operations:
            file = tmp_path / repo_id / added.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            with added.as_file() as content:
                file.write_bytes(content.read())
        return SimpleNamespace(commit_url="")

    def absent(name, **_):
        raise LocalEntryNotFoundError(f"{name}/README.md")

    monkeypatch.setattr(HfApi, "create_repo", lambda _api, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", absent)
    return tmp_path


def test_what_is_pushed_to_the_hub_is_equal_again(hub, images, saved, uploaded):
    for part in hub:
        part.push_to_hub("us/modern")
    there = uploaded / "us" / "modern"
    again = [auto.from_pretrained(there) for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor)]
    assert logits(again, images).equal(logits(hub, images))
    assert vqa.load(there).ask(images[0], QUESTIONS) == saved.ask(images[0], QUESTIONS)
    assert "What it cannot do" not in (there / "README.md").read_text()  # `transformers` writes its own


def test_weights_laid_out_channels_last_are_saved(folder, tmp_path, images, hub):
    config = AutoConfig.from_pretrained(folder)
    config.settings = config.settings | {"speed": config.settings["speed"] | {"channels_last": True}}
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folder, config=config)
    weight = model.model.resnet.network.conv1.weight
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    again = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert again.model.resnet.network.conv1.weight.stride() == weight.stride()
    assert logits((again, hub[1]), images).equal(logits((model, hub[1]), images))


def test_the_configuration_is_plain_json(folder):
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "modern_vqa"
    assert AutoConfig.from_pretrained(folder).to_dict() == ModernConfig(**content).to_dict() | {
        "_name_or_path": str(folder)
    }


def test_an_export_to_onnx_leaves_the_model_as_it_was(saved, tmp_path, monkeypatch):
    from vqa.hub import onnx

    def refuse(*_, **__):
        raise torch.onnx.OnnxExporterError("an operator is missing")

    monkeypatch.setattr(onnx, "NEEDED", ())
    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(InputError, match="cannot express this model"):
        onnx.save_onnx_folder(saved, tmp_path)
    assert all(getattr(module, "fused", True) for module in saved.model.modules())
