"""A finished run written for others to load, and checked against the run before it is in place.

source     the run: its record, its config, the base it was trained on
agreement  how far apart the logits of two models lie, and what rounding alone would do to them
write      adapter and merged folders, whole or not at all
"""
