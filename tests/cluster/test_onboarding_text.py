"""An invitation as text: the command to paste and the QR codes."""

import shlex

from meshnode.cluster.service.onboarding.invite_text import join_command, qr_terminal
from protocol.trust.join_url import JoinUrl, build_join_url
from tests.protocol.trust.parts import seed

URL = build_join_url(JoinUrl("fe80::1%eth0", 4894, seed("t")[:8], seed("s")[:16], seed("p")))


def test_a_shell_reads_the_url_as_one_word() -> None:
    assert shlex.split(join_command(URL)) == ["meshnode", "join", URL]


def test_the_terminal_code_fits_a_terminal() -> None:
    lines = qr_terminal(URL).rstrip("\n").split("\n")
    assert 10 < len(lines) <= 40
    assert qr_terminal(URL) != qr_terminal(URL[:-1] + "x")
