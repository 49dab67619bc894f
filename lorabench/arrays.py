"""Lists and numpy arrays as Arrow arrays, and back, without pandas.

`pyarrow.array` and `to_numpy` import pandas wherever it is installed, to see whether they were
given something of it: 0.3 s of every command that reads data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def strings(texts: Sequence[str]) -> pa.Array:
    """Return texts as a string array.

    Raises:
        OverflowError: They are longer than the 2 GiB that a string array holds.
    """
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"a string array holds at most 2 GiB; got {ends[-1]:,} bytes")
    places = pa.py_buffer(ends.astype(np.int32))
    return pa.StringArray.from_buffers(len(texts), places, pa.py_buffer(b"".join(encoded)))


def numbers(values: np.ndarray) -> pa.Array:
    """Return integers or floats, (N,), as an array of the same type; one that lies in one piece
    is not copied."""
    import pyarrow as pa

    content = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, content])


def values_of(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Return the integers or floats of a column without nulls, (N,)."""
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])
