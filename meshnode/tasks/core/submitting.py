"""A submission as it came, made into an order; pure. What is wrong with it is said in words that name the field."""

import base64
import binascii
import math
import shlex
from collections.abc import Callable
from typing import Final, TypeVar, get_args

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.model import Requirements, Submission
from protocol.ids import NodeId
from protocol.placement.tasks import (
    ARGV_MAX,
    ENV_MAX,
    NAME_CHARS_MAX,
    ORDER_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    PRIORITIES,
    RETRIES_MAX,
    SHA256_BYTES,
    STDIN_INLINE_BYTES_MAX,
    TIMEOUT_S_MAX,
    Mode,
    Needs,
    Order,
    TaskId,
)

KEY_CHARS_MAX: Final = 128
LABELS_MAX: Final = 32
LABEL_CHARS_MAX: Final = 128
SIZE_MAX: Final = 2**50
CPUS_MAX: Final = 4096.0
GPUS_MAX: Final = 64
KEEP_S_MAX: Final = 366 * 86_400.0
_HINTS: Final = ("priority", "min_ram_mb", "node")
_PRIORITY_NAMES: Final = {**{name: index for index, name in enumerate(PRIORITIES)}, "low": 0, "": 1}
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386"}
"""What nodes call what others call otherwise."""

_MODES: Final[tuple[Mode, ...]] = get_args(Mode)

Number = TypeVar("Number", int, float)


def input_of(said: Submission) -> bytes | None:
    """The SHA-256 of the input that was sent ahead, if there was one. Raises MeshError BAD_REQUEST."""
    if not said.input:
        return None
    if said.stdin or said.stdin_base64:
        raise _bad("`input`, `stdin` and `stdin_base64` exclude each other: give one of them.")
    if len(said.input) != 2 * SHA256_BYTES or not set(said.input) <= set("0123456789abcdef"):
        raise _bad("`input` is what `POST /api/tasks/inputs` answered with: 64 characters of lowercase hex.")
    return bytes.fromhex(said.input)


def order_of(
    said: Submission,
    *,
    task: TaskId,
    me: NodeId,
    at_ms: int,
    find_node: Callable[[str], NodeId],
    sent: tuple[bytes, int] | None = None,
) -> Order:
    """The order of a new task. `find_node` raises MeshError UNKNOWN_NODE or CONFLICT. `sent`: SHA-256 and size of an
    input that was sent ahead; its room counts among what the task needs.

    Raises MeshError BAD_REQUEST, TOO_LARGE, UNKNOWN_NODE, CONFLICT.
    """
    argv, shell = _command(said.command)
    hints = _hints(said.hints)
    if "node" in hints and said.preferred_node:
        raise _bad("`hints.node` and `preferred_node` mean the same: give one of them.")
    needs = _needs(said.requirements, hints)
    sha256, size = sent or (b"", 0)
    preferred = said.preferred_node or hints.get("node", "")
    if said.mode not in _MODES:
        raise _bad(f"`mode` is {said.mode[:40]!r}; it is `at_least_once` or `at_most_once`.")
    mode: Mode = "at_most_once" if said.mode == "at_most_once" else "at_least_once"
    if mode == "at_most_once" and said.retries:
        raise _bad("`retries` and `at_most_once` exclude each other: such a task is never started again.")
    order = Order(
        task=task,
        submitter=me,
        at_ms=at_ms,
        argv=argv,
        shell=shell,
        env=_env(said.env),
        stdin=_stdin(said),
        stdin_bytes=size,
        stdin_sha256=sha256,
        needs=msgspec.structs.replace(
            needs,
            disk_bytes=needs.disk_bytes + size,
            node=find_node(said.node) if said.node else "",
            preferred=find_node(preferred) if preferred else "",
        ),
        mode=mode,
        retries=_within("retries", said.retries, 0, RETRIES_MAX),
        timeout_s=_within("timeout", said.timeout, 0.0, TIMEOUT_S_MAX),
        priority=_priority(said.priority or hints.get("priority", "")),
        name=_line("name", said.name, NAME_CHARS_MAX),
        output_bytes_max=_within("output_bytes_max", said.output_bytes_max, 0, OUTPUT_BYTES_MAX),
        keep_s=_within("keep_s", said.keep_s, 0.0, KEEP_S_MAX),
        key=_line("idempotency_key", said.idempotency_key, KEY_CHARS_MAX),
        group=_line("group", said.group, NAME_CHARS_MAX),
    )
    size = len(msgspec.msgpack.encode(order))
    if size > ORDER_BYTES_MAX:
        raise MeshError(
            ErrorCode.TOO_LARGE,
            f"Command, environment and input take {size} bytes; a task has at most {ORDER_BYTES_MAX}. Pipe what is "
            "long into its standard input, which may be far longer (such as for `xargs`).",
            detail={"bytes": size, "bytes_max": ORDER_BYTES_MAX},
        )
    return order


def same_wish(one: Order, other: Order) -> bool:
    """Whether two submissions ask for the same, whenever and under whatever id, whoever holds its input."""
    return msgspec.structs.replace(one, task=other.task, at_ms=other.at_ms, stdin_holders=other.stdin_holders) == other


def command_text(order: Order) -> str:
    """The command as a person would type it."""
    return order.shell or shlex.join(order.argv)


# ---- the fields -----------------------------------------------------------------------------------------------------


def _command(said: str | list[str]) -> tuple[tuple[str, ...], str]:
    """(argv, "") or ((), shell line)."""
    if isinstance(said, str):
        _text("command", said)
        if not said.strip():
            raise _bad("`command` is empty. Give a line for /bin/sh, or a list of arguments.")
        return (), said
    if not said or not said[0]:
        raise _bad("`command` is empty. Its first item is the program.")
    if len(said) > ARGV_MAX:
        raise MeshError(
            ErrorCode.TOO_LARGE, f"`command` has {len(said)} arguments; at most {ARGV_MAX}. Pipe them into `xargs`."
        )
    for index, item in enumerate(said):
        _text(f"command[{index}]", item)
    return tuple(said), ""


def _env(said: list[str] | dict[str, str]) -> tuple[tuple[str, str], ...]:
    if len(said) > ENV_MAX:
        raise MeshError(ErrorCode.TOO_LARGE, f"`env` has {len(said)} items; at most {ENV_MAX}.")
    found: dict[str, str] = {}
    if isinstance(said, dict):
        for name, value in said.items():
            if not name or "=" in name:
                raise _bad(f"`env` names {name[:40]!r}; a name is not empty and holds no '='.")
            _text(f"env.{name[:40]}", name + value)
        return tuple(said.items())
    for index, item in enumerate(said):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise _bad(f"`env[{index}]` is {item[:40]!r}; each item is KEY=VALUE.")
        _text(f"env[{index}]", item)
        found[name] = value
    return tuple(found.items())


def _hints(said: dict[str, str]) -> dict[str, str]:
    for name in said:
        if name not in _HINTS:
            raise _bad(f"`hints.{name[:40]}` is unknown; there are {', '.join(_HINTS)}.")
    return said


def _needs(said: Requirements, hints: dict[str, str]) -> Needs:
    ram = said.ram_bytes
    if "min_ram_mb" in hints:
        text = hints["min_ram_mb"].strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise _bad(f"`hints.min_ram_mb` is {text[:40]!r}; it is a whole number of MiB.")
        ram = max(ram, int(text) * 1024 * 1024)
    if len(said.labels) > LABELS_MAX:
        raise _bad(f"`requirements.labels` has {len(said.labels)} items; at most {LABELS_MAX}.")
    return Needs(
        cpus=_within("requirements.cpus", said.cpus, 0.0, CPUS_MAX),
        ram_bytes=_within("requirements.ram_bytes", ram, 0, SIZE_MAX),
        gpus=_within("requirements.gpus", said.gpus, 0, GPUS_MAX),
        vram_bytes=_within("requirements.vram_bytes", said.vram_bytes, 0, SIZE_MAX),
        disk_bytes=_within("requirements.disk_bytes", said.disk_bytes, 0, SIZE_MAX),
        os=_line("requirements.os", said.os, LABEL_CHARS_MAX),
        arch=_ARCHITECTURES.get(said.arch, _line("requirements.arch", said.arch, LABEL_CHARS_MAX)),
        labels=tuple(_line("requirements.labels", label, LABEL_CHARS_MAX) for label in said.labels),
        network=said.network,
    )


def _priority(said: str) -> int:
    index = _PRIORITY_NAMES.get(said)
    if index is None:
        raise _bad(f"`priority` is {said[:40]!r}; it is one of {', '.join(PRIORITIES)}.")
    return index


def _stdin(said: Submission) -> bytes:
    if said.stdin and said.stdin_base64:
        raise _bad("`stdin` and `stdin_base64` exclude each other: give one of them.")
    try:
        given = (
            base64.b64decode(said.stdin_base64, validate=True) if said.stdin_base64 else _encoded("stdin", said.stdin)
        )
    except binascii.Error:
        raise _bad("`stdin_base64` is no base64.") from None
    if len(given) > STDIN_INLINE_BYTES_MAX:
        raise MeshError(
            ErrorCode.TOO_LARGE,
            f"The standard input has {len(given)} bytes; at most {STDIN_INLINE_BYTES_MAX} travel with a task. Send it "
            "to `POST /api/tasks/inputs` first, and name it with `input`.",
            detail={"bytes": len(given), "bytes_max": STDIN_INLINE_BYTES_MAX},
        )
    return given


def _text(field: str, said: str) -> None:
    """What no process can be given is refused here, not when it starts."""
    if "\0" in said:
        raise _bad(f"`{field}` holds a NUL character, which no argument and no variable can.")
    _encoded(field, said)


def _encoded(field: str, said: str) -> bytes:
    try:
        return said.encode()
    except UnicodeEncodeError:
        raise _bad(f"`{field}` holds half a surrogate pair, which is no text. Send UTF-8.") from None


def _line(field: str, said: str, chars_max: int) -> str:
    if len(said) > chars_max:
        raise _bad(f"`{field}` has {len(said)} characters; at most {chars_max}.")
    if not said.isprintable():
        raise _bad(f"`{field}` holds characters that cannot be shown.")
    return said


def _within(field: str, said: Number, least: Number, most: Number) -> Number:
    if not math.isfinite(said) or not least <= said <= most:
        raise _bad(f"`{field}` is {said}; it lies from {least:g} to {most:g}.")
    return said


def _bad(message: str) -> MeshError:
    return MeshError(ErrorCode.BAD_REQUEST, message)
