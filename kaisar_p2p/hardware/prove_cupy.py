"""Compute proofs on an NVIDIA GPU: int8 tensor cores through cuBLAS, with CuPy.

`cupy.matmul` on int8 does not use tensor cores, so cuBLAS is called directly: `cublas.gemmEx`, CUDA_R_8I operands
and CUBLAS_COMPUTE_32I, in the only layout that has such kernels (both operands contiguous along k: "TN").
Where that path is missing or wrong (Volta, some driver versions), fp16 operands with fp32 sums give the same bits.
"""

from __future__ import annotations

import importlib
import logging
from importlib.resources import files
from typing import Any

import numpy as np

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.hardware.prove import Proof, ProofCancelled, ShouldStop, chain_rounds, never
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.matproof import MATRIX_A, MATRIX_B, Job, Tags

log = logging.getLogger(__name__)

# Constants of library_types.h and cublas_api.h; CuPy does not export all of them.
_INT8, _INT32, _FLOAT16, _FLOAT32 = 3, 10, 2, 0
_TRANSPOSE, _AS_IS = 1, 0
_COMPUTE_INT32, _COMPUTE_FLOAT32 = 72, 68
_DEFAULT_ALGORITHM = -1
_TYPES = {
    "int8": (_INT8, _INT32, _COMPUTE_INT32, np.int32),
    "float16": (_FLOAT16, _FLOAT32, _COMPUTE_FLOAT32, np.float32),
}

_TRIAL = Job(4096, 4096, 64, 1)
_PANEL_ROWS = 4096
_THREADS = 256


def gemm_arguments(
    kind: str, rows: int, n: int, k: int, left: int, right: int, out: int, one: int, zero: int
) -> tuple[int, ...]:
    """Arguments of `gemmEx` after the handle, for row-major out(rows × n) = left(rows × k) · right(n × k)ᵀ.

    cuBLAS is column-major: it sees outᵀ = rightᵀᵀ · leftᵀ. The last five are device or host addresses.
    """
    operand, result, compute, _ = _TYPES[kind]
    shape = (_TRANSPOSE, _AS_IS, n, rows, k)
    return (*shape, one, right, operand, k, left, operand, k, zero, out, result, n, compute, _DEFAULT_ALGORITHM)


class CupyBackend:
    """Proofs on one GPU.

    Device memory: B (n·k bytes), and a panel of 4096 rows of A and of C twice, so that the rows of the next panel
    are made while this one is multiplied.

    Raises:
        HardwareError: CuPy or a GPU is missing, or no matrix product on it is exact.
    """

    name = "cupy"

    def __init__(self, device: int = 0) -> None:
        self._cupy = _import_cupy()
        self._device = self._cupy.cuda.Device(device)
        try:
            with self._device:
                module = self._cupy.RawModule(code=kernel_source(), options=("-std=c++14",))
                self._fill_kernel = module.get_function("fill_rows")
                self._tag_kernel = module.get_function("tile_tags")
                self._kind = self._fastest_exact_kind()
        except self._errors() as error:
            raise HardwareError(f"the GPU cannot run proofs: {error}", hint="see `kaisar doctor`") from error

    def prove(self, job: Job, seed: bytes, should_stop: ShouldStop = never) -> Proof:
        """See `kaisar_p2p.hardware.prove.Backend.prove`."""
        try:
            with self._device:
                return chain_rounds(job, seed, lambda round_seed: self._run_round(job, round_seed, should_stop))
        except self._errors() as error:
            raise HardwareError(
                f"the proof failed on the GPU: {error}", hint="is another program using its memory?"
            ) from error

    def _errors(self) -> tuple[type[Exception], ...]:
        """What CuPy raises: CUDA's, cuBLAS's and NVRTC's errors, out of memory, and a failed compilation."""
        return RuntimeError, MemoryError, self._cupy.cuda.compiler.CompileException

    def _run_round(self, job: Job, seed: bytes, should_stop: ShouldStop) -> Tags:
        """Panels on two streams: one makes rows, the other multiplies and tags."""
        cp = self._cupy
        height = min(job.n, max(1, _PANEL_ROWS // job.t) * job.t)
        right = self._rows(seed, MATRIX_B, 0, cp.empty((job.n, job.k), cp.int8))
        tags = cp.zeros((job.n // job.t, job.n // job.t), cp.uint32)
        panels = [(cp.empty((height, job.k), cp.int8), cp.empty((height, job.n), cp.int32)) for _ in range(2)]
        cp.cuda.get_current_stream().synchronize()
        making, multiplying = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
        done: list[Any] = [None, None]
        for number, start in enumerate(range(0, job.n, height)):
            rows, turn = min(height, job.n - start), number % 2
            left, product = (buffer[:rows] for buffer in panels[turn])
            if done[turn] is not None:
                done[turn].synchronize()  # also keeps the queue short, so that a cancelled proof ends soon
            if should_stop():
                multiplying.synchronize()
                raise ProofCancelled("the proof was cancelled")
            with making:
                self._rows(seed, MATRIX_A, start, left)
                ready = making.record()
            with multiplying:
                multiplying.wait_event(ready)
                self._multiply(self._kind, left, right, product)
                self._tag(product, job.t, tags[start // job.t : (start + rows) // job.t])
                done[turn] = multiplying.record()
        multiplying.synchronize()
        return np.asarray(cp.asnumpy(tags).ravel(), np.uint32)

    def _rows(self, seed: bytes, matrix: int, first_row: int, out: Any) -> Any:
        """Fill `out` (int8, rows × k) with rows of a matrix, on the current stream."""
        rows, blocks = out.shape[0], out.shape[1] // 64
        key = self._cupy.asarray(np.frombuffer(seed, "<u4"))
        numbers = (np.uint32(matrix), np.uint32(first_row), np.uint32(rows), np.uint32(blocks))
        grid = (-(-rows * blocks // _THREADS),)
        self._fill_kernel(grid, (_THREADS,), (key, *numbers, out.view(self._cupy.uint32)))
        return out

    def _tag(self, product: Any, t: int, tags: Any) -> None:
        rows, n = product.shape
        arguments = (product.view(self._cupy.uint32), np.uint32(n), np.uint32(t), tags)
        self._tag_kernel(((rows // t) * (n // t),), (_THREADS,), arguments)

    def _multiply(self, kind: str, left: Any, right: Any, out: Any) -> None:
        """out (int32) = left · rightᵀ (int8), on the current stream."""
        if kind == "int8":
            self._gemm(kind, left, right, out)
            return
        cp = self._cupy
        exact = cp.empty(out.shape, cp.float32)
        out.fill(0)
        for start, stop in matproof.column_pieces(left.shape[1]):
            self._gemm(kind, _to_float16(cp, left, start, stop), _to_float16(cp, right, start, stop), exact)
            out += exact.astype(cp.int32)

    def _gemm(self, kind: str, left: Any, right: Any, out: Any) -> None:
        cublas, number = self._cupy.cuda.cublas, _TYPES[kind][3]
        one, zero = np.array(1, number), np.array(0, number)
        handle = self._cupy.cuda.device.get_cublas_handle()
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
        pointers = (left.data.ptr, right.data.ptr, out.data.ptr, one.ctypes.data, zero.ctypes.data)
        cublas.gemmEx(handle, *gemm_arguments(kind, len(left), len(right), left.shape[1], *pointers))

    def _fastest_exact_kind(self) -> str:
        """Try both products on a small job against the CPU, and keep the faster one that is right."""
        timings = []
        for kind in _TYPES:
            try:
                if (elapsed_ms := self._try_kind(kind)) is not None:
                    timings.append((elapsed_ms, kind))
            except RuntimeError as error:
                log.info("%s products do not work on this GPU: %s", kind, error)
        if not timings:
            raise HardwareError("no matrix product on this GPU is exact", hint="update the NVIDIA driver")
        return min(timings)[1]

    def _try_kind(self, kind: str) -> float | None:
        """Milliseconds of five products, or None if they are wrong."""
        cp, seed, job = self._cupy, bytes(32), _TRIAL
        left = self._rows(seed, MATRIX_A, 0, cp.empty((job.n, job.k), cp.int8))
        right = self._rows(seed, MATRIX_B, 0, cp.empty((job.n, job.k), cp.int8))
        product = cp.empty((job.n, job.n), cp.int32)
        self._multiply(kind, left, right, product)
        began, ended = cp.cuda.Event(), cp.cuda.Event()
        began.record()
        for _ in range(5):
            self._multiply(kind, left, right, product)
        ended.record()
        ended.synchronize()
        if (cp.asnumpy(product[: job.t, : job.t]) != matproof.tile(job, seed, 0)).any():
            return None
        return float(cp.cuda.get_elapsed_time(began, ended))


def _to_float16(cupy: Any, matrix: Any, start: int, stop: int) -> Any:
    return cupy.ascontiguousarray(matrix[:, start:stop]).astype(cupy.float16)


def kernel_source() -> str:
    """The CUDA source of the two kernels."""
    return files("kaisar_p2p.hardware").joinpath("kernels.cu").read_text("utf-8")


def _import_cupy() -> Any:
    """CuPy, if it is installed and sees a device."""
    try:
        cupy: Any = importlib.import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise HardwareError("CuPy is not installed", hint="pip install 'kaisar-p2p[gpu]'") from error
    except RuntimeError as error:  # CUDARuntimeError: no driver, or no device
        raise HardwareError(f"no usable NVIDIA GPU: {error}", hint="check `nvidia-smi`") from error
    if not count:
        raise HardwareError("no NVIDIA GPU", hint="check `nvidia-smi`")
    return cupy
