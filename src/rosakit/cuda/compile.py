"""CUDA C++ compiled at first use through NVRTC, cached on disk, launched on the caller's stream.

Nothing here is imported before a CUDA tensor needs it. A compiled kernel is kept as a cubin named
by a hash of everything that shaped it (sources, macros, architecture, compiler version), in
``$ROSAKIT_CACHE``, else ``$XDG_CACHE_HOME/rosakit``, else ``~/.cache/rosakit``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rosakit.errors import BackendError
from rosakit.files import atomic_write

Argument = tuple[Any, Any]
"""A kernel argument: its value and its ctypes type."""

_SOURCES = Path(__file__).parent / "kernels"
_DEFAULT_SHARED = 48 * 1024  # more than this a kernel has to ask for
_lock = threading.Lock()
_modules: dict[tuple[object, ...], dict[str, Kernel]] = {}


@functools.cache
def bindings_error() -> str | None:
    """Why the CUDA bindings cannot be used, or None where they can."""
    try:
        from cuda.bindings import driver, nvrtc

        result, *_ = nvrtc.nvrtcVersion()
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return f"NVRTC does not load ({result})"
        del driver
    except Exception as error:  # the bindings raise RuntimeError where a library is missing
        return f"{type(error).__name__}: {error}"
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get("ROSAKIT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rosakit"


class Prepared:
    """A kernel with its arguments, which may be changed between launches; for one thread.

    Attributes:
        slots: the arguments, as wide as 64 bits each.
    """

    def __init__(
        self,
        function: Any,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        numbers: Sequence[int],
    ) -> None:
        self.slots = (ctypes.c_uint64 * len(numbers))(*numbers)
        first = ctypes.addressof(self.slots)
        places = range(first, first + 8 * len(numbers), 8)
        self._places = (ctypes.c_uint64 * len(numbers))(*places)
        self._call = (function, *grid, threads, 1, 1, 0)
        self._address = ctypes.addressof(self._places)
        self._name = name
        self._launch = _driver().cuLaunchKernel

    def queue(self, stream: int) -> None:
        """Queue it on a stream of its device, which is the current one.

        Raises:
            BackendError: the driver refuses the launch.
        """
        result = self._launch(*self._call, stream, self._address, 0)
        if result[0] != 0:
            _check(result, self._name)


class Kernel:
    """A kernel of one device, ready to launch."""

    def __init__(self, function: Any, name: str, index: int) -> None:
        self._function = function
        self._name = name
        self._index = index
        self._allowed = _DEFAULT_SHARED
        self._block = threading.local()  # a thread that launches fills its own

    def launch_words(
        self, grid: tuple[int, int, int], threads: int, numbers: Sequence[int]
    ) -> None:
        """Queue the kernel with pointers and whole numbers of up to 64 bits: little host work.

        On torch's current stream of the kernel's device, whichever device is current. A number is
        read as wide as its parameter is (little-endian).

        Raises:
            BackendError: the driver refuses the launch.
        """
        block = self._block
        if not hasattr(block, "slots"):
            block.slots = (ctypes.c_uint64 * len(numbers))()
            first = ctypes.addressof(block.slots)
            places = range(first, first + 8 * len(numbers), 8)
            block.places = (ctypes.c_uint64 * len(numbers))(*places)
            block.address = ctypes.addressof(block.places)
        block.slots[:] = numbers
        index = self._index
        arguments = (*grid, threads, 1, 1, 0, stream_of(index), block.address, 0)
        if index == torch.cuda.current_device():
            result = _driver().cuLaunchKernel(self._function, *arguments)
        else:
            with torch.cuda.device(index):
                result = _driver().cuLaunchKernel(self._function, *arguments)
        if result[0] != 0:
            _check(result, self._name)

    def prepare(self, grid: tuple[int, int, int], threads: int, numbers: Sequence[int]) -> Prepared:
        """`launch_words`, laid out once to be queued often."""
        return Prepared(self._function, self._name, grid, threads, numbers)

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Queue the kernel on torch's current stream.

        Args:
            grid: thread blocks in x, y, z.
            threads: threads a block.
            shared_bytes: dynamic shared memory a block.
            arguments: pairs of a value and its ctypes type; pointers as (int, c_void_p).

        Raises:
            BackendError: the driver refuses the launch.
        """
        from cuda.bindings import driver

        if shared_bytes > self._allowed:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), self._name)
            self._allowed = shared_bytes
        values = tuple(value for value, _ in arguments)
        types = tuple(kind for _, kind in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        _check(
            driver.cuLaunchKernel(
                self._function, *grid, threads, 1, 1, shared_bytes, stream, (values, types), 0
            ),
            self._name,
        )


def load(
    sources: Sequence[str], names: Sequence[str], macros: Mapping[str, int], device: torch.device
) -> dict[str, Kernel]:
    """Kernels `names` of the concatenated `sources` under `macros`, compiled once.

    Args:
        sources: file names under ``kernels/``.
        device: a CUDA device; its context must be current.

    Raises:
        BackendError: compilation or loading fails; the message holds the compiler's log.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (*sources, *sorted(macros.items()), index)
    with _lock:
        if key not in _modules:
            major, minor = torch.cuda.get_device_capability(index)
            cubin = _cubin(sources, macros, f"sm_{major}{minor}")
            _modules[key] = _load_module(cubin, names, index)
        return _modules[key]


def source_text(sources: Sequence[str]) -> str:
    """The concatenated text of kernel sources."""
    return "\n".join((_SOURCES / name).read_text() for name in sources)


def _cubin(sources: Sequence[str], macros: Mapping[str, int], arch: str) -> bytes:
    from cuda.bindings import nvrtc

    text = source_text(sources)
    _, major, minor = nvrtc.nvrtcVersion()
    described = "\0".join([text, arch, f"{major}.{minor}", *map(str, sorted(macros.items()))])
    path = cache_folder() / f"{hashlib.sha256(described.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        cached = path.read_bytes()
        if cached.startswith(b"\x7fELF"):
            return cached
    cubin = compile_cubin(text, macros, arch)
    # A cache that cannot be written costs a compilation each process, nothing more.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, cubin)
    return cubin


def compile_cubin(text: str, macros: Mapping[str, int], arch: str) -> bytes:
    """Machine code of CUDA C++ `text` for `arch` ("sm_90")."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    encoded = [option.encode() for option in options]
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"rosakit.cu", 0, [], [])
    _check((status,), "creating the program")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(
                f"compiling a GPU kernel for {arch} failed; use backend='cpu', and please report "
                f"this log:\n{log.decode(errors='replace')}"
            )
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check((status,), "reading the cubin")
        cubin: bytes = b" " * size
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), "reading the cubin")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _load_module(cubin: bytes, names: Sequence[str], index: int) -> dict[str, Kernel]:
    from cuda.bindings import driver

    torch.cuda.current_stream()  # makes torch's context current
    (module,) = _check(driver.cuModuleLoadData(cubin), "loading a module")
    kernels = {}
    for name in names:
        (function,) = _check(driver.cuModuleGetFunction(module, name.encode()), name)
        kernels[name] = Kernel(function, name, index)
    return kernels


def stream_of(index: int) -> int:
    """Torch's current stream of a device, without the object that `torch.cuda` makes of it."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: Sequence[Any], what: str) -> Sequence[Any]:
    """The values of a binding's answer, its status checked."""
    status, *values = result
    if int(status) != 0:
        raise BackendError(
            f"CUDA failed at {what}: {status}; use backend='cpu' if this machine's driver or "
            "GPU is not supported"
        )
    return values


def pointer(tensor: torch.Tensor | None) -> Argument:
    """A tensor as a kernel argument; None is the null pointer."""
    return (0 if tensor is None else tensor.data_ptr(), ctypes.c_void_p)


def unsigned(value: int) -> Argument:
    """A 32-bit count as a kernel argument."""
    return (value, ctypes.c_uint32)
