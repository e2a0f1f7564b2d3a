"""Write the demo's page: the baseline compared with MODERN, examples, and the inspection of one question."""

from pathlib import Path
from typing import Any

from PIL import Image

from vqa.inspect.html import inline_image, inspection_view, signed, write_page

# name in summary.json: name on the page, what it is
NAMES = {
    "blind": ("blind", "the most common answer to the question, without the image"),
    "baseline": ("baseline", "frozen ResNet"),
    "modern": ("MODERN", "the same ResNet with CBN in all stages"),
}


def write_demo(path: Path, demo: dict[str, Any], inspection: dict[str, Any], image: Image.Image) -> None:
    """Write the page.

    Args:
        path: the file.
        demo: the content of `summary.json`, `questions` (their number), `curves` (percent per epoch, by model),
            `settings`, `commands` and `examples` (`image`, `question`, `truth`, and the answers of each model).
        inspection: the content of `modulation.json`.
        image: the image of the inspection.
    """
    write_page(
        path,
        "demo.html",
        [Path(__file__).parent / "templates"],
        demo=demo | {"examples": [each | {"image": inline_image(each["image"])} for each in demo["examples"]]},
        models=NAMES,
        gap=signed(demo["modern"]["overall"] - demo["baseline"]["overall"], 1),
        view=inspection_view(inspection, image),
    )
