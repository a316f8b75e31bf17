"""The GPU backend without a GPU: its kernels compiled for the CPU, cuBLAS and CuPy played by NumPy.

This shows that kernels, layouts, streams' order of calls and operand order are right, not that CUDA accepts them.
"""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.hardware import prove_cupy
from kaisar_p2p.hardware.prove import NumpyBackend, ProofCancelled
from kaisar_p2p.wire.matproof import Job

COMPILER = shutil.which("g++") or shutil.which("clang++")
SEED = bytes(range(32))

HEADER = r"""
#include <cstdint>
#define ON_HOST 1
typedef uint32_t u32; typedef uint64_t u64;
#define __global__
#define __device__ static
#define __forceinline__ inline
struct Index { u32 x; };
static Index blockIdx, threadIdx, blockDim;
#define WARP_SUM(x)
#define FIRST_LANE 1
static inline void atomicAdd(u32* to, u32 value) { *to += value; }
"""
LAUNCHERS = r"""
#define LAUNCH(call) for (u32 b = 0; b < grid; b++) for (u32 i = 0; i < block; i++) \
  { blockIdx.x = b; threadIdx.x = i; blockDim.x = block; call; }
extern "C" void launch_fill_rows(u32 grid, u32 block, const u32* key, u32 m, u32 f, u32 r, u32 n, u32* out)
{ LAUNCH(fill_rows(key, m, f, r, n, out)) }
extern "C" void launch_tile_tags(u32 grid, u32 block, const u32* product, u32 n, u32 t, u32* tags)
{ LAUNCH(tile_tags(product, n, t, tags)) }
"""


class DeviceArray(np.ndarray):
    """A NumPy array that has its address where CuPy has it."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


def device_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.view(DeviceArray)


def gemm(kinds: list[int], fail_kinds: set[int], *arguments: int) -> None:
    """Column-major gemmEx over addresses, by the cuBLAS manual; integers or floats by the operands' type."""
    _, transpose_a, transpose_b, m, n, k, _, a, type_a, lda, b, type_b, ldb, _, c, type_c, ldc, _, _ = arguments
    assert (transpose_a, transpose_b, type_b) == (1, 0, type_a)
    kinds.append(type_a)
    if type_a in fail_kinds:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    operand = {3: np.int8, 2: np.float16}[type_a]
    left, right = column_major(a, operand, lda, m), column_major(b, operand, ldb, n)
    out = column_major(c, {10: np.int32, 0: np.float32}[type_c], ldc, n)
    out[:m] = left[:k].T.astype(np.float64) @ right[:k].astype(np.float64)


def column_major(address: int, dtype: Any, leading: int, columns: int) -> np.ndarray[Any, Any]:
    size = leading * columns * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(columns, leading).T


class FakeStream(nullcontext[None]):
    def __init__(self, non_blocking: bool = False) -> None:
        super().__init__()

    def record(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class FakeEvent:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def fake_cupy(library: ctypes.CDLL, kinds: list[int], fail_kinds: set[int], faster: int = 3) -> Any:
    def launch(name: str) -> Callable[..., None]:
        def run(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            passed = [
                ctypes.c_void_p(item.ctypes.data) if isinstance(item, np.ndarray) else ctypes.c_uint32(int(item))
                for item in arguments
            ]
            getattr(library, f"launch_{name}")(grid[0], block[0], *passed)

        return run

    cublas = SimpleNamespace(
        CUBLAS_POINTER_MODE_HOST=0,
        setPointerMode=lambda handle, mode: None,
        gemmEx=lambda *arguments: gemm(kinds, fail_kinds, *arguments),
    )
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=lambda: 1),
        Device=lambda index: nullcontext(),
        Stream=FakeStream,
        Event=FakeEvent,
        get_current_stream=FakeStream,
        get_elapsed_time=lambda began, ended: 1.0 if kinds[-1] == faster else 2.0,
        device=SimpleNamespace(get_cublas_handle=lambda: 0),
        cublas=cublas,
        compiler=SimpleNamespace(CompileException=SyntaxError),
    )
    return SimpleNamespace(
        cuda=cuda,
        RawModule=lambda code, options: SimpleNamespace(get_function=launch),
        empty=lambda shape, dtype: device_array(np.empty(shape, dtype)),
        zeros=lambda shape, dtype: device_array(np.zeros(shape, dtype)),
        asarray=lambda array: device_array(array.copy()),
        asnumpy=np.asarray,
        ascontiguousarray=lambda array: device_array(np.ascontiguousarray(array)),
        **{name: getattr(np, name) for name in ("int8", "int32", "uint32", "float16", "float32")},
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the kernels with")
    folder: Path = tmp_path_factory.mktemp("kernels")
    source, built = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(HEADER + prove_cupy.kernel_source() + LAUNCHERS)
    subprocess.run([COMPILER, "-O2", "-w", "-shared", "-fPIC", "-o", str(built), str(source)], check=True, timeout=60)
    return ctypes.CDLL(str(built))


@pytest.fixture(autouse=True)
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_cupy, "_TRIAL", Job(128, 128, 64, 1))


@pytest.mark.parametrize(("faster", "fail_kinds"), [(3, set()), (2, set()), (3, {3})])
@pytest.mark.parametrize("job", [Job(72, 128, 8, 2), Job(16, 65536 + 64, 8, 1)])
def test_the_gpu_backend_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, faster: int, fail_kinds: set[int], job: Job
) -> None:
    kinds: list[int] = []
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(library, kinds, fail_kinds, faster))
    monkeypatch.setattr(prove_cupy, "_PANEL_ROWS", 16)  # several panels, so that buffers take turns
    proof, expected = prove_cupy.CupyBackend().prove(job, SEED), NumpyBackend().prove(job, SEED)
    assert proof.roots == expected.roots
    assert all((one == other).all() for one, other in zip(proof.tags, expected.tags, strict=True))
    assert kinds[-1] == (2 if fail_kinds else faster)


def test_a_gpu_without_an_exact_product_is_refused(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(library, [], {2, 3}))
    with pytest.raises(HardwareError, match="exact"):
        prove_cupy.CupyBackend()


def test_a_proof_on_the_gpu_can_be_cancelled(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(library, [], set()))
    with pytest.raises(ProofCancelled):
        prove_cupy.CupyBackend().prove(Job(64, 64, 8, 1), SEED, lambda: True)


def test_no_device_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorNoDevice")

    runtime = SimpleNamespace(getDeviceCount=no_driver)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    with pytest.raises(HardwareError, match="no usable NVIDIA GPU") as refusal:
        prove_cupy.CupyBackend()
    assert refusal.value.hint
