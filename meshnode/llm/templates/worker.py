"""The process in which strangers' templates run: a frame in, a frame out, until its input ends.

It gives up what a template that broke out of the sandbox could use: memory, new file descriptors, written files, core
dumps. A frame is a length (4 bytes, little-endian) and MessagePack: RenderRequest in, RenderedPrompt or Refusal out;
the first frame out is empty and says that it is ready. The time limit is the client's; the alarm here only ends a
worker whose agent is gone.
"""

import importlib
import resource
import signal
from typing import IO, Final

import msgspec

from meshnode.llm.templates.composing import Composer
from meshnode.llm.templates.model import LENGTH, REQUEST_BYTES_MAX, Refusal, RenderRequest

MEMORY_BYTES_MAX: Final = 512 * 1024 * 1024
ALARM_S: Final = 10


# Python and Jinja import these only when a template first needs them; by then no file can be opened any more.
_NEEDED_LATER: Final = ("encodings.unicode_escape", "jinja2.constants", "jinja2.debug", "textwrap", "unicodedata")


def confine() -> None:
    """Lowers this process's limits for good."""
    for module in _NEEDED_LATER:
        importlib.import_module(module)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Standard input, output and error are open already; the limit counts numbers, so nothing else can be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers until `requests` ends."""
    composer = Composer()
    decoder = msgspec.msgpack.Decoder(RenderRequest)
    _put(replies, b"")
    while True:
        head = requests.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        (length,) = LENGTH.unpack(head)
        if length > REQUEST_BYTES_MAX:
            return
        signal.alarm(ALARM_S)
        answer = composer.compose(decoder.decode(requests.read(length)))
        try:
            reply = msgspec.msgpack.encode(answer)
        except UnicodeEncodeError:
            reply = msgspec.msgpack.encode(Refusal(words="the template writes half a character (a lone surrogate)"))
        signal.alarm(0)
        _put(replies, reply)


def _put(replies: IO[bytes], body: bytes) -> None:
    replies.write(LENGTH.pack(len(body)) + body)
    replies.flush()
