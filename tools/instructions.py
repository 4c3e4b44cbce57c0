"""What the Triton kernels are compiled to, for any NVIDIA GPU and without one.

    python -m visionattn.tools.instructions --pattern window routing --capability 80 90 --out FILE.csv

Each kernel that forward and backward of a pattern would launch, on its first case in the benchmark at 224 px: registers
of a thread, bytes that it spills, shared memory of a block; and, from the disassembly of the innermost loop that holds
products of matrices (of the whole kernel where it has none), the instructions of each kind, and the multiply-adds of
a warp's matrix instructions for each instruction of any kind. A loop of a pipelined kernel holds one of its steps.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx  # which torch needs
import torch
from torch import Tensor

from visionattn.kernels import _dispatch
from visionattn.tools.benchmark import PATTERNS

__all__ = ["Target", "main"]

CAPABILITIES = (80, 86, 89, 90, 100, 120)
KERNELS = ["window", "neighborhood", "routing", "halo", "outlook"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MATRIX = re.compile(r"[A-Z]+MMA")
INTEGER = re.compile(r"(U?(IADD|IMAD|LEA|LOP|SHF|SHL|SHR|ISETP|IMNMX|IABS|VIADD|VIMNMX|SEL|BMSK|SGXT)|I2F|F2I)")
LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG)")
SHARED = re.compile(r"(LDS|LDSM|STS|STSM)")
LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+x?[0-9x.A-Z_]*)(.*?);")


@dataclass
class Compiled:
    """A kernel; counts are those of its inner loop."""

    pattern: str
    capability: str
    dtype: str
    dim: int
    kernel: str
    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: int
    matrix: int
    integer: int
    load_16: int  # bits, or fewer
    load_32: int
    load_64: int
    load_128: int
    shared_access: int
    matrix_share: float
    macs_per_instruction: float


class Target:
    """Stands for Triton's driver of a device that is not here."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_pattern(pattern: str, dim: int, dtype: torch.dtype) -> None:
    """Forward and backward, the bias included, of one image of the pattern's first case, on the CPU."""
    case = PATTERNS[pattern].cases(224)[0]
    qkv = torch.zeros(1, case.side, case.side, 3, case.heads, dim, dtype=dtype).requires_grad_()
    arguments = list(case.arguments)
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            size = [dim if n == case.dim else n for n in x.shape]  # tables of as many numbers as a head
            arguments[i] = torch.zeros(size, dtype=dtype).requires_grad_()
    with _dispatch.set_backend("triton"):
        PATTERNS[pattern].candidates["visionattn"](*qkv.unbind(3), *arguments).sum().backward()


def compile_kernels(capability: int, calls: Sequence[tuple[str, int, str]]) -> list[Compiled]:
    """What `run_pattern` would launch for each pattern, head_dim and dtype, compiled instead.

    For a process of its own: Triton's driver is replaced.
    """
    import triton

    from visionattn.kernels import _attention_triton

    triton.runtime.driver.set_active(Target(capability))
    setattr(_attention_triton, "_capability", lambda device: capability)  # noqa: B010
    found: list[Compiled] = []
    run = triton.JITFunction.run

    def compile_it(self, *arguments, **options):
        kernel = run(self, *arguments, **options | {"warmup": True})
        registers, spilled, counts = _read(kernel.asm["cubin"])
        call = pattern, f"sm_{capability}", dtype, dim, self.__name__.removeprefix("_")
        found.append(Compiled(*call, registers, spilled, kernel.metadata.shared, **counts))

    triton.JITFunction.run = compile_it
    _dispatch.TRITON_DEVICES.add("cpu")
    for pattern, dim, dtype in calls:
        run_pattern(pattern, dim, DTYPES[dtype])
    return found


def _read(cubin: bytes) -> tuple[int, int, dict[str, Any]]:
    """Registers, bytes spilled and `_count` of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        code = _tool("nvdisasm", "-c", file.name)
    return int(usage["REG"]), int(usage["STACK"]), _count(code)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that Triton brings."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _count(code: str) -> dict[str, Any]:
    names = _inner_loop(code)
    matrix = [name for name in names if MATRIX.match(name)]
    integer = [name for name in names if INTEGER.match(name) and ".MOV" not in name]
    widths = Counter(_width(name) for name in names if LOAD.match(name))
    return {
        "instructions": len(names),
        "matrix": len(matrix),
        "integer": len(integer),
        **{f"load_{width}": widths[width] for width in (16, 32, 64, 128)},
        "shared_access": sum(bool(SHARED.match(name)) for name in names),
        "matrix_share": round(len(matrix) / len(names), 4),
        "macs_per_instruction": round(sum(map(_macs, matrix)) / len(names), 1),
    }


def _width(name: str) -> int:
    found = re.search(r"\.(128|64|[US]?16|[US]?8)\b", name)
    return min(max(int(found[1].strip("US")), 16), 128) if found else 32


def _macs(name: str) -> int:
    """Multiply-adds that a warp's share of a matrix instruction does; 0 where its name does not tell its shape."""
    if found := re.search(r"GMMA\.64x(\d+)x(\d+)", name):  # four warps
        return 16 * int(found[1]) * int(found[2])
    found = re.search(r"\.(16)(8)(4|8|16|32)", name)
    return int(found[1]) * int(found[2]) * int(found[3]) if found else 0


def _inner_loop(code: str) -> list[str]:
    """Names of the instructions of the smallest loop with a matrix instruction, else with a load, else of all."""
    labels: dict[str, int] = {}
    names: list[str] = []
    flow = networkx.DiGraph()
    targets: dict[int, str] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif found := LINE.match(line):
            i, (predicate, name, operands) = len(names), found.groups()
            names.append(name)
            if name.startswith("BRA") and (target := re.search(r"`\((\.L_\w+)\)", operands)):
                targets[i] = target[1]
            is_always = predicate is None and not re.match(r"\s*!?U?P\d", operands)
            if not (is_always and name.startswith(("BRA", "EXIT", "RET"))):
                flow.add_edge(i, i + 1)
    flow.add_edges_from((i, labels[label]) for i, label in targets.items())
    loops = [[names[i] for i in sorted(loop) if i < len(names)] for loop in _loops(flow)]
    for kind in (MATRIX, LOAD):
        inner = [loop for loop in loops if any(kind.match(name) for name in loop)]
        if inner:
            return min(inner, key=len)
        if any(kind.match(name) for name in names):
            break  # it is not in a loop
    return names


def _loops(flow: networkx.DiGraph) -> Iterator[set[int]]:
    """Natural loops of a program that starts at 0: an instruction, and what leads back to it after it in any case."""
    above = networkx.immediate_dominators(flow, 0) | {0: 0}
    for end, start in flow.edges:
        dominator = end
        while dominator in above and dominator not in (0, start):
            dominator = above[dominator]
        if end in above and dominator == start:
            rest = flow.reverse(copy=True)
            if end != start:
                rest.remove_node(start)
            yield {start, end, *networkx.descendants(rest, end)} & above.keys()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m visionattn.tools.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--pattern", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--dim", nargs="+", type=int, default=[32], help="head_dim")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--out", type=Path, metavar="FILE.csv", required=True)
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        print(f"visionattn: {arguments.out} exists: results are never overwritten; give another --out", file=sys.stderr)
        return 2
    calls = list(itertools.product(arguments.pattern, arguments.dim, arguments.dtype))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:  # one driver in a process
        found = pool.map(functools.partial(compile_kernels, calls=calls), arguments.capability)
        rows = [row for of_capability in found for row in of_capability]
    with arguments.out.open("x", newline="") as stream:
        writer = csv.DictWriter(stream, Compiled.__dataclass_fields__, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
