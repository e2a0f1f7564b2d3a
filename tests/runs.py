"""What tests compare of two run directories."""

import json

import torch
from safetensors.torch import load_file


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same_weights(one, other) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(run, without=("seconds", "peak_memory_mib")):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in read]
