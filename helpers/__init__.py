"""2:4 structured sparsity: prune, retrain, export, build, measure.

A foundation (`errors`, `files`, `machine`, `layers`, `metrics`), on it a package for each
step (`sparsity`, `training`, `inference`, `measurement`), and over them the course
(`tutorial`). Imports go down only; docs/helpers.md shows every module in its place.
"""

__version__ = "0.1.0"
PROJECT = "sparsity-2to4"
