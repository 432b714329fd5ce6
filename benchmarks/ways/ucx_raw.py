"""UCX by hand, over the copy of it that NIXL's package brings: what NIXL's own code adds to it, or saves.

Prefill puts every row into decode's buffers, flushes, and then tells decode by a word in shared memory; decode makes
UCX progress while it looks. Rows go one `ucp_put_nbx` each, of which Python's part is about a microsecond, or
("listed") all in one call, as UCX's list of pieces.
Structures and numbers are those of UCX's public header ucp.h, 1.22 and 1.23; only what is used of them.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.ways import nixl_raw
from benchmarks.ways.addresses import addresses
from benchmarks.ways.ends import WAIT_S, HandOffFailed
from benchmarks.ways.told import tell, wait_until_told
from transfer.landed_ring import RingAddress, RingReader, RingWriter
from transfer.plan import Pages
from transfer.pool import Pool

ENVIRONMENT = {"UCX_TLS": "cuda_ipc,cuda_copy,sm,tcp", "UCX_NET_DEVICES": "all"}
API_VERSION = (1, 22)
"""The first in which a put may have a list of pieces."""

_IN_PROGRESS = 1
_FEATURE_RMA = 1 << 1
_NO_ADDRESS = (1 << 64) - 1
_PUT_ONE = 1 << 8 | 1 << 19
"""Fields of a request that are given: the memory's handle; and many are under way at once."""
_PUT_LIST = 1 << 3 | 1 << 9 | 1 << 10 | 1 << 11
"""The kind of list here, the kind there, the list there, and its length."""
_LIST = 4
"""UCP_DATATYPE_SGL."""

_Numbers = npt.NDArray[np.uint64]


class _ContextParams(ctypes.Structure):
    _fields_ = (("mask", ctypes.c_uint64), ("features", ctypes.c_uint64), ("unused", ctypes.c_byte * 72))


class _WorkerParams(ctypes.Structure):
    _fields_ = (("mask", ctypes.c_uint64), ("unused", ctypes.c_byte * 192))


class _MapParams(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("unused", ctypes.c_byte * 24),
    )


class _EndpointParams(ctypes.Structure):
    _fields_ = (("mask", ctypes.c_uint64), ("address", ctypes.c_void_p), ("unused", ctypes.c_byte * 88))


class _RequestParams(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("request", ctypes.c_void_p),
        ("callback", ctypes.c_void_p),
        ("datatype", ctypes.c_uint64),
        ("user_data", ctypes.c_void_p),
        ("reply_buffer", ctypes.c_void_p),
        ("memory_type", ctypes.c_int),
        ("received", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("remote_datatype", ctypes.c_uint64),
        ("remote", ctypes.c_void_p),
        ("remote_count", ctypes.c_size_t),
    )


class _LocalList(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("addresses", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("memories", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
    )


class _RemoteList(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("addresses", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Described:
    """Decode's side, for prefill."""

    worker: bytes
    """UCX's address of it."""
    pointers: list[int]
    """Of each buffer."""
    keys: list[bytes]
    """By which another process may write into each buffer."""
    ring: RingAddress


@dataclass(frozen=True)
class Buffers:
    """Memory of either side: any that UCX knows, so a GPU's, or the host's."""

    pointers: Sequence[int]
    page_bytes: Sequence[int]
    pages: int


class UcxPrefill:
    def __init__(self, buffers: Buffers, decode: Described, *, listed: bool) -> None:
        self._buffers = buffers
        self._listed = listed
        self._there = decode.pointers
        self._ring = RingWriter(decode.ring)
        self._worker = _Worker(buffers)
        self._endpoint = self._worker.connect(decode.worker)
        self._keys = [self._worker.unpack_key(self._endpoint, key) for key in decode.keys]

    def describe(self) -> None:
        return None

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        here = addresses(self._buffers.pointers, self._buffers.page_bytes, source)
        there = addresses(self._there, self._buffers.page_bytes, destination)
        requests = self._put_list(here, there) if self._listed else self._put_each(here, there)
        self._worker.flush()
        tell(self._ring)
        for request in requests:
            self._worker.forget(request)
        return began_s

    def _put_each(self, here: _Numbers, there: _Numbers) -> list[int]:
        """Requests under way."""
        put, endpoint = self._worker.ucp.ucp_put_nbx, self._endpoint
        requests = []
        for number, size in enumerate(self._buffers.page_bytes):
            key = self._keys[number]
            parameters = _RequestParams(mask=_PUT_ONE, memory=self._worker.memories[number])
            given = ctypes.byref(parameters)
            for mine, theirs in zip(here[number].tolist(), there[number].tolist(), strict=True):
                if request := put(endpoint, mine, size, theirs, key, given):
                    requests.append(_under_way("ucp_put_nbx", request))
        return requests

    def _put_list(self, here: _Numbers, there: _Numbers) -> list[int]:
        pages = here.shape[1]
        lengths, memories, keys = (
            np.repeat(np.array(one, np.uint64), pages)
            for one in (self._buffers.page_bytes, self._worker.memories, self._keys)
        )
        sources, destinations = here.ravel(), there.ravel()
        local = _LocalList(7, sources.ctypes.data, lengths.ctypes.data, memories.ctypes.data)
        remote = _RemoteList(7, destinations.ctypes.data, lengths.ctypes.data, keys.ctypes.data)
        parameters = _RequestParams(
            mask=_PUT_LIST,
            datatype=_LIST,
            remote_datatype=_LIST,
            remote=ctypes.addressof(remote),
            remote_count=len(sources),
        )
        request = self._worker.ucp.ucp_put_nbx(
            self._endpoint, ctypes.addressof(local), len(sources), _NO_ADDRESS, None, ctypes.byref(parameters)
        )
        # The arrays have to stay until it is over.
        self._worker.wait("ucp_put_nbx", request)
        return []

    def close(self) -> None:
        for key in self._keys:
            self._worker.ucp.ucp_rkey_destroy(key)
        self._worker.close()


class UcxDecode:
    def __init__(self, buffers: Buffers, pool: Pool) -> None:
        self.pool = pool
        self._pointers = list(buffers.pointers)
        self._worker = _Worker(buffers)
        self._ring = RingReader()

    def describe(self) -> Described:
        return Described(self._worker.address(), self._pointers, self._worker.keys(), self._ring.address)

    def join(self, answer: None) -> None:
        pass

    def expect(self, room: int, destination: Pages) -> None:
        pass

    def wait(self, room: int) -> float:
        return wait_until_told(self._ring, self._worker.progress)

    def close(self) -> None:
        self._worker.close()
        self._ring.close()


class _Worker:
    """A context of UCX's, its only worker, for one thread, and every buffer as memory that it knows."""

    def __init__(self, buffers: Buffers) -> None:
        self.ucp = _library()
        with nixl_raw.environment(ENVIRONMENT):
            configuration = self._made("ucp_config_read", None, None)
            parameters = _ContextParams(mask=1, features=_FEATURE_RMA)
            self._context = self._made("ucp_init_version", *API_VERSION, ctypes.byref(parameters), configuration)
            self.ucp.ucp_config_release(configuration)
            self._worker = self._made("ucp_worker_create", self._context, ctypes.byref(_WorkerParams()))
        self.memories = [
            self._map(pointer, buffers.pages * size)
            for pointer, size in zip(buffers.pointers, buffers.page_bytes, strict=True)
        ]

    def _map(self, pointer: int, size_bytes: int) -> int:
        return self._made("ucp_mem_map", self._context, ctypes.byref(_MapParams(3, pointer, size_bytes)))

    def address(self) -> bytes:
        """By which another worker connects to this one."""
        address, length = ctypes.c_void_p(), ctypes.c_size_t()
        _check(
            "ucp_worker_get_address",
            self.ucp.ucp_worker_get_address(self._worker, ctypes.byref(address), ctypes.byref(length)),
        )
        found = ctypes.string_at(address, length.value)
        self.ucp.ucp_worker_release_address(self._worker, address)
        return found

    def keys(self) -> list[bytes]:
        """Of each buffer."""
        found = []
        for memory in self.memories:
            key, length = ctypes.c_void_p(), ctypes.c_size_t()
            _check(
                "ucp_rkey_pack",
                self.ucp.ucp_rkey_pack(self._context, memory, ctypes.byref(key), ctypes.byref(length)),
            )
            found.append(ctypes.string_at(key, length.value))
            self.ucp.ucp_rkey_buffer_release(key)
        return found

    def connect(self, address: bytes) -> int:
        """An endpoint. The other side has to make progress before anything comes through it."""
        held = ctypes.create_string_buffer(address, len(address))
        parameters = _EndpointParams(mask=1, address=ctypes.addressof(held))
        return self._made("ucp_ep_create", self._worker, ctypes.byref(parameters))

    def unpack_key(self, endpoint: int, key: bytes) -> int:
        return self._made("ucp_ep_rkey_unpack", endpoint, key)

    def progress(self) -> None:
        self.ucp.ucp_worker_progress(self._worker)

    def flush(self) -> None:
        """Everything that was put is where it belongs. Raises HandOffFailed."""
        request = self.ucp.ucp_worker_flush_nbx(self._worker, ctypes.byref(_RequestParams()))
        self.wait("ucp_worker_flush_nbx", request)

    def wait(self, name: str, request: int) -> None:
        """Until this request is over. Raises HandOffFailed."""
        if not request:
            return
        _under_way(name, request)
        deadline_s = time.monotonic() + WAIT_S
        while self.ucp.ucp_request_check_status(request) == _IN_PROGRESS:
            self.progress()
            if time.monotonic() > deadline_s:
                raise HandOffFailed(f"{name}: not over after {WAIT_S:g} s")
        self.forget(request)

    def forget(self, request: int) -> None:
        """A request that is over. Raises HandOffFailed where it is not, or failed."""
        status = self.ucp.ucp_request_check_status(request)
        self.ucp.ucp_request_free(request)
        _check("ucp_request_check_status", status)

    def close(self) -> None:
        """With it go its endpoints."""
        self.ucp.ucp_worker_destroy(self._worker)
        for memory in self.memories:
            self.ucp.ucp_mem_unmap(self._context, memory)
        self.ucp.ucp_cleanup(self._context)

    def _made(self, name: str, *arguments: object) -> int:
        """What this function writes through its last argument."""
        made = ctypes.c_void_p()
        _check(name, getattr(self.ucp, name)(*arguments, ctypes.byref(made)))
        if made.value is None:
            raise HandOffFailed(f"{name}: made nothing")
        return made.value


def _under_way(name: str, request: int) -> int:
    """The request again. Raises HandOffFailed for an error, of which UCX makes a small negative address."""
    if request < 0:
        _check(name, request)
    return request


def _check(name: str, status: int) -> None:
    if status != 0:
        raise HandOffFailed(f"{name}: {_support().ucs_status_string(status).decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises HandOffFailed where NIXL's package brings no UCX."""
    library = ctypes.CDLL(str(_path("libucp")))
    pointer, number, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
    request = ctypes.c_ssize_t
    arguments = {
        "ucp_config_read": (ctypes.c_char_p, ctypes.c_char_p, pointer),
        "ucp_config_release": (pointer,),
        "ucp_init_version": (number, number, pointer, pointer, pointer),
        "ucp_worker_create": (pointer, pointer, pointer),
        "ucp_worker_get_address": (pointer, pointer, pointer),
        "ucp_worker_release_address": (pointer, pointer),
        "ucp_mem_map": (pointer, pointer, pointer),
        "ucp_mem_unmap": (pointer, pointer),
        "ucp_rkey_pack": (pointer, pointer, pointer, pointer),
        "ucp_rkey_buffer_release": (pointer,),
        "ucp_ep_create": (pointer, pointer, pointer),
        "ucp_ep_rkey_unpack": (pointer, ctypes.c_char_p, pointer),
        "ucp_rkey_destroy": (pointer,),
        "ucp_put_nbx": (pointer, pointer, size, ctypes.c_uint64, pointer, pointer),
        "ucp_worker_flush_nbx": (pointer, pointer),
        "ucp_worker_progress": (pointer,),
        "ucp_request_check_status": (pointer,),
        "ucp_request_free": (pointer,),
        "ucp_worker_destroy": (pointer,),
        "ucp_cleanup": (pointer,),
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = request if name.endswith("_nbx") else ctypes.c_int
    return library


@functools.cache
def _support() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path("libucs")))
    library.ucs_status_string.argtypes = (ctypes.c_int,)
    library.ucs_status_string.restype = ctypes.c_char_p
    return library


def _path(name: str) -> Path:
    """Of one of UCX's libraries in NIXL's package. It finds its transports beside itself."""
    package = nixl_raw.package()
    spec = find_spec(package) if package is not None else None
    if spec is None or spec.origin is None:
        raise HandOffFailed(f"wanted one of {', '.join(nixl_raw.PACKAGES)} installed")
    libraries = Path(spec.origin).parents[1] / f"{package}.libs"
    found = next(iter(sorted(libraries.glob(f"{name}-*.so*"))), None)
    if found is None:
        raise HandOffFailed(f"{package}: brings no {name}")
    return found
