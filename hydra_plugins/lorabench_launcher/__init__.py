"""Hydra launcher `packed`: every job of a multirun planned before the first one runs."""
