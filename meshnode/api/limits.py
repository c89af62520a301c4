"""Every limit and deadline of the local API, with its default. Where they come from is the settings' business."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiLimits:
    """Limits of the local API. Times in seconds, sizes in bytes. A client that is cut off at a deadline is gone
    within that deadline plus `linger_s`, so that none of them may be 10 s or more.
    """

    keep_alive_s: float = 8.0
    """How long a connection may lie idle between requests."""
    header_deadline_s: float = 8.0
    """From the first byte of a request to the end of its headers."""
    body_grace_s: float = 6.0
    """How long a body may take regardless of its size ..."""
    body_rate_min: int = 64 * 1024
    """... plus the time its bytes received so far take at this many bytes per second."""
    send_deadline_s: float = 8.0
    """How long one piece of an answer may take to leave."""
    send_piece_bytes_max: int = 64 * 1024
    linger_s: float = 1.0
    """How long to read on after an early answer, so that the client gets to see it."""
    linger_bytes_max: int = 8 * 1024 * 1024
    stop_grace_s: float = 3.0
    """How long requests in flight may go on after the stop was asked for."""

    header_bytes_max: int = 16 * 1024
    body_bytes_max: int = 1024 * 1024
    """The largest body of a route that names no limit of its own."""
    connections_max: int = 1024
    foreign_connections_max: int = 64
    """Connections that do not belong to the agent's user or root."""
    requests_max: int = 128
    """Requests being worked on at once, event streams aside."""
    streams_max: int = 512
    h2_streams_max: int = 64
    rate_per_s: float = 5000.0
    rate_burst: int = 10_000
    refused_rate_per_s: float = 10.0
    """Wrong or missing credentials, per caller."""
    refused_burst: int = 30

    heartbeat_s: float = 15.0
    """A comment line on an event stream that has been silent this long."""
    stream_buffer_bytes_max: int = 256 * 1024
    login_code_ttl_s: float = 60.0
    session_ttl_s: float = 12 * 3600.0
    sessions_max: int = 64
