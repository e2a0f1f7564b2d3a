"""Rewrite DAQUAR (Malinowski and Fritz, NIPS 2014) as files of VQA v1: `python -m data.daquar DOWNLOAD FOLDER`."""

import re
import sys
from pathlib import Path

from vqa.io.errors import InputError, printable
from vqa.io.files import read_text, write_json, written_whole
from vqa.io.images import read_image
from vqa.io.progress import progress

_SPLITS = {"train": "train2014", "test": "val2014"}  # of DAQUAR, and what VQA v1 calls them
_IMAGE = re.compile(r"\bimage(\d+)\b")
_SIDE = 256  # pixels of the shorter side


def rewrite(download: Path, folder: Path) -> None:
    """Write questions, annotations and images as `config/daquar.yaml` names them.

    The image's name at the end of a question ("… in the image3 ?") is removed. An answer, of one object or several
    separated by ", ", is repeated ten times, so that the official accuracy is that of an exact match. Images are
    resized to a shorter side of 256 pixels.

    Args:
        download: `qa.894.raw.train.txt` and `qa.894.raw.test.txt`, lines of questions and answers in turn, and the
            folder `nyu_depth_images` with `imageN.png`.
        folder: where the files are written.

    Raises:
        InputError: a file is missing or malformed.
    """
    for number, (split, name) in enumerate(_SPLITS.items(), 1):
        file = download / f"qa.894.raw.{split}.txt"
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if not lines or len(lines) % 2:
            raise InputError(f"{file}: expected a line with an answer after each question; {len(lines)} lines")
        questions, annotations = [], []
        for row, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            if not (found := _IMAGE.findall(question)):
                raise InputError(f"{file}: question {row + 1} names no image: {question[:80]}")
            ids = {"question_id": 1_000_000 * number + row, "image_id": int(found[-1])}
            text = re.sub(r"( in the image\d+)?\s*\?$", "?", question)
            kinds = {
                "question_type": " ".join(text.split()[:2]),
                "answer_type": "number" if answer.isdigit() else "other",
            }
            questions.append(ids | {"question": text})
            annotations.append(
                ids | kinds | {"answers": [{"answer": answer, "answer_id": id_} for id_ in range(1, 11)]}
            )
        images = sorted({question["image_id"] for question in questions})
        for image_id in progress(images, len(images), f"images of {name}"):
            image = read_image(download / "nyu_depth_images" / f"image{image_id}.png")
            scale = _SIDE / min(image.size)
            with written_whole(folder / "images" / name / f"COCO_{name}_{image_id:012d}.jpg") as aside:
                image.resize([round(scale * side) for side in image.size]).save(aside, "JPEG", quality=95)
        write_json(folder / f"mscoco_{name}_annotations.json", {"annotations": annotations}, indent=None)
        write_json(folder / f"OpenEnded_mscoco_{name}_questions.json", {"questions": questions}, indent=None)
        print(f"{name}: {len(questions)} questions about {len(images)} images")


def main() -> int:
    """Run the command; the exit code is 2 if the user's input is wrong."""
    try:
        if len(sys.argv) != 3:
            raise InputError("usage: python -m data.daquar DOWNLOAD FOLDER")
        rewrite(*map(Path, sys.argv[1:]))
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
