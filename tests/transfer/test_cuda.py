"""What can be known without a GPU: that kernels compile, and what a host without one says about that."""

from __future__ import annotations

from importlib.resources import files

import pytest

from transfer.cuda import CudaFailed, Device, compiled
from transfer.layout import PoolLayout
from transfer.nvlink import COMPILED_WITH, MOST_PAGES, NvlinkTransport
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


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile(architecture: str) -> None:
    source = (files("transfer") / "copy_pages.cu").read_text()
    binary = compiled(source, (*COMPILED_WITH, f"--gpu-architecture={architecture}"))
    for most in MOST_PAGES:
        assert f"copy_pages_{most}".encode() in binary


def test_a_kernel_that_does_not_compile_says_where() -> None:
    with pytest.raises(CudaFailed, match=r"^nvrtc: mainstem\.cu\(2\): error: "):
        compiled("\n not C++;", ("--gpu-architecture=sm_90",))
