"""Write files in one piece or not at all; checksums and JSON."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from helpers.errors import InputError, WriteError


def shown(path: Path) -> str:
    """Return a path as messages show it.

    It is relative if it is below the working folder, begins with `~` below the home folder, and is
    full elsewhere.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would show where a link leads)
    here, home = Path.cwd(), Path(os.path.expanduser("~"))  # noqa: PTH111 (there may be none)
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return str("~" / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block ends without an error.

    On any error the old file, if there is one, is left unchanged.

    Raises:
        WriteError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, and so on the same file system: only there is a replacement atomic.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        part = Path(name)
        os.close(handle)
        yield part
        part.chmod(0o644)  # only its owner can read a temporary file
        part.replace(path)
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise WriteError(
            f"{shown(path)} could not be written: {cause}, then try again. "
            "What was there before is unchanged."
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Delete what an `atomic_write` to `path` has left that was killed before it ended.

    Nothing else may be writing to `path` at the time.
    """
    for part in Path(path).parent.glob(f".{Path(path).name}.*"):
        part.unlink(missing_ok=True)


def _cause(error: BaseException | None) -> str | None:
    """Return why a file could not be written and what to do; None for any other error."""
    if isinstance(error, WriteError):  # of a call inside this one, about a temporary file
        return _cause(error.__cause__)
    if type(error) is RuntimeError and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save reports what came of it
    code = error.errno if isinstance(error, OSError) else None
    # safetensors and ONNX report a full disk in exceptions of their own.
    if "os error 28" in str(error) or "No space left" in str(error):
        code = errno.ENOSPC
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "its folder is not writable; change its permissions or choose another folder"
        case errno.EEXIST | errno.ENOTDIR:
            return "part of its path is a file, not a folder; move it or choose another folder"
        case errno.EISDIR:
            return "there is a folder of that name; move it or choose another name"
    return None


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as JSON, in one piece or not at all.

    It may contain dataclasses, paths, and NumPy or PyTorch numbers and arrays. NaN and the
    infinities become null: JSON has none of them.

    Raises:
        InputError: `content` has something else that JSON cannot hold; nothing is written.
        WriteError: the disk is full or the folder cannot be written to.
    """
    try:
        text = json_text(content)
    except InputError as error:
        raise InputError(f"{shown(path)} was not written as JSON: {error}") from error
    with atomic_write(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def json_text(content: Any) -> str:
    """Return `content` as JSON; what it may contain is what `write_json` takes.

    Raises:
        InputError: `content` has something else that JSON cannot hold.
    """
    try:
        # `parse_constant` is called for NaN, Infinity and -Infinity only.
        plain = json.loads(json.dumps(content, default=_plain), parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise InputError(f"{error}.") from error
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return a value that JSON cannot hold as one that it can."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a number or an array of NumPy or PyTorch
        return value.tolist()
    raise TypeError(f"JSON cannot hold a value of type {type(value).__name__}")
