"""2:4 structured sparsity: prune, retrain, export, build, measure.

The foundation is `errors`, `files`, `machine`, `products`, `layers` and `metrics`; on it stands a
package for each step, `sparsity`, `training`, `inference`, `measurement` and `serving`, and over
them the course, `tutorial`. Imports go down only: docs/helpers.md shows every module in its place.
"""

__version__ = "0.1.0"
PROJECT = "sparsity-2to4"
