"""Triton's driver of a GPU that is not there: kernels are compiled for it, and their PTX runs here on CPU tensors."""

import tempfile
import time
from functools import cache

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .errors import Races
from .machine import Machine
from .memory import Global
from .options import Options, Report
from .parse import Kernel, parse
from .program import Program

_SHARED = {80: 166912, 90: 232448}  # bytes of shared memory that a program can have
_FLOATS = {"fp16": "f2", "fp32": "f4", "f32": "f4", "fp64": "f8"}


class Driver(DriverBase):
    """Compiles kernels for a chip, and runs their PTX.

    Attributes:
        arch: The chip: 80 or 90.
        options: What is checked, and in which order things run; may be changed between launches.
        reports: What each launch did, in order; a launch that raised a Fault other than Races has none.
        edit: None, or a function from PTX to the PTX that runs in its place.

    Args:
        arch: The chip.
        options: As above; the default if None.
        cache_dir: Folder in which Triton keeps what it compiled; a temporary one of the process if None.
    """

    def __init__(self, arch: int = 80, options: Options | None = None, cache_dir: str | None = None):
        if arch not in _SHARED:
            raise ValueError(f"no such chip: {arch}")
        self.arch, self.options = arch, options or Options()
        self.reports: list[Report] = []
        self.edit = None
        self.utils, self.launcher_cls = _Utils(arch), _Launcher
        self._cache_dir = cache_dir or _temporary()
        self._kernels: dict[str, Kernel] = {}
        self._programs: dict[tuple[str, int], Program] = {}

    def activate(self) -> "Driver":
        """Makes Triton launch here, and the library take CPU tensors; returns the driver.

        Raises:
            RuntimeError: Triton is set to interpret kernels, which it does not compile then.
        """
        from tritondeq.kernels import devices

        if knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled")
        devices.emulated = self.arch
        knobs.cache.dir = self._cache_dir  # of its own: here PTX stands in the place of machine code
        CUDABackend.make_cubin = _keep_ptx
        triton.runtime.driver.set_active(self)
        return self

    # What Triton asks of a driver.

    @classmethod
    def is_active(cls):
        return False  # it is not to be found by itself: activate() sets it

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps the kernels of each device apart

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed here")

    def launch(self, ptx: str, grid: tuple[int, int, int], metadata, arguments: list[tuple[str, object]]) -> None:
        """Runs a kernel.

        Args:
            ptx: What was compiled.
            grid: Programs along x, y and z.
            metadata: Triton's, of the kernel.
            arguments: Type, as Triton spells it, and value of each argument that is no constant.

        Raises:
            Unknown: The PTX has an instruction that the emulator does not know.
            Fault: A check failed.
            Races: There were races, and the options ask to raise.
        """
        start = time.perf_counter()
        options, program = self.options, self._program(self.edit(ptx) if self.edit else ptx)
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise NotImplementedError("global scratch memory")
        tensors, params = _bind(program.kernel, arguments)
        cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
        machine = Machine(program, grid, metadata.shared, Global(tensors), params, options, cooperative)
        report = machine.run()
        report.seconds = time.perf_counter() - start
        self.reports.append(report)
        if report.races and options.raise_races:
            raise Races(f"{program.kernel.name}{grid}:\n" + "\n".join(map(str, report.races[:12])))

    def _program(self, ptx: str) -> Program:
        if ptx not in self._kernels:
            self._kernels[ptx] = parse(ptx)
        width = self._kernels[ptx].threads if self.options.lockstep else 32
        if (ptx, width) not in self._programs:
            self._programs[ptx, width] = Program(self._kernels[ptx], width)
        return self._programs[ptx, width]


class _Utils:
    """What Triton's launcher asks of a device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_device_properties(self, device):
        return {
            "max_shared_mem": _SHARED[self.arch], "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }  # fmt: skip

    def load_binary(self, name, binary, shared, device):
        return binary, binary.decode(), 0, 0, 1024  # module, function, registers, spilled ones, most threads

    def unload_module(self, module):
        pass


class _Launcher:
    """What Triton makes for each compiled kernel, and calls with the arguments of a launch."""

    def __init__(self, src, metadata):
        self.metadata, self.signature = metadata, list(src.signature.values())

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        flat = []
        _flatten(self.signature, arguments, flat)
        triton.runtime.driver.active.launch(function, (x, y, z), self.metadata, flat)


@cache
def _temporary() -> str:
    """Returns a folder that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="ptx-")
    _temporary.folder = folder  # kept alive: it is removed when nothing refers to it
    return folder.name


def _keep_ptx(self, src, metadata, opt, capability):
    return src.encode()


def _flatten(signature, arguments, out: list) -> None:
    """Appends (type, value) of all arguments that are no constants; tuples may nest."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            _flatten(kind, argument, out)
        elif kind != "constexpr":
            out.append((kind, argument))


def _bind(kernel: Kernel, arguments):
    """Returns the tensors, as Global takes them, and what each parameter holds as an unsigned integer."""
    tensors, params = (
        [],
        {name: 0 for name, _ in kernel.params},
    )  # those beyond the arguments are scratch, not asked for
    for (name, dtype), (kind, argument) in zip(kernel.params, arguments, strict=False):
        if kind.startswith("*"):
            params[name] = argument.data_ptr() if hasattr(argument, "data_ptr") else int(argument or 0)
            if hasattr(argument, "data_ptr") and argument.numel():
                steps = zip(argument.shape, argument.stride(), strict=True)
                extent = 1 + sum((size - 1) * stride for size, stride in steps)
                item = argument.element_size()
                tensors.append((params[name], extent * item, item, name.rpartition("param_")[2]))
        elif dtype.kind == "f" or kind in _FLOATS:
            width = dtype.itemsize
            params[name] = int(np.array(float(argument), f"f{width}").view(f"u{width}"))
        else:
            params[name] = int(argument) & (1 << 8 * dtype.itemsize) - 1
    return tensors, params
