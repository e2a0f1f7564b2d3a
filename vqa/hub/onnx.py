"""Write a trained model as an ONNX file that answers one question at a time."""

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from vqa.io.errors import InputError, first_line, without_warnings
from vqa.saved_model import SavedModel
from vqa.saved_model.files import save_companions

FILE = "model.onnx"
NEEDED = ("onnx", "onnxscript")


class _OneQuestion(nn.Module):
    """uint8 image [1, S, S, 3] and word ids [1, T] → logits, attention and the deltas that are predicted."""

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        self.model, self.normalise = copy.deepcopy(saved.model), saved.preprocessing.normalise
        for module in self.model.resnet.modules():
            if hasattr(module, "fused"):
                module.fused = False  # plain operations, which ONNX has

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        output = self.model(self.normalise(image), tokens, tokens.new_full((1,), tokens.shape[1]))
        deltas = [] if output.modulation is None else [part for part in output.modulation if part is not None]
        return output.logits, output.attention, *deltas


def save_onnx_folder(saved: SavedModel, folder: Path) -> None:
    """Write `model.onnx` and, as in `model/`, everything but the weights: tokenizer, answers, preprocessing, settings.

    The inputs are `image` (uint8 [1, S, S, 3], RGB, resized) and `tokens` (int64 [1, T], any T ≥ 1); the outputs
    `logits` [1, A], `attention` [1, G, H, W], and `gamma` and `beta` [1, sum of C] where they are predicted.

    Raises:
        InputError: a package is missing, or the exporter cannot express this model.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"--format onnx: needs {' and '.join(missing)}; pip install {' '.join(NEEDED)} onnxruntime")
    size, predictor = saved.preprocessing.size, saved.model.predictor
    example = torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.ones(1, 5, dtype=torch.int64)
    predicted = [name for name in ("gamma", "beta") if predictor is not None and getattr(saved.settings.cbn, name)]
    try:
        with without_warnings:
            program = torch.onnx.export(
                _OneQuestion(saved).eval(),
                example,
                dynamo=True,
                dynamic_shapes={"image": None, "tokens": {1: torch.export.Dim("words", min=1)}},
                input_names=["image", "tokens"],
                output_names=["logits", "attention", *predicted],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"{saved.folder}: torch.onnx cannot express this model ({first_line(error):.150})") from None
    if any(
        isinstance(size, int) for put in program.model.graph.inputs if put.name == "tokens" for size in put.shape[1:]
    ):
        why = f"torch {torch.__version__} exports a recurrent layer for questions of one length only"
        raise InputError(f"--format onnx: {why}; torch 2.15 exports it for all")
    program.save(folder / FILE, external_data=False)
    save_companions(
        folder, saved.settings, saved.tokenizer, saved.answers, saved.preprocessing, text_encoder=saved.text_encoder
    )
