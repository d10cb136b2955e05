"""How much memory one file may ask for: what it takes unpacked is known before it is unpacked.

A file of a kilobyte can say that it holds terabytes of zeros, or hold them without saying so. Sizes
that a file declares are compared with a limit, and no more is unpacked than was declared; what has
no declared size is read up to the limit. It is 2 GB, or as the environment variable
DIFFUSION_UNPACKED_GB says.
"""

from runtime.commandline import BadInput

import bz2
import copy
import io
import lzma
import math
import os
import struct
import zipfile
import zlib

VARIABLE, USUAL = "DIFFUSION_UNPACKED_GB", 2.0
AT_ONCE = 1 << 16  # packed bytes that are read at a time
ENDS_MARKED = 0x2  # a bit of a member's flags: LZMA says itself where it ends


def most_unpacked():
    """The limit in bytes; BadInput for a variable that is no positive number."""
    text = os.environ.get(VARIABLE) or str(USUAL)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise BadInput(f"{VARIABLE}={text}: expected gigabytes, such as {VARIABLE}=8")
    return limit * 1e9


def check_unpacked(what, size):
    """BadInput where `what`, a file or a part of one, takes more bytes than the limit."""
    if size > (limit := most_unpacked()):
        raise BadInput(
            f"{what} takes {size / 1e9:.3g} GB unpacked, more than the {limit / 1e9:g} GB that one "
            f"file may: if it is right, set {VARIABLE}={math.ceil(size / 1e9)}"
        )


def read_member(archive, name, where=""):
    """The bytes of a member of an open ZipFile; BadInput for a torn one, and for too many."""
    where = where or f"{archive.filename}/{name}"
    try:
        with open_member(archive, name, where) as stream:
            return stream.read()
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # a torn zip raises nearly anything
        raise BadInput(f"{where} cannot be read ({error}); pack it anew") from None


def open_member(archive, name, what="it", limited=True):
    """A stream of what a member of an open ZipFile holds; BadInput where it declares too much.

    limited: not where a part of it is read, or it goes to the disk. ValueError while it is read,
    where it holds more or less than it declares. zipfile's own streams unpack at once what they
    have read: of two kilobytes that can be gigabytes.
    """
    member = archive.getinfo(name)
    if limited:
        check_unpacked(what, member.file_size)
    return io.BufferedReader(_Member(archive, member), 1 << 13)


class _Member(io.RawIOBase):
    """A member of a ZipFile, unpacked as it is asked for."""

    def __init__(self, archive, member):
        super().__init__()
        self.archive, self.member = archive, member
        self._begin()

    def readable(self):
        return True

    def seekable(self):
        return True

    def _begin(self):
        packed = copy.copy(self.member)
        packed.compress_type, packed.file_size = zipfile.ZIP_STORED, packed.compress_size
        del packed.CRC  # that of what is unpacked
        self.packed, self.place, self.sum = self.archive.open(packed), 0, 0
        self.unpack = _unpacker(self.member, self.packed)

    def close(self):
        if not self.closed:
            self.packed.close()
        super().close()

    def tell(self):
        return self.place

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_CUR: self.place, os.SEEK_END: self.member.file_size}.get(whence, 0)
        wanted = min(max(0, start + offset), self.member.file_size)
        if wanted < self.place:
            self.packed.close()
            self._begin()
        while self.place < wanted:
            self.read(min(wanted - self.place, 1 << 20))
        return self.place

    def readall(self):
        parts = []
        while left := self.member.file_size - self.place:
            parts.append(self.read(min(left, 1 << 20)))
        return b"".join(parts)

    def readinto(self, buffer):
        left = self.member.file_size - self.place
        part = self.unpack(min(len(buffer), left)) if left else b""
        if left and not part:
            raise ValueError(f"it ends at byte {self.place} of {self.member.file_size}")
        buffer[: len(part)] = part
        self.place, self.sum = self.place + len(part), zlib.crc32(part, self.sum)
        if part and self.place == self.member.file_size:
            if self.unpack(1):
                raise ValueError(f"it holds more than the {self.place} bytes that it declares")
            if self.sum != self.member.CRC:
                raise ValueError("it is torn: its CRC is another")
        return len(part)


def _unpacker(member, packed):
    """A function of n > 0: up to n further bytes of what the stream `packed` holds, b"" at the end.

    ValueError for a way of packing that is not known here.
    """
    head = b""
    match member.compress_type:
        case zipfile.ZIP_STORED:
            return packed.read
        case zipfile.ZIP_DEFLATED:
            stream = zlib.decompressobj(-zlib.MAX_WBITS)
        case zipfile.ZIP_BZIP2:
            stream = bz2.BZ2Decompressor()
        case zipfile.ZIP_LZMA:
            stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=int(most_unpacked()))
            _, length = struct.unpack("<HH", packed.read(4))
            size = 2**64 - 1 if member.flag_bits & ENDS_MARKED else member.file_size
            head = packed.read(length) + struct.pack("<Q", size)  # as .lzma files begin
        case number:
            raise ValueError(f"it is packed by method {number}; pack it anew by deflate")

    def unpack(n):
        nonlocal head
        while not stream.eof:
            # What it was given and could not yet unpack, zlib gives back, and the others keep.
            given, head = head or getattr(stream, "unconsumed_tail", b""), b""
            hungry = not given and getattr(stream, "needs_input", True)
            given = packed.read(AT_ONCE) if hungry else given
            if (part := stream.decompress(given, n)) or hungry and not given:
                return part
        return b""

    return unpack


def read_whole(stream, what):
    """All bytes of a stream that is unpacked while it is read; BadInput beyond the limit."""
    parts, size = [], 0
    while part := stream.read(1 << 20):
        size += len(part)
        check_unpacked(f"{what} (at least)", size)
        parts.append(part)
    return b"".join(parts)
