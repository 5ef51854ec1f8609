"""The steps of 2:4 structured sparsity, one module for each.

docs/helpers.md lists them in the order of reading, each with its notebook; a module knows
only those above it.
"""

__version__ = "0.1.0"
PROJECT = "sparsity-2to4"
