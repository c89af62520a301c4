"""Text for people, whole: a change of the words or columns is a change of these tests."""

from typing import Any

import click
import pytest

from meshnode.cli.render import (
    coordinator_text,
    invitations_text,
    metrics_text,
    node_text,
    nodes_text,
    ping_text,
    state_of,
    status_text,
)
from meshnode.cli.screen import table, width_of
from tests.cli.answers import ME, MESH, OTHER, PEER, WALL, node, peer, summary


def plain(text: str) -> str:
    return click.unstyle(text)


def test_status() -> None:
    assert (
        plain(status_text(summary(warnings=["the clock is wrong"])))
        == f"""\
mesh         {MESH}, 2 of 3 nodes online
this node    den, admin, up 3 h 12 min, meshnode 0.1.0
             {ME}
coordinator  den (this node), term 4
memory       6.0/32.0 GiB used
storage      200/1000 GiB used
gpus         on 1 node, 20.0 GiB of 24.0 GiB free
warning      the clock is wrong

PEER   STATUS   ROLE    ADDRESS             RTT
attic  online   member  192.0.2.2:4893  0.42 ms
barn   offline  member  -                     -"""
    )


def test_status_of_a_mesh_of_one_says_what_to_do() -> None:
    text = status_text(summary(peers=[], node_count=1, offline_count=0, gpu_node_count=0, coordinator=None))
    assert "coordinator  none known" in text
    assert "gpus         none" in text
    assert text.endswith("`meshnode invite` makes a one-time URL for the next machine.")


def test_a_coordinator_without_quorum_is_named_with_the_reason() -> None:
    coordinator = {"id": PEER, "name": "attic", "term": 7, "quorate": False, "reason": "2 of 5 voters answer"}
    assert coordinator_text(coordinator, ME) == "attic, term 7, without quorum: 2 of 5 voters answer"


def test_nodes() -> None:
    gone = peer(id=OTHER, name="Barn", status="offline", last_seen="2027-01-15T05:47:00Z", gpu={"available": False})
    del gone["rtt_ms"]
    assert (
        plain(nodes_text([gone, peer(), node()], WALL))
        == """\
NAME        ID        STATUS   ROLE    COORD  CPU           RAM  GPU       ADDRESS             RTT  VERSION  LAST SEEN
attic       bbbbbbbb  online   member  -      12%  3.0/16.0 GiB  RTX 3090  192.0.2.2:4893  0.42 ms  0.1.0    12 s ago
Barn        bbbbcccc  offline  member  -        -             -  -         192.0.2.2:4893        -  0.1.0    2 h ago
den (this)  aaaaaaaa  online   admin   yes    12%  3.0/16.0 GiB  -         192.0.2.1:4893        -  0.1.0    now

2 of 3 nodes online"""
    )


def test_a_node_that_has_not_told_its_load_shows_none() -> None:
    fresh = peer(cpu_percent=0.0, ram_used=0)
    del fresh["age_seconds"]
    assert "0%" not in nodes_text([fresh], WALL)


def test_a_peer_whose_datagrams_are_blocked_is_marked() -> None:
    assert "192.0.2.2:4893 (TCP only)" in nodes_text([peer(udp_blocked=True)], WALL)
    assert "TCP only" not in nodes_text([peer(udp_blocked=False)], WALL)


def test_node() -> None:
    assert (
        plain(node_text(peer(battery_percent=41, on_battery=True, udp_blocked=True, cores=8), WALL))
        == f"""\
name         attic
id           {PEER}
status       online
role         member
address      192.0.2.2:4893
addresses    192.0.2.1:4893
round trip   0.42 ms
datagrams    blocked; they travel over the link
last seen    12 s ago
up           3 h 12 min
version      0.1.0
system       linux amd64
processor    8 cores
load         12%
memory       3.0/16.0 GiB
storage      100/500 GiB
gpu          RTX 3090, 20.0 GiB of 24.0 GiB free
battery      41%, not plugged in"""
    )


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "online"),
        ({"suspect": True}, "suspect"),
        ({"incompatible": True, "suspect": True}, "incompatible"),
        ({"status": "offline"}, "offline"),
        ({"status": "offline", "left": True}, "left"),
        ({"status": "offline", "incompatible": True}, "incompatible"),
        ({"status": "offline", "left": True, "incompatible": True}, "incompatible"),
    ],
)
def test_states(changes: dict[str, Any], state: str) -> None:
    assert state_of(peer(**changes)) == state


def test_an_older_agent_that_says_less_is_shown_too() -> None:
    bare = {"id": PEER, "name": "attic", "status": "online"}
    assert "attic" in nodes_text([bare], WALL)
    assert "attic" in node_text(bare, WALL)


HOSTILE = "ev\x1b[2Jil\r\n\u202exe"
HOSTILE_GPU = {"available": True, "name": HOSTILE}


@pytest.mark.parametrize(
    "text",
    [
        nodes_text([peer(name=HOSTILE, address=HOSTILE, version=HOSTILE, gpu=HOSTILE_GPU)], WALL),
        node_text(peer(name=HOSTILE, addresses=[HOSTILE], os=HOSTILE, cpu_model=HOSTILE, version=HOSTILE), WALL),
        status_text(summary(peers=[peer(name=HOSTILE, address=HOSTILE)], warnings=[HOSTILE], name=HOSTILE)),
        coordinator_text({"id": PEER, "name": HOSTILE, "term": 1, "quorate": False, "reason": HOSTILE}, ME),
        ping_text({"name": HOSTILE, "sent": 1, "received": 0, "address": HOSTILE}),
        metrics_text({HOSTILE: {HOSTILE: 1}}),
        invitations_text(
            [{"token": "t", "state": "open", "role": "member", "expires_in_s": 1, "created_at": "", "wrong_proofs": 0,
              "redeemed_name": HOSTILE}], WALL),
    ],
    ids=["nodes", "node", "status", "coordinator", "ping", "metrics", "invitations"],
)  # fmt: skip
def test_a_peers_text_cannot_move_the_cursor(text: str) -> None:
    bare = plain(text)
    assert not set(bare) & {"\x1b", "\r", "\u202e"}
    assert "ev\\x1b[2Jil\\r\\n\\u202exe" in bare


def test_ping() -> None:
    report = {"name": "attic", "sent": 10, "received": 9, "address": "192.0.2.2:4893", "transport": "link",
              "min_ms": 0.3, "p50_ms": 0.331, "p99_ms": 6.04, "max_ms": 6.04}  # fmt: skip
    assert ping_text(report) == (
        "attic: 9 of 10 answered over the link to 192.0.2.2:4893, 1 lost\n"
        "min 0.30 ms  p50 0.33 ms  p99 6.0 ms  max 6.0 ms"
    )
    assert ping_text({"name": "attic", "sent": 3, "received": 0}) == "attic: 0 of 3 answered over the link, 3 lost"


def test_metrics() -> None:
    figures = {"links_open": 3, "sent_bytes_total": {"tcp": 12.5}, "seconds": {"count": 4, "sum": 2.0}, "nobody": {}}
    assert metrics_text(figures) == "links_open 3\nseconds count 4 mean 0.5\nsent_bytes_total{tcp} 12.5"


def test_columns_align_whatever_alphabet_the_names_have() -> None:
    names = ["den", "屋根裏", "attic 🏠", "cafe\u0301", "👩\u200d💻"]
    lines = table(("NAME", "X"), [(name, "x") for name in names]).splitlines()[1:]
    assert {width_of(line) for line in lines} == {width_of("attic 🏠") + 3}


def test_columns_that_nobody_fills_are_left_out() -> None:
    assert plain(table(("A", "B", "C"), [("1", "", "x"), ("2", "-", "")])) == "A  C\n1  x\n2  -"


def test_a_narrow_terminal_gets_fewer_columns_and_whole_lines() -> None:
    whole = nodes_text([node(), peer()], WALL)
    narrow = nodes_text([node(), peer()], WALL, 60)
    assert max(map(len, whole.splitlines())) > 60 >= max(map(len, narrow.splitlines()))
    assert all(name in narrow.splitlines()[0] for name in ("NAME", "STATUS", "ROLE", "CPU"))
    assert nodes_text([node(), peer()], WALL, 500) == whole
    assert "192.0.2.2" not in status_text(summary(), 45)
    assert "attic" in status_text(summary(), 45)


def test_who_is_offline_is_not_up() -> None:
    assert "up  " in plain(node_text(peer(), WALL))
    assert "up  " not in plain(node_text(peer(status="offline"), WALL))
