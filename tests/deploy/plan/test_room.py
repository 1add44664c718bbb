"""Whether this machine has what a plan takes.

Planted faults seen red: the machine's total not looked at, the cgroup's limit not.
"""

from __future__ import annotations

import psutil
import pytest

from deploy.plan import cgroup
from deploy.plan.mebibytes import MIB
from deploy.plan.room import check_machine
from proto import errors


def test_a_ceiling_above_the_machine_or_its_cgroup_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = psutil.virtual_memory().total
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: None)
    check_machine(total)
    with pytest.raises(errors.MemoryExceeded, match="more than this machine's"):
        check_machine(total + 1)
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: 100 * MIB)
    check_machine(100 * MIB)
    with pytest.raises(errors.MemoryExceeded, match="101 MiB is above this cgroup's limit of 100"):
        check_machine(101 * MIB)
