"""Write files in one piece or not at all, and tell whether one has changed."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.errors import WriteError


def shown(path: Path) -> str:
    """Return `path` as a reader types it: relative to the working folder where it lies below it."""
    path = Path(path).resolve()
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` only if all went well.

    Whatever stood at `path` before stays untouched on any error.

    Raises:
        WriteError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        part = Path(name)
        os.close(handle)
        yield part
        part.chmod(0o644)  # a temporary file is its owner's alone
        part.replace(path)
    except OSError as error:
        raise _explained(error, path) from error
    except Exception as error:
        # safetensors and onnx report a full disk in exceptions of their own.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _explained(OSError(errno.ENOSPC, ""), path) from error
        raise
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _explained(error: OSError, path: Path) -> Exception:
    """Turn the operating system's refusal to write into a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = "the disk is full; free some space"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cause = "the folder cannot be written to; change its permissions or choose another folder"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        cause = "a file stands where the folder should be; move it or choose another folder"
    else:
        return error
    return WriteError(
        f"{path.name} could not be written to {path.parent}: {cause}, then run this "
        "again. Nothing that was there before has been changed."
    )


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as JSON, in one piece or not at all.

    It may hold dataclasses. NaN becomes null, since JSON has no NaN.
    """
    plain = _without_nan(json.loads(json.dumps(content, default=asdict)))
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as part:
        part.write_text(text + "\n")
    return Path(path)


def _without_nan(content: Any) -> Any:
    match content:
        case dict():
            return {key: _without_nan(value) for key, value in content.items()}
        case list():
            return [_without_nan(value) for value in content]
        case float() if math.isnan(content):
            return None
    return content
