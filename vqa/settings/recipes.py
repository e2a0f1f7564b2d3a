"""Recipes: YAML files with `base:` inheritance and `key.sub=value` overrides, read into strict settings."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vqa.io.errors import InputError
from vqa.io.files import read_text
from vqa.settings.schema import Settings, setting_keys

BASE = Path(__file__).with_name("base.yaml")


MOST_NODES = 10_000  # keys and values of a file, with what its aliases repeat


# What the code did before it had these keys. base.yaml holds today's defaults, which may be others.
_BEFORE: dict[str, Any] = {"train": {"accumulate": 1, "together": 1, "skip_not_finite": 0}}


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-3` is a number, and a key given twice is an error.

    Tags construct nothing but YAML's own types, and aliases repeat no more than a file could hold.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Refuses aliases of aliases that would unfold into millions, and those that hold themselves."""
        _count_nodes(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _count_nodes(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Of a tree with its aliases unfolded; `counts` are of the nodes met so far, None while within one."""
    if id(node) not in counts:
        counts[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    count = counts[id(node)]
    if count is None or count > MOST_NODES:
        problem = "an alias holds itself" if count is None else f"more than {MOST_NODES} values"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return count


def load_settings(
    file: Path,
    overrides: Iterable[str] = (),
    *,
    where: str = "command line",
    under: Mapping[str, Any] | None = None,
) -> Settings:
    """Reads a recipe: its `base:` chain, the file itself, then `key.sub=value` words.

    Args:
        file: the recipe.
        overrides: the words, the later ones over the earlier.
        where: where the words stand, for error messages.
        under: values of keys that the recipe does not name.

    Raises:
        InputError: a file is missing or malformed, a key is unknown (with the nearest one), missing or given twice,
            or a value is of the wrong type or out of range.
    """
    merged = _merge(under or {}, _read_with_bases(Path(file), ()))
    overridden = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
            raise InputError(f"{where}: {override!r} is no setting; write key.sub=value")
        value: Any = _parse(text, f"{where}: {key}")
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = _merge(merged, value)
        overridden.append(key)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise InputError(_explain(error, str(file), overridden, where)) from None


def load_saved(file: Path, overrides: Iterable[str] = ()) -> Settings:
    """Reads the `config.yaml` of a run or a model.

    A key that is newer than the file has the value that stands for what the code did then, which is a real difference
    from another value today; a key of speed, which changes no result, has that of `base.yaml`.

    Raises:
        InputError: as `load_settings`.
    """
    return load_settings(file, overrides, under=_merge(read_yaml(BASE), _BEFORE))


def _read_with_bases(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    content = read_yaml(file)
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
    """The keys and values of a YAML file; its tags construct nothing.

    Raises:
        InputError: the file is missing, malformed, or holds something else.
    """
    content = _parse(read_text(file), str(file)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold `key: value` lines")
    return content


_QUOTES = "; a text with braces must stand in quotes, as '{image_id}.jpg'"


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: tags construct nothing
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        braces = _QUOTES if mark and "{image_id" in text.splitlines()[mark.line] else ""
        raise InputError(f"{where}:{line} {getattr(error, 'problem', None) or 'malformed YAML'}{braces}") from None
    except Exception:  # PyYAML raises errors of every kind on values that do not fit their tag (`!!bool x`)
        raise InputError(f"{where}: malformed YAML") from None


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _explain(error: ValidationError, file: str, overridden: list[str], words: str) -> str:
    problems = error.errors(include_url=False, include_context=False)
    # an unknown key is most often why another one is missing
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    given = any(key.startswith(word) or word.startswith(f"{key}.") for word in overridden)
    where = words if given else file
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}{_suggestion(key)}{more}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing (vqa/settings/base.yaml names every key: begin with `base: base.yaml`){more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # of our own validators: says all there is to say
        return f"{where}: {key}.{message}{more}"
    braces = _QUOTES if first["type"] == "string_type" and isinstance(first["input"], dict) else ""
    return f"{where}: {key}: {message[0].lower()}{message[1:]}, got {reprlib.repr(first['input'])}{braces}{more}"


_OTHER_NAMES = {  # of settings, in other programs
    "train.learning_rate": "lr base_lr",
    "train.batch_size": "bs batch batchsize",
    "train.accumulate": "accum grad_accum gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "train.clip": "grad_clip clip_grad clip_norm clip_grad_norm max_norm max_grad_norm gradient_clip_val",
    "train.schedule": "scheduler lr_scheduler lr_schedule warmup",
    "train.patience": "early_stop early_stopping",
    "train.validate_on": "val validation val_split",
    "train.checkpoint_every": "save_every save_steps",
    "backbone.name": "arch resnet network",
    "backbone.weights": "pretrained",
    "data.image_size": "img_size imgsz resolution",
    "data.h5": "hdf5",
    "precision": "amp fp16 bf16 dtype mixed_precision",
    "device": "gpu gpus cuda",
}


def _suggestion(key: str) -> str:
    last = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    if last in ("wd", "weight_decay"):
        return "; there is no weight decay: the optimiser is plain Adam"
    for ours, others in _OTHER_NAMES.items():
        if last in others.split():
            return f"; did you mean {ours}?"
    known = list(setting_keys())
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.75)
    close = close or [by_last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last, 1)]
    return f"; did you mean {close[0]}?" if close else "; vqa/settings/base.yaml names every key"
