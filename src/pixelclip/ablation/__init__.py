"""Grids of training runs, each evaluated: which part of the method is worth what."""
