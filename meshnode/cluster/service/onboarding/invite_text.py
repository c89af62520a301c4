"""An invitation as people meet it: the command to paste, and the URL as a QR code.

The URL is a secret for as long as the invitation counts: what is made here goes to the person who asked, not to a log.
"""

import io
import os
from pathlib import Path

import segno


def join_command(url: str) -> str:
    """The command line to paste on the joining machine. The quotes keep every shell from reading '[' or '#'."""
    return f"meshnode join '{url}'"


def qr_terminal(url: str) -> str:
    """The URL as a QR code for a terminal, dark on light whatever the terminal's colours, with its quiet zone."""
    out = io.StringIO()
    segno.make(url, error="l", micro=False).terminal(out, border=2, compact=True)
    return out.getvalue()


def conceal_argument(secret: str) -> bool:
    """Overwrite `secret` in this process's own command line, where every local user can read it. True if it is gone.

    Linux tells a process where its arguments lie (proc(5), fields 48 and 49 of /proc/self/stat). Elsewhere nothing is
    done and False returned: there, give the URL on standard input.
    """
    stat, memory = Path("/proc/self/stat"), Path("/proc/self/mem")
    wanted = os.fsencode(secret)
    if not wanted:
        return True
    try:
        # The second field is the program's name and may hold blanks and parentheses; the rest counts from field 3.
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        with memory.open("r+b", buffering=0) as arguments:
            arguments.seek(start)
            before = arguments.read(end - start) or b""
            after = before.replace(wanted, b"*" * len(wanted))
            if after != before:
                arguments.seek(start)
                arguments.write(after)
    except (OSError, ValueError, IndexError):
        return False
    return True
