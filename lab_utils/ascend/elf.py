"""Names in 64-bit little-endian ELF files, as far as building the stand-in needs them; binutils isn't everywhere."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_SECTION = struct.Struct(
    "<IIQQQQIIQQ"
)  # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, align, entry
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym: name, info, other, section, value, size
_DYNSYM, _DYNAMIC = 11, 6  # SHT_DYNSYM, SHT_DYNAMIC
_NEEDED = 1  # DT_NEEDED


def undefined(file: Path) -> set[str]:
    """Names of the dynamic symbols that a shared object expects of others.

    Raises:
        ValueError: not a 64-bit little-endian ELF file.
    """
    with _opened(file) as data:
        return {
            _name(data, strings + name)
            for table, strings, size in _tables(data, _DYNSYM)
            for name, _, _, section, _, _ in _SYMBOL.iter_unpack(data[table : table + size])
            if name and section == 0
        }


def needed(file: Path) -> list[str]:
    """Names of the libraries that a shared object asks the loader for.

    Raises:
        ValueError: not a 64-bit little-endian ELF file.
    """
    with _opened(file) as data:
        return [
            _name(data, strings + value)
            for table, strings, size in _tables(data, _DYNAMIC)
            for tag, value in struct.iter_unpack("<qQ", data[table : table + size])
            if tag == _NEEDED
        ]


def texts(file: Path, pattern: bytes) -> set[str]:
    """Whole zero-ended strings within a file that match: names that it looks up at run time.

    Raises:
        ValueError: not a 64-bit little-endian ELF file.
    """
    with _opened(file) as data:
        return {found[1].decode() for found in re.finditer(rb"(?<=\0)(" + pattern + rb")(?=\0)", data)}


def _opened(file: Path) -> mmap.mmap:
    with file.open("rb") as raw:
        head = raw.read(6)
        if head != b"\x7fELF\x02\x01":
            raise ValueError(f"{file}: not a 64-bit little-endian ELF file.")
        return mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)


def _tables(data: mmap.mmap, kind: int) -> Iterator[tuple[int, int, int]]:
    """Sections of a kind: (start, start of their strings, bytes)."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    entry, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, start + i * entry) for i in range(count)]
    for _, found, _, _, offset, size, link, *_ in sections:
        if found == kind:
            yield offset, sections[link][4], size


def _name(data: mmap.mmap, at: int) -> str:
    return data[at : data.find(b"\0", at)].decode()
