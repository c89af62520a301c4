"""The first words on a connection: read and written one frame at a time, not a byte beyond.

What to answer is decided elsewhere; who may speak at all was decided before, by key.
"""

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.tls import StreamBroken, TlsStream
from protocol.ids import NodeId
from protocol.wire.frames import (
    HELLO_FRAME_BYTES_MAX,
    REASON_BYTES_MAX,
    Channel,
    FrameDecoder,
    Hello,
    HelloOk,
    LinkMessage,
    Refused,
    RemoteProtocolError,
    Versions,
    decode_link_message,
    encode_link_message,
    refuse_versions,
    strange_for_its_version,
)


async def _read_message(stream: TlsStream) -> LinkMessage:
    decoder = FrameDecoder(frame_bytes_max=HELLO_FRAME_BYTES_MAX)
    while (frame := decoder.next_frame()) is None:
        data = await stream.receive_some(decoder.missing_bytes)
        if not data:
            raise StreamBroken("it closed the connection")
        decoder.feed(data)
    if frame.channel != Channel.LINK:
        raise RemoteProtocolError(f"a frame on channel {frame.channel} before HELLO")
    return decode_link_message(frame.payload)


async def read_hello(stream: TlsStream) -> Hello:
    """The client's first message. Raises StreamBroken or RemoteProtocolError."""
    message = await _read_message(stream)
    if not isinstance(message, Hello):
        raise RemoteProtocolError(f"{type(message).__name__} before HELLO")
    return message


async def greet(stream: TlsStream, hello: Hello) -> HelloOk | Refused:
    """Say hello and wait for the answer, which may be a refusal that was sent before ours arrived.

    Raises StreamBroken or RemoteProtocolError. Before a HelloOk comes back, nothing on this connection is believed.
    """
    try:
        await stream.send_all(encode_link_message(hello))
    except StreamBroken:
        # A server that refuses does not wait to be greeted: its answer may lie there although sending failed.
        return _answer(await _read_message(stream))
    return _answer(await _read_message(stream))


def _answer(message: LinkMessage) -> HelloOk | Refused:
    if not isinstance(message, HelloOk | Refused):
        raise RemoteProtocolError(f"{type(message).__name__} instead of an answer to HELLO")
    return message


def refusal(error: MeshError, versions: Versions, tombstone: bytes = b"") -> Refused:
    """What a connection that is not wanted gets to hear."""
    message = error.message.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
    return Refused(error.code.value, message, error.retryable, versions.min, versions.max, tombstone)


def refused_by(node_id: NodeId, refused: Refused, ours: Versions) -> MeshError:
    """A peer's refusal, as this node's error."""
    try:
        code = ErrorCode(refused.code)
    except ValueError:
        code = ErrorCode.UNREACHABLE
    message = f"Node {node_id} refused the connection: {refused.message}"
    if strange_for_its_version(ours, refused):
        code = ErrorCode.INCOMPATIBLE_VERSION
        why = refuse_versions(ours, Versions(refused.version_min, refused.version_max)).message
        message = f"Node {node_id} refused the connection, for it cannot hear that this node is a member: {why}"
    return MeshError(
        code,
        message,
        retryable=refused.retryable,
        detail={"node_id": node_id, "version_min": refused.version_min, "version_max": refused.version_max},
    )
