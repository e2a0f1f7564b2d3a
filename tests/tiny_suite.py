"""A suite of two rows, one of which fails; one whose second seed has another backbone; settings that make runs tiny."""

from tests.conftest import ROOT

SUITE = f"""\
title: Two runs
recipe: {ROOT}/config/demo.yaml
seeds: [1, 2]
baseline: none
runs:
  none: {{settings: "cbn.stages=[]"}}
  lost: {{settings: "cbn.stages=[] question.glove=nowhere.txt"}}
"""
# its first row alone, with a backbone of its own for the second seed
TWO_BACKBONES = SUITE[: SUITE.index("  lost")].replace(
    "[1, 2]", '{1: "", 2: "backbone.seed=5 backbone.weights=five.safetensors"}'
)
TINY = (
    "device=cpu",
    "backbone.name=resnet10",
    "attention.units=8",
    "answer.fusion_size=16",
    "answer.hidden_size=8",
    "question.embedding_size=8",
    "question.hidden_size=16",
    "scenes.images={train: 4, val: 2, test: 2}",
    "scenes.pretrain_size=64",
    "scenes.pretrain_images=64",
    "scenes.pretrain_epochs=1",
    "train.epochs=1",
    "train.batch_size=8",
    "data.processes=1",
    "workers=0",
)
