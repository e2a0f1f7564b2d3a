"""Write a trained model for other programs: a folder for `transformers`, or ONNX."""

from pathlib import Path
from typing import Any

from vqa.io.errors import InputError
from vqa.io.files import check_room, read_json, written_whole
from vqa.saved_model.files import load_model, weight_files


def export(run: Path, to: Path, form: str) -> None:
    """Writes the model of `run` into the new folder `to`, whole or not at all.

    Args:
        run: a run directory, or a `model/` directory.
        to: a folder that does not exist or is empty.
        form: `hub`, for `transformers`, or `onnx`.

    Raises:
        InputError: no model, or one of another task than VQA, `to` is not empty or cannot be written, a
            `metrics_SPLIT.json` of `run` is malformed, or a package is missing.
    """
    to = to.absolute()
    if to.exists() and (to.samefile(".") or not to.is_dir() or any(to.iterdir())):  # it is replaced
        raise InputError(f"{to}: must be a new folder, or an empty one other than the present one")
    saved = load_model(run)
    if (task := saved.settings.task) != "vqa":
        raise InputError(f"{saved.folder}: a model of the task {task} cannot be exported; vqa.load reads it as it is")
    check_room(to, sum(file.stat().st_size for file in weight_files(saved.folder)), "name another folder")
    with written_whole(to) as aside:
        aside.mkdir()
        if form == "hub":
            from vqa.hub.folder import save_hub_folder

            save_hub_folder(saved, aside, _scores(run, saved.folder))
        else:
            from vqa.hub.onnx import save_onnx_folder

            save_onnx_folder(saved, aside)


def _scores(run: Path, model: Path) -> list[dict[str, Any]]:
    """The scores that `eval` wrote into the run directory since the model was saved."""
    scores, wanted = [], {"split": str, "questions": int, "overall": float}
    for file in sorted(run.glob("metrics_*.json")):
        if file.stat().st_mtime < max(weights.stat().st_mtime for weights in weight_files(model)):
            print(f"{file}: older than the model, so not in its card; `eval` measures it again")
            continue
        content = read_json(file)
        try:
            scores.append({name: kind(content[name]) for name, kind in wanted.items()} | {"file": file.name})
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{file}: not the metrics of a split; `eval` writes them again") from None
    return scores
