"""The `model/` directory: everything needed to answer questions, in one folder that can be copied.

model.safetensors    all weights, the frozen ResNet's included, and in the metadata what the model was trained on
config.yaml          the settings
tokenizer.json       the vocabulary (tokenizer_config.json beside it: for `transformers`, and limits of a text encoder)
answers.json         the answer vocabulary, in order of the classes
categories.json      the names of the categories of objects, of a model of the task guesswhat
preprocessing.json   the preprocessing of images
question_encoder.json  the configuration of a text encoder of `transformers`, where there is one
"""

from vqa.saved_model.asking import SavedModel
from vqa.saved_model.files import load_model

__all__ = ["SavedModel", "load_model"]
