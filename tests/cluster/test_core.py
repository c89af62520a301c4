"""How what is known of a member becomes what people see."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.cluster import core
from meshnode.cluster.model import Gpu, NodeInfo
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.resources.gpu import ThermalState
from meshnode.kernel.resources.sampler import Reading, to_sample
from protocol.heartbeats.events import HeartbeatFlag
from protocol.ids import Address, NodeId
from protocol.membership.view import alive_of
from protocol.wire.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN
from protocol.wire.messages import Alive, Heartbeat
from tests.support.hub import Mesh

NODES = [(NodeId("aaaa1111"), "kitchen"), (NodeId("aaaa2222"), "Büro"), (NodeId("bbbb3333"), "kitchen"),
         (NodeId("cccc4444"), "aaaa1111"), (NodeId("dddd5555"), "attic")]  # fmt: skip
MIB = 1 << 20
BEAT = Heartbeat(b"\0" * 8, 1, 1, 40, 425, 150, 2000, 30, 500, 61, 990, 0, -1, 3, 100, 7, b"\0" * 8, 1)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("aaaa1111", "aaaa1111"), ("Büro", "aaaa2222"), ("BÜRO", "aaaa2222"), ("bbbb", "bbbb3333"), ("attic", "dddd5555"),
     ("kitchen", ErrorCode.CONFLICT), ("aaaa", ErrorCode.CONFLICT), ("bbb", ErrorCode.UNKNOWN_NODE),
     ("", ErrorCode.UNKNOWN_NODE), ("nobody", ErrorCode.UNKNOWN_NODE)],
)  # fmt: skip
def test_whom_a_person_means(wanted: str, found: str | ErrorCode) -> None:
    if isinstance(found, ErrorCode):
        with pytest.raises(MeshError) as caught:
            core.find(NODES, wanted)
        assert caught.value.code is found
    else:
        assert core.find(NODES, wanted) == found


def test_the_short_form_of_a_node_has_its_marks() -> None:
    node = NodeInfo(id=NodeId("aaaa1111"), name="attic", status="offline", role="member", left=True, incompatible=True)
    line = core.peer_line(node)
    assert (line.left, line.incompatible, line.status) == (True, True, "offline")


def test_several_of_one_name_are_listed() -> None:
    with pytest.raises(MeshError) as caught:
        core.find(NODES, "kitchen")
    assert caught.value.detail["candidates"] == ["aaaa1111", "bbbb3333"]


@given(st.lists(st.floats(0, 1e6), min_size=1).map(sorted), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_so_many_are_not_above_it(values: list[float], fraction: float) -> None:
    found = core.quantile(values, fraction)
    assert found in values
    assert sum(value <= found for value in values) >= fraction * len(values) - 1e-9
    assert core.quantile(values, 0.0) == values[0]
    assert core.quantile(values, 1.0) == values[-1]


def test_devices_are_summed_up() -> None:
    assert core.gpu_of(BEAT, []) == Gpu()
    two = [("RTX 4090", "555", 24_000_000_000, "cuda"), ("RTX 3060", "555", 12_000_000_000, "cuda")]
    shown = core.gpu_of(BEAT, two)
    assert (shown.available, shown.name, shown.vram, shown.vram_free) == (True, "RTX 4090", 36_000_000_000, 500 * MIB)
    assert (shown.backend, shown.temp_celsius, shown.utilization) == ("cuda", 61.0, 99.0)
    unknown = core.gpu_of(None, two)
    assert (unknown.vram_free, unknown.temp_celsius, unknown.utilization) == (36_000_000_000, None, None)
    assert core.gpu_of(BEAT, [("odd", "", 1, "vulkan")]).backend == "cpu"
    assert core.gpu_of(BEAT, [("small", "", 1_000_000, "cuda")]).vram_free == 1_000_000, "never more free than there is"


def test_each_device_is_named_and_what_only_sums_tell_is_left_out() -> None:
    two = core.gpu_of(BEAT, [("RTX 4090", "555", 24 << 30, "cuda"), ("RTX 3060", "555", 12 << 30, "cuda")]).devices
    assert two is not None
    assert [(device.index, device.name, device.total_vram) for device in two] == [
        (0, "RTX 4090", 24 << 30), (1, "RTX 3060", 12 << 30)
    ]  # fmt: skip
    assert {(device.free_vram, device.temp_celsius, device.utilization) for device in two} == {(None, None, None)}
    (one,) = core.gpu_of(BEAT, [("RTX 4090", "555", 24 << 30, "cuda")]).devices or ()
    assert (one.free_vram, one.effective_free_vram, one.temp_celsius, one.utilization) == (500 * MIB, 500 * MIB, 61, 99)


@pytest.mark.parametrize("state", list(ThermalState))
def test_how_hot_a_device_is_comes_from_its_node(state: ThermalState) -> None:
    sample = to_sample(Reading(0.0, 0.0, 0.0, 0, 0, 0, 0, None, (), state, 0, 0, False, 0))
    beat = msgspec.structs.replace(BEAT, flags=sample.flags)
    assert core.gpu_of(beat, [("RTX 4090", "555", 24 << 30, "cuda")]).thermal_state == state.value
    assert core.gpu_of(None, [("RTX 4090", "555", 24 << 30, "cuda")]).thermal_state is None


def test_figures_of_a_heartbeat() -> None:
    fields = core.load_fields(BEAT, 2.5, up=True)
    assert fields["cpu_percent"] == 42.5
    assert (fields["ram_used"], fields["storage_used"]) == (2000 * MIB, 30 * MIB)
    assert fields["uptime_seconds"] == 102
    assert core.load_fields(BEAT, 2.5, up=False)["uptime_seconds"] == 100, "who is gone is not running on"
    assert (fields["battery_percent"], fields["on_battery"]) == (None, None)
    laptop = Heartbeat(
        b"\0" * 8, 1, 1, 40, 0, 0, 0, 0, -1, 0, -1, int(HeartbeatFlag.ON_BATTERY), 55, 0, 0, 0, b"\0" * 8, 1
    )
    assert core.load_fields(laptop, 0.0, up=True)["on_battery"] is True
    assert core.load_fields(laptop, 0.0, up=True)["battery_percent"] == 55


@pytest.mark.parametrize(("low", "high", "fits"), [(0, 0, False), (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION, True),
                                                   (PROTOCOL_VERSION + 1, 255, False), (0, 255, True)])  # fmt: skip
def test_versions_overlap_or_not(low: int, high: int, fits: bool) -> None:
    alive = alive_of(Mesh(1).alive(0))
    assert core.compatible(Alive(alive.signer, 1, 1, low, high, [])) is fits


def test_small_words() -> None:
    assert [core.status_of(up=up) for up in (True, False)] == ["online", "offline"]
    assert [core.role_of(raw) for raw in ("admin", "member", None, "king")] == ["admin", "member", "member", "member"]
    assert core.addresses_text([Address("fe80::1", 5), Address("10.0.0.1", 6)]) == ("[fe80::1]:5", "10.0.0.1:6")
    assert core.stated_addresses(None) == ()
