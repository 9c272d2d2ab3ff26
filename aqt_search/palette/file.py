"""Weights with palettes in one file: an .npz whose bytes are those of the arrays.

It holds two members: `data`, the bytes of all arrays one behind another, and `header`, a compressed
JSON list of what they are. Members of their own would cost a few hundred bytes an array, more than
a small layer at 2 bits.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from aqt_search.palette.rules import PaletteError
from aqt_search.palette.storage import PalettedTensor
from aqt_search.training.storage import read_bytes
from aqt_search.training.workdir import write_whole

_VERSION = 1
# What reading bytes that are no such file raises.
_DAMAGE = (
    AttributeError, EOFError, IndexError, KeyError, OSError, TypeError, ValueError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        if not isinstance(key, str):
            raise PaletteError(f"Weights are saved from dicts with names as keys; got key {key!r}.")
        yield from _leaves(value, (*path, key))


def _is_numeric(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_


def _member(archive: zipfile.ZipFile, name: str, array: np.ndarray, compression: int) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    # A fixed date, so that equal weights are equal files.
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    archive.writestr(info, content.getvalue(), compress_type=compression)


def encoded(params: Any) -> bytes:
    """The file's bytes: of nested dicts of arrays and `PalettedTensor`s, all bits kept.

    Also of plain float weights, to compare sizes with.

    Raises:
      PaletteError: the tree holds something else.
    """
    header: list[dict[str, Any]] = []
    parts = [np.zeros(0, np.uint8)]
    for path, leaf in _leaves(params):
        if not path:
            raise PaletteError(f"Weights are saved from nested dicts; got {type(leaf).__name__}.")
        entry: dict[str, Any] = {"path": path}
        arrays = [leaf]
        if isinstance(leaf, PalettedTensor):
            entry |= {"bits": leaf.bits, "shape": leaf.shape}
            arrays = [leaf.data, leaf.palette]
        arrays = [np.asarray(array) for array in arrays]
        if not all(_is_numeric(array.dtype) for array in arrays):
            raise PaletteError(f"Cannot save {'/'.join(path)!r}: it is no array of numbers.")
        entry["arrays"] = [[array.dtype.name, array.shape] for array in arrays]
        header.append(entry)
        parts += [np.frombuffer(array.tobytes(), np.uint8) for array in arrays]
    text = json.dumps({"version": _VERSION, "leaves": header}, separators=(",", ":"))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        described = np.frombuffer(text.encode(), np.uint8)
        _member(archive, "header", described, zipfile.ZIP_DEFLATED)
        _member(archive, "data", np.concatenate(parts), zipfile.ZIP_STORED)
    return content.getvalue()


def save(path: str | os.PathLike, params: Any) -> int:
    """Writes the file whole or not at all, and returns its bytes.

    Raises:
      PaletteError: as `encoded`.
      WorkdirError: the file cannot be written; what was there before is untouched.
    """
    content = encoded(params)
    write_whole(path, content)
    return len(content)


def load(path: str | os.PathLike) -> Any:
    """What `save` wrote, bit for bit: nested dicts of numpy arrays and `PalettedTensor`s of them.

    Raises:
      FileNotFoundError: no such file.
      PaletteError: the file is damaged or another program's.
    """
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as members:
            header, data = json.loads(members["header"].tobytes()), members["data"].tobytes()
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']}, of which this one knows nothing")
        return _decoded(header["leaves"], data)
    except _DAMAGE as error:
        raise PaletteError(
            f"{path} holds no weights with palettes: {error}. It is damaged or another program's;"
            " save it again."
        ) from error


def _decoded(leaves: list[Mapping[str, Any]], data: bytes) -> Any:
    tree: dict[str, Any] = {}
    offset = 0
    for entry in leaves:
        arrays = []
        for name, shape in entry["arrays"]:
            dtype = jnp.dtype(name)
            end = offset + math.prod(shape) * dtype.itemsize
            arrays.append(np.frombuffer(data[offset:end], dtype).reshape(shape))
            offset = end
        if "bits" in entry:
            codes, palette = arrays
            leaf = PalettedTensor(codes, palette, tuple(entry["shape"]), entry["bits"])
        else:
            (leaf,) = arrays
        *parents, last = entry["path"]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    if offset != len(data):
        raise ValueError(f"{len(data)} bytes of arrays, of which {offset} are described")
    return tree
