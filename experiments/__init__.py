"""Train, evaluate, ablate, measure."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the checkout
