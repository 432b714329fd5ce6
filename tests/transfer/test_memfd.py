"""Memory for another process: nothing but that is opened, and nobody can make it smaller."""

import os

import pytest

from transfer import memfd


def test_memory_is_found_by_its_path() -> None:
    descriptor = memfd.create("test", 4096)
    os.pwrite(descriptor, b"hello", 0)

    found = memfd.open_at(memfd.path_of(descriptor), 4096)

    assert os.pread(found, 5, 0) == b"hello"
    os.close(found)
    os.close(descriptor)


def test_nobody_can_make_it_smaller_or_larger() -> None:
    descriptor = memfd.create("test", 4096)
    for size_bytes in (0, 100, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size_bytes)
    os.close(descriptor)


def test_what_is_no_sealed_memory_of_this_size_is_not_opened() -> None:
    reader, writer = os.pipe()
    unsealed = os.memfd_create("test")
    os.ftruncate(unsealed, 4096)
    sealed = memfd.create("test", 8192)
    before = len(os.listdir("/proc/self/fd"))

    for descriptor, found in (
        (reader, "something else"),
        (writer, "something else"),
        (unsealed, "something else"),
        (sealed, "8192 bytes"),
    ):
        with pytest.raises(memfd.NoMemory, match=f"wanted 4096 bytes of sealed memory, found {found}"):
            memfd.open_at(memfd.path_of(descriptor), 4096)
    for path in ("/dev/zero", "/etc/passwd", "", "/proc/self/fd/0", "/proc/1/fd/0/../../../etc/passwd"):
        with pytest.raises(memfd.NoMemory, match="wanted /proc/PROCESS/fd/NUMBER"):
            memfd.open_at(path, 4096)

    assert len(os.listdir("/proc/self/fd")) == before
    for descriptor in (reader, writer, unsealed, sealed):
        os.close(descriptor)
