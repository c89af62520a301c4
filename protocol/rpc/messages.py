"""The four messages of a call, on channel 1 of a control link.

Arrays with an integer tag first; unknown trailing fields are ignored. What `body` means is agreed by method; `detail`
is a JSON object for programs to read.
"""

from typing import Annotated, Final

import msgspec

from protocol.wire.frames import FRAME_PAYLOAD_BYTES_MAX, RemoteProtocolError

METHOD_BYTES_MAX: Final = 64
ERROR_CODE_BYTES_MAX: Final = 64
ERROR_MESSAGE_CHARS_MAX: Final = 2048
ERROR_DETAIL_BYTES_MAX: Final = 16 * 1024
RPC_OVERHEAD_BYTES: Final = 128
RPC_BODY_BYTES_MAX: Final = FRAME_PAYLOAD_BYTES_MAX - RPC_OVERHEAD_BYTES
DEADLINE_MS_MAX: Final = 24 * 3600 * 1000

CallId = Annotated[int, msgspec.Meta(ge=1, le=2**53)]


class _RpcMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    pass


class Request(_RpcMessage, frozen=True, tag=1):
    """Please do this within `remaining_ms` of receiving it. Ids rise by at least one with every request of a link."""

    id: CallId
    method: Annotated[str, msgspec.Meta(max_length=METHOD_BYTES_MAX)]
    remaining_ms: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_MS_MAX)]
    body: bytes


class Reply(_RpcMessage, frozen=True, tag=2):
    """Done; the answer."""

    id: CallId
    body: bytes


class Failure(_RpcMessage, frozen=True, tag=3):
    """Not done, or not known to be done; why, and whether the same request may succeed later."""

    id: CallId
    code: Annotated[str, msgspec.Meta(max_length=ERROR_CODE_BYTES_MAX)]
    message: Annotated[str, msgspec.Meta(max_length=ERROR_MESSAGE_CHARS_MAX)]
    retryable: bool
    detail: Annotated[bytes, msgspec.Meta(max_length=ERROR_DETAIL_BYTES_MAX)] = b""


class Cancel(_RpcMessage, frozen=True, tag=4):
    """Nobody waits for this request's answer any more; none is sent."""

    id: CallId


RpcMessage = Request | Reply | Failure | Cancel

_decoder: Final[msgspec.msgpack.Decoder[RpcMessage]] = msgspec.msgpack.Decoder(RpcMessage)
_encoder: Final = msgspec.msgpack.Encoder()


def encode_rpc(message: RpcMessage) -> bytes:
    """The payload of one frame of channel 1."""
    return _encoder.encode(message)


def decode_rpc(payload: bytes) -> RpcMessage:
    """The message in a frame of channel 1. Raises RemoteProtocolError on anything else."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"an rpc message that cannot be read: {error}") from error
