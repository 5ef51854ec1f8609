"""What JupyterLab may write while somebody learns: the copies in `build/learn/`, and no more.

`make lab` opens the whole project, so that its documents can be read. A notebook that is only
opened is saved sooner or later; the originals must stay as they are.
"""

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from helpers.tutorial.learner_copies import FOLDER


class LearnerFiles(AsyncLargeFileManager):
    """The files of the project, of which JupyterLab shows all but the learner's as read-only."""

    def is_writable(self, path: str) -> bool:
        """Return whether a file or folder may be changed; `path` begins at the project's folder."""
        parts = tuple(path.strip("/").split("/"))
        return parts[: len(FOLDER.parts)] == FOLDER.parts and bool(super().is_writable(path))
