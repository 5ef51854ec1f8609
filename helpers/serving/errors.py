"""What can go wrong while models are served. Shown in `09_serve_with_triton.ipynb`."""

from helpers.errors import UnavailableError


class ServingError(UnavailableError):
    """Triton does not run on this machine, or a server did not start."""
