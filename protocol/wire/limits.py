"""Every limit of the wire, named. docs/protocol.md lists them and a test holds that list true."""

from typing import Final

PROTOCOL_VERSION: Final = 1
PROTOCOL_VERSION_MIN: Final = 1

# ---- datagrams ----
DATAGRAM_BYTES_MAX: Final = 1200
DATAGRAM_HEADER_BYTES: Final = 27
AEAD_TAG_BYTES: Final = 16
DATAGRAM_OVERHEAD_BYTES: Final = DATAGRAM_HEADER_BYTES + AEAD_TAG_BYTES
DATAGRAM_BODY_BYTES_MAX: Final = DATAGRAM_BYTES_MAX - DATAGRAM_OVERHEAD_BYTES
MESSAGES_PER_DATAGRAM_MAX: Final = 16
STATEMENTS_PER_GOSSIP_MAX: Final = 16
REPLAY_WINDOW: Final = 1024
SEQUENCE_MAX: Final = 2**48 - 1
BOOT_MAX: Final = 2**32 - 1

# ---- statements (signed, relayed) ----
SIGNATURE_BYTES: Final = 64
STATEMENT_BYTES_MAX: Final = 1100
ADDRESSES_PER_NODE_MAX: Final = 8
ROSTER_MAX: Final = 16_384
NAME_BYTES_MAX: Final = 252

# ---- links ----
FRAME_BYTES_MAX: Final = 1024 * 1024
FRAME_HEADER_BYTES: Final = 5
RECORD_VALUE_BYTES_MAX: Final = 64 * 1024
RECORD_KEY_BYTES_MAX: Final = 512
