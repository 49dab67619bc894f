"""A file's bytes as text: compression, encoding, and what a file is in spite of its name."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

BLOCK_BYTES = 1 << 20
BOMS = (  # UTF-32's before UTF-16's, which begins with the same two bytes
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LONGEST_BOM = max(len(mark) for mark, _ in BOMS)
# What a file begins with, what it is then, and what to do about it.
FOREIGN = (
    (b"PAR1", "a parquet file", "rename it to end with .parquet"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `zstd -d`"),
    (b"BZh", "compressed with bzip2", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it with `unxz`"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save it as csv"),
    (b"ARROW1", "an Arrow file", "write it as parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull`"),
)
GZIP = b"\x1f\x8b"


class Refused(ValueError):
    """A file that cannot be read, in the parts of a config error.

    Args:
        law: What must hold, after "must".
        came: What was found, and where.
        remedy: What to do about it.
    """

    def __init__(self, law: str, came: str, remedy: str) -> None:
        super().__init__(f"must {law}; {came}; {remedy}")

    def line(self, key: str) -> str:
        """Return the error as one line about a config key."""
        return f"{key}: {self}"


class _Hashed(io.RawIOBase):
    """A file that feeds a digest with the bytes read from it."""

    def __init__(self, file: io.FileIO, digest: Any) -> None:
        self.file, self.digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        return count


@contextmanager
def opened(path: Path, unpack: bool, digest: Any = None) -> Iterator[BinaryIO]:
    """Open a file for reading its unpacked bytes once, from start to end.

    Args:
        unpack: Whether the file must be gzip; otherwise it must not be.
        digest: A hashlib object. On leaving without an error it has been fed with every byte of
            the file as it is stored, whether or not the reader has asked for all of them.
    Raises:
        Refused: The file is compressed although it should not be, or the reverse, or it is torn.
        OSError: It cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as raw:
        source = raw if digest is None else _Hashed(cast(io.FileIO, raw), digest)
        stored = io.BufferedReader(cast(io.RawIOBase, source), BLOCK_BYTES)
        is_gzip = stored.peek(2)[:2] == GZIP
        if is_gzip and not unpack:
            remedy = f"rename it to '{path.name}.gz', or unpack it with `gunzip`"
            raise Refused("be what its name says", f"'{path}' is compressed with gzip", remedy)
        if unpack and not is_gzip and stored.peek(1):
            raise Refused("be gzip, as its name says", f"'{path}' is not", "remove .gz of its name")
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=stored) if unpack else stored)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            came = f"'{path}' is torn: {str(error).rstrip('.')}"
            raise Refused("be a whole gzip file", came, "fetch or pack it again") from error
        while stored.read(BLOCK_BYTES):
            pass


def text_blocks(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yield a file's text in blocks: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        Refused: It is something else; names the byte (of the unpacked file) and the line.
    """
    block = file.read(BLOCK_BYTES)
    while len(block) <= LONGEST_BOM and (more := file.read(BLOCK_BYTES)):
        block += more  # what follows a byte order mark is not the end of the file
    for magic, what, remedy in FOREIGN:
        if block.startswith(magic):
            raise Refused("be what its name says", f"'{path}' is {what}", remedy)
    bom, encoding = next(((b, e) for b, e in BOMS if block.startswith(b)), (b"", "utf-8"))
    if not bom and b"\0" in block:
        first = block.index(b"\0")
        name = "UTF-16LE" if first % 2 else "UTF-16BE"
        raise Refused(
            "be UTF-8 text",
            f"{path} holds a zero byte at {first}: UTF-16 without a byte order mark, or no text",
            f"convert the file: iconv -f {name} -t UTF-8 '{path}' > NEW",
        )
    decoder = codecs.getincrementaldecoder(encoding)()
    num_bytes, num_lines = len(bom), 0
    block = block[len(bom) :]
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = num_bytes + len(block) - len(error.object) + error.start
            before = error.object[: error.start].decode(encoding, "ignore").count("\n")
            source = "WINDOWS-1252" if encoding == "utf-8" else encoding.upper()
            raise Refused(
                f"be {encoding.upper()} text",
                f"{error.reason} in line {num_lines + before + 1} of {path} (byte {at})",
                f"convert the file, or unpack it; for example iconv -f {source} -t UTF-8 "
                f"'{path}' > NEW",
            ) from error
        num_lines += text.count("\n")
        num_bytes += len(block)
        if text:
            yield text
        if not block:
            return
        block = file.read(BLOCK_BYTES)


def lines(blocks: Iterator[str]) -> Iterator[str]:
    """Yield lines with their ends; they end at \\n alone, as U+2028 may stand in the data."""
    rest: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest) + "\n"
            yield from (f"{line}\n" for line in others[:-1])
            rest = [others[-1]]
    if last := "".join(rest):
        yield last
