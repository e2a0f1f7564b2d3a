"""A batch and a model for the tests of models."""

import torch
from torch import nn

from vqa.build import build_model
from vqa.settings.recipes import load_settings


def example(batch=3, words=5, vocabulary=20):
    images = torch.randn(batch, 3, 64, 64)
    tokens = torch.randint(2, vocabulary, (batch, words))
    return images, tokens, torch.full((batch,), words)


def model_of(tiny, *words):
    torch.manual_seed(0)
    model = build_model(load_settings(tiny, words), 20, 5, pretrained=False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
