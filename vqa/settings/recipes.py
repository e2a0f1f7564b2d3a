"""Recipes: YAML files with `base:` inheritance and `key.sub=value` overrides, read into strict settings."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from vqa.io.errors import InputError
from vqa.io.files import read_json, read_text
from vqa.settings.schema import POWER_OF_TEN, ROLES, Settings

BASE = Path(__file__).with_name("base.yaml")
MOST_NODES = 10_000  # keys and values of a file with its aliases expanded
# What the code did before it had these keys. The defaults of base.yaml may change.
_BEFORE: dict[str, Any] = {
    "guesswhat": None,
    "backbone": {"seed": None},
    "data": {"photographs": None, "vocabulary_from": ["train"]},
    "question": {"text_encoder": None, "pooling": "mean", "frozen": True},
    "train": {
        "accumulate": 1,
        "together": 1,
        "skip_not_finite": 0,
        "weight_decay": 0.0,
        "warm_up": 0.0,
        "decay_at": [],
        "decay_by": 0.1,
        "augment": "none",
    },
}
_QUOTES = "; a text with braces must be in quotes, as '{image_id}.jpg'"
_BLANKS = "; a blank ends a word: quote one that holds blanks"
_FORMS = {  # of texts that a pattern of the schema describes
    "device": "auto, cpu, mps, cuda or cuda:N",
    "name": "parts of letters, digits, _ . and - with single slashes between them",
}
_OTHER_NAMES = {  # what other programs call these settings, where no similar spelling leads to ours
    "train.learning_rate": "lr base_lr",
    "train.batch_size": "bs batch",
    "train.weight_decay": "wd",
    "train.schedule": "scheduler lr_scheduler lr_schedule",
    "train.warm_up": "warmup_ratio warmup_steps warmup_epochs num_warmup_steps",
    "train.decay_at": "milestones lr_steps",
    "train.decay_by": "lr_decay lr_gamma",
    "train.accumulate": "accum grad_accum gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "train.clip": "grad_clip clip_grad clip_norm clip_grad_norm max_norm max_grad_norm gradient_clip_val",
    "train.augment": "augmentation random_crop random_flip hflip",
    "train.patience": "early_stop early_stopping",
    "train.checkpoint_every": "save_every save_steps",
    "backbone.name": "arch network",
    "backbone.weights": "pretrained",
    "data.folder": "root dir data_root data_dir",
    "data.image_size": "imgsz resolution",
    "precision": "amp fp16 bf16 dtype mixed_precision",
    "device": "gpu gpus cuda",
}


# What YAML 1.1 reads as 8, 90 and a date; here, as in YAML 1.2, they are texts, which are refused as numbers.
_MISREAD = re.compile(r"[-+]?0[0-7_]+$|[-+\d].*:|\d{4}-")


# A word of the command line that YAML would cut: ` #` begins a comment there.
_LIKE_A_COMMENT = re.compile(r"[^'\"\[{].*\s#")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `010`, `1:30` and `2024-01-01` are texts, and a duplicate key is an error; tags
    construct only YAML's own types.
    """

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        """Return the tag of a value without one."""
        misread = kind is yaml.ScalarNode and _MISREAD.match(value)
        return "tag:yaml.org,2002:str" if misread else super().resolve(kind, value, implicit)

    def construct_document(self, node: yaml.Node) -> Any:
        """Refuse aliases that expand into more than a file could hold, or that contain themselves."""
        waiting, count = [node], 0
        while waiting:
            count += 1
            if count > MOST_NODES:
                raise ConstructorError(
                    None, None, f"more than {MOST_NODES} values, with aliases expanded", node.start_mark
                )
            value = waiting.pop().value
            if isinstance(value, list):  # of nodes, or in a mapping of pairs of nodes
                waiting += [part for child in value for part in (child if isinstance(child, tuple) else [child])]
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*POWER_OF_TEN)


def load_settings(file: Path, overrides: Iterable[str] = (), *, where: str = "command line") -> Settings:
    """Read a recipe: its `base:` chain, the file itself, then `key.sub=value` words.

    Args:
        file: the recipe.
        overrides: the words; a later one replaces an earlier one.
        where: the origin of the words, for error messages.

    Raises:
        InputError: a file is missing or malformed, a key is unknown (with the nearest one), missing or given twice,
            or a value is of the wrong type or out of range.
    """
    return _validated(_read_with_bases(Path(file), ()), file, overrides, where)


def _validated(merged: Mapping[str, Any], file: Path, overrides: Iterable[str], where: str) -> Settings:
    overridden = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
            raise InputError(f"{where}: {override!r} is not a setting; write key.sub=value")
        try:
            value = text if _LIKE_A_COMMENT.match(text) else _parse(text, f"{where}: {key}")
        except InputError as error:
            opened = text.count("[") > text.count("]") or text.count("{") > text.count("}")
            raise InputError(f"{error}{_BLANKS if opened else ''}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = _merge(merged, value)
        overridden.append(key)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise InputError(_explain(error, file, overridden, where)) from None


def load_saved(file: Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the `config.yaml` of a run or a model, or the settings in the `config.json` of a model for `transformers`.

    A key that is newer than the file gets the value that reproduces the earlier code, which may differ from today's
    default; a key of `speed`, which changes no result, gets the default.

    Raises:
        InputError: as `load_settings`.
    """
    if file.suffix != ".json":
        return saved_settings(_read_with_bases(file, ()), file, overrides)
    content = read_json(file)
    return saved_settings(content.get("settings") if isinstance(content, dict) else None, file, overrides)


def saved_settings(content: Any, file: Path, overrides: Iterable[str] = ()) -> Settings:
    """As `load_saved`, from what `file` held. Raises InputError."""
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no `settings` of a model")
    return _validated(_merge(_merge(read_yaml(BASE), _BEFORE), content), file, overrides, "command line")


def _read_with_bases(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    content = dict(read_yaml(file))
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise InputError(f"{file}: `base` must be a file name")
    seen = (*seen, file.resolve())
    following = file.parent / base
    if following.name == BASE.name and not following.exists():
        following = BASE
    if following.is_file() and following.resolve() in seen:
        raise InputError(f"{following}: its `base:` leads back to itself")
    return _merge(_read_with_bases(following, seen), content)


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, not to be changed; tags construct only YAML's own types.

    Raises:
        InputError: the file is missing, malformed, or not a mapping.
    """
    content = _parse(read_text(file), str(file)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold `key: value` lines")
    return content


@lru_cache(maxsize=256)  # base.yaml is read with every recipe and every run
def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: tags construct nothing
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        marked = text.splitlines()[mark.line :][:1] if mark else []  # none where the end of the text is the problem
        braces = _QUOTES if re.search(r"\{(image_id|file_name)", "".join(marked)) else ""
        raise InputError(f"{where}:{line} {getattr(error, 'problem', None) or 'malformed YAML'}{braces}") from None
    except Exception:  # PyYAML raises errors of every kind on values that do not fit their tag (`!!bool x`)
        raise InputError(f"{where}: malformed YAML") from None


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _explain(error: ValidationError, file: Path, overridden: Iterable[str], words: str) -> str:
    """One line about the first problem, with the file or the words that it comes from."""
    problems = error.errors(include_url=False, include_context=False)
    # an unknown key is often the reason why another one is missing
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ").partition(" or instance of")[0]
    section = key or message.partition(":")[0]  # our own validators name their key
    given = any(section.startswith(word) or word.startswith(f"{section}.") for word in overridden)
    match first["type"]:
        case "extra_forbidden":
            said = f"unknown key {key}{_suggestion(key)}"
        case "missing":
            said = f"{key} is missing (vqa/settings/base.yaml names every key: begin with `base: base.yaml`)"
        case "value_error":
            said = f"{key}.{message}".lstrip(".")
        case "string_pattern_mismatch":
            form = "hold no NUL" if "\0" in first["input"] else f"be {_FORMS.get(key, 'of letters, digits, _ . and -')}"
            said = f"{key}: must {form}, got {reprlib.repr(first['input'])}"
        case kind:
            braces = _QUOTES if kind == "string_type" and isinstance(first["input"], dict) else ""
            got = "nothing" if first["input"] is None else reprlib.repr(first["input"])
            form = {"list_type": f", as [{got}]", "dict_type": ", as {key: value}"}.get(kind, "")
            said = f"{key}: {message[0].lower()}{message[1:]}{form}, got {got}{braces}"
    return f"{words if given else file}: {said}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _suggestion(key: str) -> str:
    key = key.lower().replace("-", "_")
    last = key.rpartition(".")[2]
    named = (ours for ours, others in _OTHER_NAMES.items() if last in others.split())
    candidates = {known.rpartition(".")[2]: known for known in ROLES} | {known: known for known in ROLES}
    similar = (candidates[close] for close in difflib.get_close_matches(key, candidates, 1))
    nearest = next(named, None) or next(similar, None)
    return f"; did you mean {nearest}?" if nearest else "; vqa/settings/base.yaml names every key"
