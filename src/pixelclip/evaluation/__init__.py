"""Scores of a model on labelled photos."""
