"""The embedded base models: the skills they are asked, the recipes that made them, the checkpoints.

Knows nothing about adapters or sweeps. Importing it needs no torch; only the recipes do.
"""

from pathlib import Path

TINY_GEMMA = Path(__file__).parent / "tiny-gemma"
"""Folder of the committed checkpoint, loadable by plain `AutoModelForCausalLM.from_pretrained`."""

TINY_BERT = Path(__file__).parent / "tiny-bert"
"""The same for `AutoModelForSequenceClassification`: it adds its `classifier` to this encoder."""
