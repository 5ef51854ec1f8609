"""What can go wrong while a model is built or run. Shown in `06_infer_and_benchmark.ipynb`."""

from helpers.errors import UnavailableError


class EngineError(UnavailableError):
    """No engine builder is installed, or it could not build."""


class RunnerError(UnavailableError):
    """A runner is not available here, or cannot run this model."""


class DeadContextError(UnavailableError):
    """CUDA no longer works in this process: every later call on the GPU would fail."""
