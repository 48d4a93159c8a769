"""Kernels of Triton's, right and wrong, that run in the emulator in a process of their own.

Triton compiles kernels only where TRITON_INTERPRET is not set, which pytest's process sets. `outcomes` runs cases in a
fresh process; a case is a chip, the name of a function here, and its keyword arguments.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parent.parent


def outcomes(cases: list[tuple[int, str, dict]]) -> list[dict]:
    """Returns what the function of each case returns; of one that raises, its error: {"error": type, "text": message}.

    Raises:
        RuntimeError: The process failed.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "ptx.launches"]
    done = subprocess.run(command, input=json.dumps(cases), env=env, cwd=_TESTS, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    import torch
    import triton
    import triton.language as tl

    from .driver import Driver
    from .options import Options

    @triton.jit
    def add_kernel(x, y, out, n, MASK: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        if MASK:
            tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)
        else:
            tl.store(out + i, tl.load(x + i) + tl.load(y + i))

    @triton.jit
    def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        row = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=-float("inf"))
        row = tl.exp(row - tl.max(row, 0))
        tl.store(out + tl.program_id(0) * n + i, row / tl.sum(row, 0), mask=i < n)

    @triton.jit
    def pair_kernel(both, scale):
        i = tl.arange(0, 64)
        tl.store(both[1] + i, tl.load(both[0] + i) * scale)

    @triton.jit
    def flip_kernel(x, out, BARRIER: tl.constexpr, WARP: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(x + i, i)
        if BARRIER:
            tl.debug_barrier()
        tl.store(out + i, tl.load(x + (i // 32 * 32 + 31 - i % 32 if WARP else BLOCK - 1 - i)))

    @triton.jit
    def last_kernel(parts, out, count, n, SEM: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
        program, i = tl.program_id(0), tl.arange(0, BLOCK)
        tl.store(parts + program * BLOCK + i, (i + program).to(tl.float32))
        if BARRIER:
            tl.debug_barrier()
        if tl.atomic_add(count, 1, sem=SEM) == n - 1:
            total = tl.zeros((BLOCK,), tl.float32)
            for other in range(n):
                total += tl.load(parts + other * BLOCK + i)
            tl.store(out + i, total)

    @triton.jit
    def same_place_kernel(out, BLOCK: tl.constexpr):
        tl.store(out + tl.arange(0, BLOCK), tl.program_id(0))

    @triton.jit
    def spin_kernel(flag):
        while tl.atomic_add(flag, 0) == 0:
            pass

    @triton.jit
    def product_kernel(
        a, b, c, M, N, K, along_k, along_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
        depth, total = tl.arange(0, BK), tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x = tl.load(a + rows[:, None] * K + (k + depth)[None, :], mask=(rows < M)[:, None])
            y = tl.load(b + (k + depth)[:, None] * along_k + columns[None, :] * along_n, mask=(columns < N)[None, :])
            total = tl.dot(x, y, total, input_precision=PRECISION)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(c + rows[:, None] * N + columns[None, :], total, mask=inside)

    def check(driver, out, expected, tolerance=1e-6):
        """Returns what a launch made of its output, and some of its report."""
        report = driver.reports[-1]
        error = (out.double() - expected.double()).abs().max().item() / (expected.abs().max().item() + 1e-30)
        tensor_cores = sorted({name.split(".")[0] for name in report.classes if name.startswith(("mma", "wgmma.mma"))})
        return {
            "right": error <= tolerance, "races": len(report.races), "warps": report.warps, "kernel": report.kernel,
            "notes": sorted({note.kind for note in report.notes}), "tensor_cores": tensor_cores,
            "bits": out.contiguous().view(torch.uint8).flatten().tolist() if out.numel() < 2000 else None,
        }  # fmt: skip

    def add(driver, mask=True):
        x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
        add_kernel[(4,)](x, y, out, 1000, MASK=mask, BLOCK=256)
        return check(driver, out, x + y)

    def softmax(driver):
        x, out = torch.randn(5, 300), torch.empty(5, 300)
        softmax_kernel[(5,)](x, out, 300, BLOCK=512)
        return check(driver, out, x.softmax(1))

    def pair(driver):
        x, out = torch.randn(64), torch.zeros(64)
        pair_kernel[(1,)]((x, out), 2.5)
        return check(driver, out, 2.5 * x)

    def flip(driver, barrier=True, warp=False):
        x, out = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
        flip_kernel[(1,)](x, out, BARRIER=barrier, WARP=warp, BLOCK=256)
        i = torch.arange(256)
        return check(driver, out, i // 32 * 32 + 31 - i % 32 if warp else 255 - i)

    def last(driver, sem="acq_rel", barrier=True):
        parts, out, count = torch.zeros(8 * 256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
        last_kernel[(8,)](parts, out, count, 8, SEM=sem, BARRIER=barrier, BLOCK=256)
        return check(driver, out, torch.arange(256) * 8.0 + 28)

    def same_place(driver):
        out = torch.zeros(256, dtype=torch.int32)
        same_place_kernel[(8,)](out, BLOCK=256)
        return check(driver, out, out)

    def spin(driver):
        flag = torch.zeros(1, dtype=torch.int32)
        spin_kernel[(2,)](flag)
        return check(driver, flag, flag)

    def edited(driver, pattern, new):
        """Runs softmax with other PTX."""
        driver.edit = lambda ptx: re.sub(pattern, new, ptx)
        return softmax(driver)

    def product(driver, dtype, tile, transposed=False, rows=None):
        bm, bn, bk, warps, stages = tile
        m, n, k = rows or bm + 3, 64, 128
        a, b = torch.randn(m, k).to(getattr(torch, dtype)), torch.randn(k, n).to(getattr(torch, dtype))
        b = b.T.contiguous().T if transposed else b
        c = torch.full((m, n), float("nan"))
        shape = {"BM": bm, "BN": bn, "BK": bk, "PRECISION": "tf32" if dtype == "float32" else None}
        grid = triton.cdiv(m, bm), triton.cdiv(n, bn)
        product_kernel[grid](a, b, c, m, n, k, *b.stride(), **shape, num_warps=warps, num_stages=stages)
        return check(driver, c, a.double() @ b.double(), 2e-3 if dtype == "float32" else 1e-6)

    def again(driver):
        """Launches one kernel by the library with arguments of several kinds, each twice, in turn."""
        from tritondeq.kernels import bound

        real, runs, right = add_kernel.run, [], []
        add_kernel.run = lambda *a, **k: runs.append(1) or real(*a, **k)
        floats, y, out = torch.randn(1001), torch.randn(1000), torch.zeros(1000)
        kinds = [(x, n) for x in (floats, floats[1:], floats.bfloat16(), floats.double()) for n in (1, 16, 17)]
        for x, n in kinds * 2:
            for options in ({}, {"num_warps": 2}):
                bound.launch(add_kernel, (1,), x.device, x, y, out.zero_(), n, MASK=True, BLOCK=32, **options)
                right.append(torch.equal(out[:n], (x[:n] + y[:n]).float()))
        return {"right": all(right), "kinds": 2 * len(kinds), "runs": len(runs)}

    def prepared(driver):
        """Launches one kernel by the library with constants made before, of two kinds, each twice, in turn."""
        from tritondeq.kernels import bound

        real, runs, right = add_kernel.run, [], []
        add_kernel.run = lambda *a, **k: runs.append(1) or real(*a, **k)
        x, y, out = torch.randn(32), torch.randn(32), torch.zeros(32)
        made = {block: bound.Constants(add_kernel, MASK=True, BLOCK=block, num_warps=1) for block in (8, 32)}
        for block in (8, 32) * 2:
            bound.launch(add_kernel, (1,), x.device, x, y, out.zero_(), 20, constants=made[block])
            right.append(torch.equal(out, torch.where(torch.arange(32) < min(block, 20), x + y, 0.0)))
        return {"right": all(right), "kinds": len(made), "runs": len(runs)}

    def settings(driver):
        """What the library asks of the driver."""
        from tritondeq.kernels import devices

        return {"emulated": devices.emulated, "shared": devices.shared_memory(None), "arch": driver.arch}

    def main() -> None:
        results, programs = [], {}
        for chip, name, arguments in json.load(sys.stdin):
            options = Options(**arguments.pop("options", {}))
            driver = programs.setdefault(chip, Driver(chip)).activate()
            driver.options, driver.edit = options, None
            torch.manual_seed(0)
            try:
                results.append(globals()[name](driver, **arguments))
            except Exception as error:
                results.append({"error": type(error).__name__, "text": str(error)})
        json.dump(results, sys.stdout)

    main()
