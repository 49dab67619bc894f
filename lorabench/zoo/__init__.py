"""The embedded base model: the skills it is asked, the recipe that made it, the checkpoint.

Knows nothing about adapters or sweeps. Importing it needs no torch; only `recipe` does.
"""

from pathlib import Path

TINY_GEMMA = Path(__file__).parent / "tiny-gemma"
"""Folder of the committed checkpoint, loadable by plain `AutoModelForCausalLM.from_pretrained`."""
