"""Case 18, as far as links go: a clock that is wrong, at either end and by any amount, locks nobody out."""

from datetime import datetime
from pathlib import Path

import pytest

from meshnode.kernel import identity as identity_module
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import PeerMethod
from meshnode.kernel.links import tls as tls_module
from protocol.ids import NodeId
from tests.kernel.links.world import Text, mesh


async def echo(_peer: NodeId, params: Text) -> Text:
    return params


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize(("begin", "end"), [(1990, 1999), (2090, 2099)], ids=["expired", "not yet valid"])
async def test_certificates_count_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: int, end: int, defended: bool
) -> None:
    """A clock that jumps is the same to TLS as certificates whose dates lie elsewhere, root and leaves alike."""
    monkeypatch.setattr(identity_module, "_NOT_BEFORE", datetime(begin, 1, 1))
    monkeypatch.setattr(identity_module, "_NOT_AFTER", datetime(end, 1, 1))
    if not defended:
        monkeypatch.setattr(tls_module, "_NO_CHECK_TIME", 0)
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add(methods={"echo": PeerMethod(Text, echo)})
        if defended:
            assert (await a.links.call(b.node_id, "echo", Text("hi"), Text, timeout_s=5)).text == "hi"
        else:
            with pytest.raises(MeshError) as caught:
                await a.links.call(b.node_id, "echo", Text("hi"), Text, timeout_s=5)
            assert caught.value.code is ErrorCode.UNREACHABLE
