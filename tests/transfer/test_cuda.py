"""What a host without a GPU says about that."""

from __future__ import annotations

import pytest

from transfer.cuda import CudaFailed, Device
from transfer.layout import PoolLayout
from transfer.nvlink import NvlinkTransport
from transfer.pool import Pool
from transfer.transport import Unreachable


def has_gpu() -> bool:
    try:
        Device(0)
    except CudaFailed:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="this host has a GPU")
def test_a_host_without_a_driver_is_told_so_in_one_line() -> None:
    pool = Pool.zeros(PoolLayout("m", "bfloat16", 16, (4096,), (), 8))
    with pytest.raises(Unreachable, match=r"^nvlink: no driver: .*$|^nvlink: cuInit: ") as caught:
        NvlinkTransport(pool)
    assert "\n" not in str(caught.value)
