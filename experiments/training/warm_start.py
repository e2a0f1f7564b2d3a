"""Warm start (`train --init-from`): a new model takes a trained model's weights where name and shape fit."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from vqa.io.errors import InputError
from vqa.model import ConditionedModel
from vqa.saved_model import SavedModel
from vqa.settings.schema import Settings
from vqa.text.answers import normalise_answer

MOST_NAMED = 20  # parts of the model that were not taken


def take_weights(
    model: ConditionedModel,
    saved: SavedModel,
    words: Mapping[str, int],
    answers: Sequence[str],
    categories: Sequence[str],
    say: Callable[[str], None],
) -> set[str]:
    """Sets the weights of a new model, with the vocabulary `words`, the classes `answers` and the `categories` of
    objects, to those of a saved one.

    Rows for words, categories and answers are matched by their texts; GloVe's vectors stay those of the new model. The
    ResNet is taken whole or not at all, and so is a text encoder, whose tokens have to be the same. `say` gets a line
    with what was taken and what keeps its initial values; the names of what was taken are returned.
    """
    ours, theirs, their_words = model.state_dict(), saved.model.state_dict(), saved.tokenizer.get_vocab()
    layer = len(model.fusion.answer) - 1  # the last one, with a row for each answer
    by_word = _common_rows(words, their_words)
    classes = ({normalise_answer(text): row for row, text in enumerate(of)} for of in (answers, saved.answers))
    by_answer = _common_rows(*classes)
    by_category = _common_rows(*({name: row for row, name in enumerate(of)} for of in (categories, saved.categories)))
    rows = {"question.embedding.weight": by_word, "category.weight": by_category}
    rows |= {f"fusion.answer.{layer}.{part}": by_answer for part in ("weight", "bias")}

    unfit = ["question.fixed."]
    for part, whole in (("resnet.", "resnet."), ("question.", "question.encoder.")):
        names = [name for name in ours if name.startswith(whole)]
        other_tokens = part == "question." and words != their_words
        if names and (other_tokens or any(not _fits(ours[name], theirs.get(name)) for name in names)):
            # the statistics of a condition on the image are those of a ResNet's maps
            unfit += ["resnet.", "image."] if part == "resnet." else [part]
    if layer != len(saved.model.fusion.answer) - 1:
        unfit.append("fusion.answer.")
    if model.kinds is not None and words != their_words:  # kinds are word ids, and the predictor has a row for each
        unfit += ["kinds.", "predictor."]

    taken: dict[str, Tensor] = {}
    for name, value in ours.items():
        found = theirs.get(name)
        if name.startswith(tuple(unfit)) or not _fits(value, found, of_rows=name in rows):
            continue
        taken[name] = found
        if name in rows:
            mine, its = rows[name]
            taken[name] = value.clone()
            taken[name][mine] = found[its]
    model.load_state_dict(ours | taken)
    texts = f"{len(by_word[0])} of {len(words)} words and {len(by_answer[0])} of {len(answers)} answers match"
    say(f"{saved.folder}: {len(taken)} of {len(ours)} tensors taken, {texts}{_not_taken(ours, taken)}")
    return set(taken)


def splits_seen(saved: SavedModel, settings: Settings) -> list[str]:
    """The splits whose file of questions has the name of one that a saved model was trained on. Raises InputError if
    one of them is to be validated on.
    """
    here, there, trained = settings.data.splits, saved.settings.data.splits, saved.training.get("trained_on", [])
    files = {there[split].questions for split in trained if split in there}
    seen = [split for split, its_files in here.items() if its_files.questions in files]
    seen += [split for split in trained if split not in here and split not in there]
    if (split := settings.train.validate_on) in seen:
        trained_on = f"{saved.folder} was trained on the questions of split {split!r}"
        raise InputError(f"train.validate_on: {trained_on}; use another split or null")
    return seen


def _fits(value: Tensor, found: Tensor | None, *, of_rows: bool = False) -> bool:
    """Whether a tensor has the shape of `value`; `of_rows`, the shape of its rows."""
    first = 1 if of_rows else 0
    return found is not None and found.shape[first:] == value.shape[first:]


def _common_rows(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The rows of the texts that both have."""
    common = ours.keys() & theirs.keys()
    return [ours[text] for text in common], [theirs[text] for text in common]


def _not_taken(ours: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> str:
    """Names what keeps its initial values: the largest parts of the model of which nothing was taken, and tensors."""
    of_taken = {part for name in taken for part in _parts(name)}
    left = (next(part for part in _parts(name) if part not in of_taken) for name in ours if name not in taken)
    named = list(dict.fromkeys(left))
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"; not taken: {', '.join(named[:MOST_NAMED])}{more}" if named else ""


def _parts(name: str) -> list[str]:
    """`a.b.c` → `a.*`, `a.b.*`, `a.b.c`."""
    words = name.split(".")
    return [".".join([*words[:depth], "*"]) for depth in range(1, len(words))] + [name]
