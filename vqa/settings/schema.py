"""Every setting with its type and range. `base.yaml`, beside this file, explains them and holds the defaults."""

import re
import reprlib
from collections.abc import Collection, Iterator
from enum import Enum, auto
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from vqa.io.files import write_text

# Upper bounds are far above any real value: they keep a typing error from taking all memory or processes.
Size = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Processes = Annotated[int, Field(ge=1, le=256)]
# A shell leaves `~` as it is in `data.h5=~/vqa.h5`.
FileName = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$"), AfterValidator(expanduser)]
SplitName = Annotated[str, Field(max_length=64, pattern=r"^\w[\w.\-]*$")]  # names files and groups in h5 files


# `1e-3`, which YAML 1.1 takes for a text; recipes are read with it, so a text of this form is written in quotes.
POWER_OF_TEN = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_implicit_resolver(*POWER_OF_TEN)


class Role(Enum):
    """The effect of a setting; one without a role affects what is learnt."""

    COMPUTING = auto()  # on which machine a run computes, and which files it writes: the same results
    SPEED = auto()  # time and memory: the same results up to rounding
    DATA = auto()  # where the data are (the h5 file's identity says which data they are)
    SKIPPING = auto()  # what is skipped and counted instead of ending the command with an error
    SCORING = auto()  # part of training, but a trained model can be evaluated with another value


SAME_RESULTS = (Role.COMPUTING, Role.SPEED)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SplitSettings(_Section):
    """Raw files of a split, relative to `data.folder`."""

    questions: FileName
    annotations: FileName | None = None
    images: FileName


class DataSettings(_Section):
    """Raw data and the h5 file made from it."""

    folder: Annotated[FileName, Role.DATA]
    splits: Annotated[dict[SplitName, SplitSettings], Role.DATA]
    photographs: Annotated[FileName | None, Role.DATA]
    h5: Annotated[FileName, Role.DATA]
    image_size: int = Field(ge=32, le=2048)
    min_word_count: Count
    answers: int = Field(ge=2, le=2**20)
    vocabulary_from: list[SplitName] = Field(min_length=1)
    skip_bad_images: Annotated[bool, Role.SKIPPING]
    processes: Annotated[Processes, Role.COMPUTING]
    cache_gib: Annotated[float, Role.SPEED] = Field(ge=0)

    @field_validator("splits", mode="before")
    @classmethod
    def _without_removed(cls, splits: Any) -> Any:
        if isinstance(splits, dict):
            return {name: files for name, files in splits.items() if files is not None}
        return splits


class BackboneSettings(_Section):
    """The pretrained ResNet."""

    name: str
    weights: FileName
    seed: int | None = Field(ge=0, lt=2**63)
    train: Literal["none", "stage4", "batchnorm"]
    statistics: Literal["population", "reestimated", "batch"]

    @model_validator(mode="after")
    def _seed_is_of_a_file(self) -> "BackboneSettings":
        if self.seed is not None and not self.weights.endswith(".safetensors"):
            raise ValueError(f"seed: needs weights that are pretrained here, a .safetensors file, not {self.weights!r}")
        return self


CONDITIONS = {  # `cbn.condition` in words
    "question": "the question",
    "kind": "the question's kind",
    "image": "the image (a control)",
    "constant": "a constant (a control)",
    "mean_question": "one fixed vector (a control)",
    "shuffled": "another question (a control)",
}


class CBNSettings(_Section):
    """Which norms are conditioned on the question, and how (sections 2 and 3 of the paper)."""

    condition: Literal["question", "kind", "image", "constant", "mean_question", "shuffled"]
    normaliser: Literal["batch", "instance", "group", "layer", "adaptive"]
    stages: list[Literal[1, 2, 3, 4]]
    stem: bool
    shortcuts: bool
    gamma: bool
    beta: bool
    hidden_size: Size


class QuestionSettings(_Section):
    """The question encoder."""

    encoder: Literal["lstm", "gru", "bag_of_words", "transformers"]
    text_encoder: FileName | None
    pooling: Literal["last", "mean"]
    frozen: bool
    embedding_size: Size
    glove: FileName | None
    glove_size: Size
    hidden_size: Size
    layers: int = Field(ge=1, le=8)

    @model_validator(mode="after")
    def _encoder_uses_its_keys(self) -> "QuestionSettings":
        if self.encoder != "transformers" and self.text_encoder is not None:
            raise ValueError(f"text_encoder: only encoder transformers uses it; for {self.encoder} it must be null")
        if self.encoder == "transformers" and self.text_encoder is None:
            raise ValueError("text_encoder: encoder transformers needs a model's name or folder")
        if self.encoder == "transformers" and self.glove is not None:
            raise ValueError("glove: encoder transformers has its own word vectors; it must be null")
        return self


class AttentionSettings(_Section):
    """Attention over the positions of the feature map."""

    kind: Literal["spatial", "mlb"]
    units: Size
    glimpses: int = Field(ge=1, le=64)
    normalise: Literal["none", "map", "position"]
    scale: float = Field(gt=0)


class AnswerSettings(_Section):
    """Fusion and answer layers."""

    fusion_size: Size
    hidden_size: int = Field(ge=0, le=2**16)
    dropout: float = Field(ge=0, lt=1)


class TrainSettings(_Section):
    """Training."""

    splits: list[SplitName] = Field(min_length=1)
    validate_on: SplitName | None
    loss: Literal["soft", "hard", "bce"]
    optimiser: Literal["adam", "adamw", "adamax"]
    weight_decay: float = Field(ge=0)
    learning_rate: float = Field(gt=0)
    predictor_learning_rate: float | None = Field(gt=0)
    schedule: Literal["constant", "one_cycle", "cosine", "steps"]
    warm_up: float = Field(ge=0, lt=1)
    decay_at: list[Annotated[float, Field(gt=0, lt=1)]]
    decay_by: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    epochs: Count
    batch_size: Annotated[Size, Role.SCORING]
    augment: Literal["none", "crop", "crop_flip"]
    patience: int = Field(ge=0, le=2**31)
    accumulate: Size
    together: Size
    checkpoint_every: Annotated[int, Role.COMPUTING] = Field(ge=0, le=2**31)
    skip_not_finite: Annotated[int, Role.SKIPPING] = Field(ge=0, le=2**31)
    tensorboard: Annotated[bool, Role.COMPUTING]

    @model_validator(mode="after")
    def _keys_agree(self) -> "TrainSettings":
        if self.validate_on in self.splits:
            raise ValueError(f"validate_on: split {self.validate_on!r} is trained on; use another split or null")
        if self.warm_up and self.schedule not in ("cosine", "steps"):
            raise ValueError(f"warm_up: only schedules cosine and steps use it; for {self.schedule} it must be 0")
        if bool(self.decay_at) != (self.schedule == "steps"):
            needs = "needs shares of the training, as [0.6, 0.8]" if self.schedule == "steps" else "must have []"
            raise ValueError(f"decay_at: schedule {self.schedule} {needs}")
        return self


class SpeedSettings(_Section):
    """Time and memory of training; the results are the same up to rounding."""

    fused: Literal[True, False, "eager"]
    share_images: bool
    channels_last: bool
    recompute: list[Literal[1, 2, 3, 4]]
    compile: bool


class ScenesSettings(_Section):
    """Synthetic scenes and the backbone pretrained on them."""

    world: Literal["small", "large", "photos", "games"]
    look: Literal["plain", "dark", "noisy", "bright"]
    seed: int = Field(ge=0, lt=2**63)
    images: dict[SplitName, Annotated[int, Field(ge=1, le=10**7)]]
    questions_per_image: Size
    pretrain_size: int = Field(ge=32, le=2048)
    pretrain_images: int = Field(ge=64, le=10**7)
    pretrain_epochs: Size


class GuessWhatSettings(_Section):
    """The GuessWhat?! oracle: a question about one object of an image is answered yes, no or n.a. (section 4)."""

    status: list[Literal["success", "failure", "incomplete"]] = Field(min_length=1)
    crop_factor: float = Field(ge=1, le=10)
    category_size: Size


class Settings(_Section):
    """Every setting of a run."""

    name: Annotated[str, Role.COMPUTING] = Field(max_length=1000, pattern=r"^\w[\w.\-]*(/\w[\w.\-]*)*$")
    seed: int = Field(ge=0, lt=2**63)
    device: Annotated[str, Role.COMPUTING] = Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")
    precision: Annotated[Literal["float32", "bfloat16"], Role.SCORING]
    workers: Annotated[int, Role.COMPUTING] = Field(ge=0, le=256)
    inputs: list[Literal["image", "question", "crop", "spatial", "category"]] = Field(min_length=1)
    data: DataSettings
    backbone: BackboneSettings
    cbn: CBNSettings
    question: QuestionSettings
    attention: AttentionSettings
    answer: AnswerSettings
    train: TrainSettings
    speed: Annotated[SpeedSettings, Role.SPEED]
    scenes: ScenesSettings | None
    guesswhat: GuessWhatSettings | None

    @property
    def task(self) -> Literal["vqa", "guesswhat"]:
        """The task: the one whose section is there, else answering questions about images."""
        return "vqa" if self.guesswhat is None else "guesswhat"

    @property
    def views(self) -> list[str]:
        """The inputs that are images, in the order in which a question has them."""
        return [name for name in ("crop", "image") if name in self.inputs]

    @model_validator(mode="after")
    def _sections_agree(self) -> "Settings":
        once = {"inputs": self.inputs, "train.splits": self.train.splits}
        for key, values in (once | {"data.vocabulary_from": self.data.vocabulary_from}).items():
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: duplicate value")
        splits, validated = self.data.splits, self.train.validate_on
        for name in self.train.splits:
            if name in splits and validated in splits and splits[name].questions == splits[validated].questions:
                raise ValueError(f"data.splits: {validated!r} has the questions of {name!r}; train.validate_on has it")
        if self.task == "vqa" and (other := sorted(set(self.inputs) - {"image", "question"})):
            raise ValueError(f"inputs: {', '.join(other)} belongs to the task guesswhat; vqa takes image and question")
        if self.scenes is not None and (self.scenes.world == "games") != (self.task == "guesswhat"):
            raise ValueError("scenes.world: games belongs to the task guesswhat, which takes no other world")
        if self.task == "guesswhat" and self.train.augment != "none":
            raise ValueError("train.augment: the task guesswhat supports no augmentation; it must be none")
        if self.backbone.seed is not None and self.scenes is None:
            raise ValueError("backbone.seed: belongs to a recipe with scenes, whose backbone is pretrained here")
        if self.cbn.condition == "kind" and self.question.encoder == "transformers":
            raise ValueError("cbn.condition: kind needs whole words; question.encoder transformers uses parts of words")
        return self

    def save(self, file: Path) -> None:
        """Write every setting, resolved."""
        write_text(file, yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _roles(section: type[BaseModel], prefix: str = "", outer: Role | None = None) -> Iterator[tuple[str, Role | None]]:
    """Every dotted key of a section with its role: its own, or that of the section around it."""
    for name, field in section.model_fields.items():
        role = next((mark for mark in field.metadata if isinstance(mark, Role)), outer)
        yield prefix + name, role
        for kind in (field.annotation, *get_args(field.annotation)):  # a section may be optional
            if isinstance(kind, type) and issubclass(kind, _Section) and kind is not SplitSettings:
                yield from _roles(kind, f"{prefix}{name}.", role)


ROLES = dict(_roles(Settings))  # the role of every key, sections included


def role_of(key: str) -> Role | None:
    """The role of the setting with this dotted key, which may name a part of its value (`data.splits.val`)."""
    while "." in key and key not in ROLES:
        key = key.rpartition(".")[0]
    return ROLES.get(key)


def flat(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted key; the splits are one value."""

    def walk(content: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in content.items():
            key = prefix + name
            found |= walk(value, f"{key}.") if isinstance(value, dict) and key != "data.splits" else {key: value}
        return found

    return walk(settings.model_dump(), "")


def different_keys(one: Settings, other: Settings, ignored: Collection[Role] = ()) -> list[str]:
    """The dotted keys whose values differ, sorted; keys of the roles `ignored` may differ."""
    ours, theirs, absent = flat(one), flat(other), object()
    different = (key for key in ours.keys() | theirs.keys() if ours.get(key, absent) != theirs.get(key, absent))
    return sorted(key for key in different if role_of(key) not in ignored)


def difference(made: Settings, asked: Settings) -> str | None:
    """The settings by which results made with `made` are not those of `asked`: the first key with both values, and the
    other keys; None if the results are the same.
    """
    keys = different_keys(made, asked, SAME_RESULTS)
    if not keys:
        return None
    theirs, ours = (reprlib.repr(flat(settings).get(keys[0])) for settings in (made, asked))
    return f"{keys[0]} is {theirs}, not {ours}" + "".join(f", {key} differs" for key in keys[1:])
