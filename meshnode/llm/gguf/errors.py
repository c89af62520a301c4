"""What is wrong with a model file, in words that name what and where.

It leaves to the caller what to do about it: refuse the file, fetch it from elsewhere, ask for more bytes.
"""

from meshnode.kernel.errors import ErrorCode, MeshError


class GgufError(MeshError):
    """The file is not a GGUF that this agent accepts, or cannot be cut as asked.

    `at` is the byte offset where it showed, if there is one. Nothing was changed; the same bytes will fail again.
    """

    def __init__(self, message: str, *, at: int | None = None) -> None:
        where = "" if at is None else f" (byte {at})"
        super().__init__(ErrorCode.BAD_REQUEST, message + where, detail={} if at is None else {"at": at})
        self.at = at


class MoreBytesError(Exception):
    """The header is sound as far as it goes: fetch the file's first `bytes_needed` bytes at least and read again."""

    def __init__(self, bytes_needed: int) -> None:
        super().__init__(f"the first {bytes_needed} bytes are needed")
        self.bytes_needed = bytes_needed
