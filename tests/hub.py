"""Questions to a folder for `transformers`."""

import torch

QUESTIONS = ["what color is the circle?", "how many?", "is there a zebra to the left of the <pad> square?"]


@torch.inference_mode()
def logits(hub, images, questions=QUESTIONS):
    model, processor = hub
    return model(**processor(images=images, text=questions)).logits
