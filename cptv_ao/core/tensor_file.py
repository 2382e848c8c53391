"""A file of tensors and JSON data: safetensors, no pickle; scales and checkpoints are such files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cptv_ao.core.atomic_file import at_once, is_special
from cptv_ao.core.errors import ScalesFileError

# Versions before 4 had no checksum, and were in no release.
_KEY, _VERSION = "cptv_ao", 1


# The checksum is of the whole file with zeros in the place of these hex digits, as it stands in the file's header: JSON
# in a string of JSON.
_UNSET = b"0" * 2 * hashlib.sha256().digest_size


_MARK = rb"\"sha256\": \""


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Write tensors and JSON data under a name, with a checksum, at once: write, fsync, rename.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there before is as it was.
    """
    text = json.dumps({"version": _VERSION, "sha256": _UNSET.decode(), **data})
    # Written here and not by safetensors, whose errors are no OSError.
    content = save({key: value.contiguous() for key, value in tensors.items()}, {_KEY: text})
    at = _checksum_at(content)
    with at_once(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.seek(at)
        file.write(_checksum(content, at))


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON data of a file that `write_file` wrote.

    Raises:
        ScalesFileError: it is damaged, or of another kind or version, or no file.
        OSError: it cannot be read.
    """
    if is_special(path) or Path(path).is_dir():
        raise ScalesFileError(f"{path}: expected a file that save_scales wrote, got something that is no file")
    return parse_file(Path(path).read_bytes(), path)


def parse_file(
    content: bytes, path: str | os.PathLike[str], mend: str = "save it again"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON data of the content of a file; its path, and what can be done, are for messages.

    Raises:
        ScalesFileError: as for `read_file`.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
        data = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ScalesFileError(f"{path}: not a whole safetensors file ({error}); {mend}") from error
    if not isinstance(data, dict):
        raise ScalesFileError(f"{path}: a safetensors file, but not one that cptv_ao wrote (it lacks its metadata)")
    if data.get("version") != _VERSION:
        raise ScalesFileError(f"{path}: expected version {_VERSION}, got {data.get('version')!r}; {mend}")
    at = _checksum_at(content)
    if at < 0 or content[at : at + len(_UNSET)] != _checksum(content, at):
        raise ScalesFileError(
            f"{path}: not a whole safetensors file (damaged or cut off: its checksum is of another content); {mend}"
        )
    try:
        return load(content), {key: value for key, value in data.items() if key != "sha256"}
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ScalesFileError(f"{path}: not a whole safetensors file ({error}); {mend}") from error


def _checksum_at(content: bytes) -> int:
    """Where the checksum of a file stands in it; negative where it has none."""
    at = content.find(_MARK)
    return at + len(_MARK) if at >= 0 else -1


def _checksum(content: bytes, at: int) -> bytes:
    """Of a file whose checksum stands there, in hex digits."""
    view = memoryview(content)
    digest = hashlib.sha256(view[:at])
    digest.update(_UNSET)
    digest.update(view[at + len(_UNSET) :])
    return digest.hexdigest().encode()
