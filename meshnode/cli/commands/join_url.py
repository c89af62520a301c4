"""A join URL as a person gave it: read from the command line or standard input, and looked at before it is used."""

import sys
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError

_STDIN_CHARS_MAX: Final = 4_096


def read_join_url(text: str) -> str:
    """The URL, well-formed. `-` reads it from standard input, where no other user can see it in the process list.

    Raises MeshError(USAGE) that names the part that is wrong and never repeats the secret.
    """
    from protocol.trust.join_url import JoinUrlError, parse_join_url

    if text == "-":
        url = sys.stdin.readline(_STDIN_CHARS_MAX).strip()
    else:
        from meshnode.cluster.service.onboarding.invite_text import conceal_argument

        url = text
        conceal_argument(text)
    try:
        parse_join_url(url)
    except JoinUrlError as error:
        raise MeshError(ErrorCode.USAGE, str(error), detail={"part": error.part}) from error
    return url
