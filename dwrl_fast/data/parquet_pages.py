"""An upper bound of the value sizes in a Parquet file, from its page headers and levels, before Arrow reads the file.

A cell is within one page, so no cell is larger than the largest page. A list may extend over many pages; it starts at a
repetition level of 0. If its cells are in a dictionary, a small page may hold any number of them. The averages in the
footer would not show one large value among thousands of small ones. pyarrow does not expose page headers.

Source: the format's specification (parquet.thrift, Thrift's compact protocol, the RLE/bit-packing hybrid encoding).
"""

import importlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

DATA, DICTIONARY, DATA_2 = 0, 2, 3  # kinds of pages
PLAIN, DELTA_LENGTHS = 0, 6  # encodings in which a page contains all bytes of its cells
IN_DICTIONARY = (2, 8)  # encodings in which it contains indices of the chunk's dictionary
NUMBER = 16  # maximum bytes of a cell that is not text
OBJECT = 64  # bytes that Python needs for a value in addition to its text
WALKED = 16 << 20  # bytes of a dictionary; in a larger one each cell counts as the whole dictionary
DEPTH = 4  # levels of nested structs
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12  # Thrift's types


class Page(NamedTuple):
    """The header of a page. size, compressed: bytes. values: their number. body: offset in the file. levels: in a page
    of version 2, the bytes of its uncompressed repetition levels; None in version 1.
    """

    kind: int
    size: int
    compressed: int
    values: int
    encoding: int
    body: int
    levels: int | None


class Parts(NamedTuple):
    """Numbers of values of a page: in the list that started before it (head), in the longest list within it (whole),
    and in the last list, which may continue (tail). begins: whether any list starts in it.
    """

    begins: bool
    head: int
    whole: int
    tail: int


def largest_value(file: BinaryIO, chunk: Any, depth: int, most: int) -> int:
    """An upper bound of the decompressed bytes of one row's value in a column chunk. chunk: pyarrow's
    ColumnChunkMetaData. depth: the number of lists around its cells. most: the limit of interest; lists are separated
    only if the whole chunk may exceed it. Raises ValueError if the file does not follow the format.
    """
    found = list(_pages(file, chunk))
    largest = max((page.size for page in found), default=0)
    if not depth or largest > most:
        return largest
    cell = max((_longest(file, chunk, page) for page in found if page.kind == DICTIONARY), default=0)
    data = [page for page in found if page.kind != DICTIONARY]
    if sum(_bytes_of(page, page.values, cell) for page in data) <= most:
        return max(largest, cell)
    so_far = 0  # bytes of the list that may continue
    for page in data:
        parts = _parts(_levels(file, chunk, page), depth.bit_length(), page.values)
        head, whole, tail = (_bytes_of(page, values, cell) for values in (parts.head, parts.whole, parts.tail))
        largest = max(largest, so_far + head, whole)
        so_far = tail if parts.begins else so_far + head
    return max(largest, so_far)


def _bytes_of(page: Page, values: int, cell: int) -> int:
    """An upper bound of the bytes of some of a page's values as Python objects. cell: the longest dictionary cell."""
    if page.encoding in (PLAIN, DELTA_LENGTHS):
        return page.size + OBJECT * values
    return (OBJECT + (cell if page.encoding in IN_DICTIONARY else page.size)) * values


def _longest(file: BinaryIO, chunk: Any, page: Page) -> int:
    """The bytes of the longest cell of a dictionary page."""
    if chunk.physical_type != "BYTE_ARRAY":
        return NUMBER
    if page.size > WALKED:
        return page.size
    body, place, longest = _body(file, chunk, page), 0, 0
    while place < len(body):
        size = int.from_bytes(body[place : place + 4], "little")
        longest, place = max(longest, size), place + 4 + size
    return longest


def _pages(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk up to its last value, in the order of a reader."""
    place = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0)
    seen = 0
    while seen < chunk.num_values:
        file.seek(place)
        header = _struct(file, DEPTH)
        kind, size, compressed = (header.get(number, -1) for number in (1, 2, 3))
        own = header.get({DATA: 5, DICTIONARY: 7, DATA_2: 8}.get(kind, 6), {})
        values = own.get(1, 0)
        if min(size, compressed, values) < 0:
            raise ValueError("a page without a size")
        encoding, levels = (own.get(4, -1), own.get(6, 0)) if kind == DATA_2 else (own.get(2, -1), None)
        page = Page(kind, size, compressed, values, encoding, file.tell(), levels)
        place = page.body + compressed
        if kind in (DATA, DATA_2):
            seen += values
        if kind in (DATA, DATA_2, DICTIONARY):
            yield page


def _body(file: BinaryIO, chunk: Any, page: Page) -> bytes:
    file.seek(page.body)
    body = file.read(page.compressed)
    if chunk.compression == "UNCOMPRESSED":
        return body
    codec = importlib.import_module("pyarrow").Codec(chunk.compression.lower())
    return codec.decompress(body, page.size, asbytes=True)  # type: ignore[no-any-return]


def _levels(file: BinaryIO, chunk: Any, page: Page) -> bytes:
    """A page's repetition levels, encoded."""
    if page.levels is not None:
        file.seek(page.body)
        return file.read(page.levels)
    body = _body(file, chunk, page)
    return body[4 : 4 + int.from_bytes(body[:4], "little")]


def _parts(levels: bytes, width: int, values: int) -> Parts:
    """The parts of a page from its `values` levels of `width` bits, encoded as runs and as packed bits."""
    begins, head, whole, current, place, left = False, 0, 0, 0, 0, values
    while left > 0:
        run, place = _varint(levels, place)
        size = width * (run >> 1) if run & 1 else (width + 7) // 8
        held, place = levels[place : place + size], place + size
        if run & 1:
            bits = np.unpackbits(np.frombuffer(held, np.uint8), bitorder="little")
            zeros = np.flatnonzero(~bits[: len(bits) // width * width].reshape(-1, width).any(1))
            count = min(left, 8 * (run >> 1))
            zeros = zeros[zeros < count]
        else:
            count = min(left, run >> 1)
            zeros = np.arange(0 if any(held) else min(count, 2)) * max(1, count - 1)  # the first and the last of them
        if count == 0:
            raise ValueError("an empty run")
        left -= count
        if not len(zeros):
            current += count
            continue
        before = current + int(zeros[0])
        head, whole = (head, max(whole, before)) if begins else (before, whole)
        whole = max(whole, int(np.diff(zeros).max(initial=0)) if run & 1 else 1)
        begins, current = True, count - int(zeros[-1])
    return Parts(begins, head if begins else current, whole, current if begins else 0)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
    raise ValueError("a number that does not end")


# Thrift's compact protocol


def _struct(file: BinaryIO, depth: int) -> dict[int, Any]:
    """The integers and structs of a struct, by field number. A page header contains no lists."""
    found: dict[int, Any] = {}
    number = 0
    while head := _byte(file):
        step, kind = head >> 4, head & 15
        number = number + step if step else _signed(file)
        if kind in INTEGERS:
            found[number] = _signed(file)
        elif kind == STRUCT and depth:
            found[number] = _struct(file, depth - 1)
        elif kind in (BYTE, DOUBLE, BINARY):
            file.seek({BYTE: 1, DOUBLE: 8}.get(kind) or _unsigned(file), 1)
        elif kind not in BOOLEANS:
            raise ValueError("a page header with an unknown type")
    return found


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("a page past the end of the file")
    return byte[0]


def _unsigned(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number that does not end")


def _signed(file: BinaryIO) -> int:
    value = _unsigned(file)
    return value >> 1 ^ -(value & 1)
