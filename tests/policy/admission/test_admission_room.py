"""Admission room: blocks that a waiting request leaves alone."""

from __future__ import annotations

from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.admission_room import AdmissionRoom
from tests.helpers.fakes import FakePool


def test_the_device_is_counted_in_blocks_of_all_groups() -> None:
    """Half of ten blocks is left free: the device alone would hold eight, and use four."""
    groups = Geometry(2, 4096, 8, 2, 1, 8, 8, 4096, extra_regions=2)
    room = AdmissionRoom(FakePool(groups).residency, len, 16, 0.5)
    room.begin_step(2)
    assert room.headroom() == 5
