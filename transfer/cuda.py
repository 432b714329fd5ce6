"""What is used of CUDA: memory of another process, a kernel, streams, events. Over NVIDIA's own bindings.

Everything belongs to the device's primary context, which is the one that torch uses, so that pages
need no translation. A thread has to be told of it once (`Device.use`).

NVIDIA's bindings let go of Python's interpreter in each call, and a thread that computes may keep it for milliseconds
then. So what a hand-off calls while it lasts, and what takes microseconds, is called with the interpreter held.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


class CudaFailed(Exception):
    """A call of CUDA's, by name, and why it failed."""


@dataclass(frozen=True)
class Allocation:
    """What the driver allocated at once: a handle leads to all of it."""

    base: int
    size_bytes: int


class Launch(ctypes.Structure):
    """How a kernel is launched: CUlaunchConfig, made once, as to say all of it anew takes microseconds."""

    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("blocks_y", ctypes.c_uint),
        ("blocks_z", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("threads_y", ctypes.c_uint),
        ("threads_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )

    def __init__(self, stream: Any, threads: int) -> None:
        """Of one block, until `blocks` is set."""
        super().__init__(1, 1, 1, threads, 1, 1, 0, int(stream), None, 0)
        self.pointer = ctypes.addressof(self)


class Device:
    """One GPU of this process. Raises CudaFailed where there is none of this number, or no driver."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._cu = _driver()
        self._device = self._call("cuDeviceGet", number)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.use()
        attribute = self._cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self._not_ready = int(self._cu.CUresult.CUDA_ERROR_NOT_READY)
        self.multiprocessors: int = self._call("cuDeviceGetAttribute", attribute, self._device)

    @classmethod
    def of(cls, pointer: int) -> Device:
        """The one on which this address lies. Raises CudaFailed for memory that is no device's."""
        cu = _driver()
        attribute = int(cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
        # Not by NVIDIA's bindings: they say 0 of every GPU's memory (13.0).
        ordinal = ctypes.c_int(-1)
        error = _driver_held().cuPointerGetAttribute(ctypes.byref(ordinal), attribute, pointer)
        if error:
            _check(cu, "cuPointerGetAttribute", (cu.CUresult(error),))
        return cls(ordinal.value)

    def use(self) -> None:
        """Makes this device the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    # Memory.

    def allocation_of(self, pointer: int) -> Allocation:
        """Raises CudaFailed for memory that is not this device's."""
        base, size_bytes = self._call("cuMemGetAddressRange", pointer)
        return Allocation(int(base), int(size_bytes))

    def share(self, allocation: Allocation) -> bytes:
        """A handle by which another process of this host opens it.

        Raises CudaFailed for memory that cannot be shared so: torch's expandable segments, managed memory.
        """
        return bytes(self._call("cuIpcGetMemHandle", allocation.base).reserved)

    def open(self, handle: bytes) -> int:
        """Where the allocation of another process lies here. Raises CudaFailed, also for a device out of reach."""
        made = self._cu.CUipcMemHandle()
        made.reserved = handle
        return int(self._call("cuIpcOpenMemHandle", made, 1))

    def close(self, opened: int) -> None:
        self._call("cuIpcCloseMemHandle", opened)

    def allocate(self, size_bytes: int) -> int:
        """Memory of this device's own, zeroed. For tests, benchmarks and small tables."""
        pointer = int(self._call("cuMemAlloc", size_bytes))
        self.fill(pointer, 0, size_bytes)
        return pointer

    def fill(self, pointer: int, byte: int, size_bytes: int) -> None:
        self._call("cuMemsetD8", pointer, byte, size_bytes)

    def free(self, pointer: int) -> None:
        self._call("cuMemFree", pointer)

    def upload(self, pointer: int, data: npt.NDArray[Any]) -> None:
        self._call("cuMemcpyHtoD", pointer, data.ctypes.data, data.nbytes)

    def download(self, pointer: int, into: npt.NDArray[Any]) -> None:
        self._call("cuMemcpyDtoH", into.ctypes.data, pointer, into.nbytes)

    def copy(self, stream: Any, copies: Sequence[tuple[int, int, int]]) -> None:
        """From, to, bytes: by the copy engines, one call each. For benchmarks; it takes microseconds for each."""
        for source, destination, size_bytes in copies:
            self._call("cuMemcpyAsync", destination, source, size_bytes, stream)

    def copy_many(
        self,
        stream: Any,
        sources: npt.NDArray[np.uint64],
        destinations: npt.NDArray[np.uint64],
        sizes_bytes: npt.NDArray[np.uint64],
    ) -> None:
        """Addresses and sizes, of one shape: by the copy engines, which leave the multiprocessors to what is computed.
        For benchmarks.

        All go to the driver in one call, without the interpreter: it takes about a microsecond for each. Raises
        CudaFailed where the driver has no such call.
        """
        batch = _copy_batch()
        if batch is None:
            raise CudaFailed("cuMemcpyBatchAsync: wanted a driver of CUDA 13, found an older one")
        addresses = [np.ascontiguousarray(many).ravel() for many in (destinations, sources, sizes_bytes)]
        count, first = addresses[0].size, ctypes.c_size_t(0)
        pointers = [many.ctypes.data for many in addresses]
        error = batch(*pointers, count, self._beside.getPtr(), ctypes.byref(first), 1, int(stream))
        self._check_held("cuMemcpyBatchAsync", error)

    @functools.cached_property
    def _beside(self) -> Any:
        """What a batch of copies is told: in the stream's order, and beside what is computed."""
        cu = self._cu
        attributes = cu.CUmemcpyAttributes()
        attributes.srcAccessOrder = cu.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        attributes.flags = int(cu.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
        return attributes

    def map_host(self, pointer: int, size_bytes: int) -> int:
        """Lets kernels write to this memory of the process. Returns its address for them."""
        flags = self._cu.CU_MEMHOSTREGISTER_DEVICEMAP | self._cu.CU_MEMHOSTREGISTER_PORTABLE
        self._call("cuMemHostRegister", pointer, size_bytes, flags)
        return int(self._call("cuMemHostGetDevicePointer", pointer, 0))

    def unmap_host(self, pointer: int) -> None:
        self._call("cuMemHostUnregister", pointer)

    # Work.

    def stream(self) -> Any:
        """Of the highest priority, and none that waits for others."""
        _least, greatest = self._call("cuCtxGetStreamPriorityRange")
        return self._call("cuStreamCreateWithPriority", self._cu.CUstream_flags.CU_STREAM_NON_BLOCKING, greatest)

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def idle(self, stream: Any) -> bool:
        """Whether all that was put into the stream is done. Raises CudaFailed where any of it went wrong."""
        return self._done("cuStreamQuery", _driver_held().cuStreamQuery(int(stream)))

    def write_word(self, stream: Any, pointer: int, value: int) -> None:
        """The stream writes these 32 bits once all that was put into it before is done, and can be seen."""
        self._call("cuStreamWriteValue32", stream, pointer, value, 0)

    def wait_for_word(self, stream: Any, pointer: int, value: int) -> None:
        """The stream goes no further until these 32 bits are at least this value. For tests: CUDA does not know what
        it waits for, and may put that behind it (transfer/computed.py)."""
        self._call("cuStreamWaitValue32", stream, pointer, value, 0)

    def event(self) -> Any:
        """A point in a stream, without a clock: none yet."""
        return self._call("cuEventCreate", self._cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def record(self, event: Any, stream: Any) -> None:
        """The event is all that has been put into the stream."""
        self._check_held("cuEventRecord", _driver_held().cuEventRecord(int(event), int(stream)))

    def reached(self, event: Any) -> bool:
        """Whether what the event is now is done. Raises CudaFailed where any of it went wrong."""
        return self._done("cuEventQuery", _driver_held().cuEventQuery(int(event)))

    def destroy_event(self, event: Any) -> None:
        """Also one that is still waited for."""
        self._call("cuEventDestroy", event)

    def wait(self, stream: Any, event: Any) -> None:
        """The stream goes no further until what the event is now is done; one that was never recorded is done."""
        self._check_held("cuStreamWaitEvent", _driver_held().cuStreamWaitEvent(int(stream), int(event), 0))

    def kernel(self, source: str, name: str, options: Sequence[str] = ()) -> int:
        """A function of this CUDA C++ program. Raises CudaFailed with the compiler's words."""
        module = self._call(
            "cuModuleLoadData", compiled(source, (*options, f"--gpu-architecture={self._architecture}"))
        )
        function = self._call("cuModuleGetFunction", module, name.encode())
        # Not when it is first launched, as is usual: that waits for whatever the GPU is doing then.
        self._call("cuFuncLoad", function)
        return int(function)

    def launch(self, function: int, launch: Launch, arguments: int) -> None:
        """arguments: where the addresses of the parameters lie, one after the other; read before this returns"""
        error = _driver_held().cuLaunchKernelEx(launch.pointer, function, arguments, None)
        self._check_held("cuLaunchKernelEx", error)

    @property
    def _architecture(self) -> str:
        names = self._cu.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", attribute, self._device)
            for attribute in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"sm_{major}{minor}"

    def _done(self, name: str, error: int) -> bool:
        if error == self._not_ready:
            return False
        self._check_held(name, error)
        return True

    def _check_held(self, name: str, error: int) -> None:
        if error:
            _check(self._cu, name, (self._cu.CUresult(error),))

    def _call(self, name: str, *arguments: Any) -> Any:
        return _check(self._cu, name, getattr(self._cu, name)(*arguments))


@functools.cache
def _driver() -> Any:
    """Raises CudaFailed where NVIDIA's bindings are not installed, or find no driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaFailed(f"cuda-bindings: {error}") from error
    try:
        initialized = driver.cuInit(0)
    except RuntimeError as error:
        # The driver's own library is looked for when it is first called.
        raise CudaFailed(f"no driver: {str(error).splitlines()[0]}") from error
    _check(driver, "cuInit", initialized)
    return driver


@functools.cache
def _driver_held() -> ctypes.PyDLL:
    """The same, called without letting go of the interpreter. Only for calls that do not wait."""
    library = ctypes.PyDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuPointerGetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_uint64]
    library.cuStreamQuery.argtypes = [pointer]
    library.cuEventQuery.argtypes = [pointer]
    library.cuEventRecord.argtypes = [pointer, pointer]
    library.cuStreamWaitEvent.argtypes = [pointer, pointer, number]
    library.cuLaunchKernelEx.argtypes = [pointer] * 4
    return library


@functools.cache
def _copy_batch() -> Any:
    """cuMemcpyBatchAsync as CUDA 13 has it, called without the interpreter: it takes long for many. None where the
    driver is older."""
    error, *found = _driver().cuGetProcAddress(b"cuMemcpyBatchAsync", 13000, 0)
    if int(error) != 0 or not found[0]:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_size_t
    many = (pointer, pointer, pointer, count, pointer, pointer, count, pointer)
    return ctypes.CFUNCTYPE(ctypes.c_int, *many)(int(found[0]))


@functools.cache
def compiled(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code of this CUDA C++ program. Needs no GPU. Raises CudaFailed with the compiler's words."""
    from cuda.bindings import nvrtc

    def call(name: str, *arguments: Any) -> Any:
        return _check(nvrtc, name, getattr(nvrtc, name)(*arguments))

    program = call("nvrtcCreateProgram", source.encode(), b"mainstem.cu", 0, [], [])
    encoded = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        said = bytes(call("nvrtcGetProgramLogSize", program))
        call("nvrtcGetProgramLog", program, said)
        raise CudaFailed(f"nvrtc: {said.rstrip(bytes(1)).decode(errors='replace').strip()}")
    binary = bytes(call("nvrtcGetCUBINSize", program))
    call("nvrtcGetCUBIN", program, binary)
    return binary


def _check(library: Any, name: str, result: tuple[Any, ...]) -> Any:
    """What a call of NVIDIA's bindings returned, without its first part, the error. Raises CudaFailed."""
    error, *rest = result
    if int(error) != 0:
        if hasattr(library, "cuGetErrorName"):
            _, said = library.cuGetErrorName(error)
            raise CudaFailed(f"{name}: {said.decode() if said else error}")
        raise CudaFailed(f"{name}: {error}")
    if not rest:
        return None
    return rest[0] if len(rest) == 1 else tuple(rest)
