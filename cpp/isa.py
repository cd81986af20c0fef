"""Does a wider instruction set pay? The core for x86-64 against x86-64-v3: instructions and time.

    python cpp/isa.py docs/results/isa.json        # needs g++ and valgrind; minutes

Builds cpp/tests/cost.cpp with the core twice, counts the instructions of each case (callgrind) and
takes the least CPU time of runs in turns.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CPP = Path(__file__).parent
CASES = {"match": 20, "flips": 8, "prefill": 12, "step": 4, "bitflip": 2, "tied": 2}
TURNS = 9


def output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def build(folder: Path, march: str) -> str:
    program = str(folder / march)
    sources = [str(s) for s in sorted((CPP / "src").glob("*.cpp"))]
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-pthread", f"-march={march}"]
    include = f"-I{CPP / 'include'}"
    output("g++", *flags, include, str(CPP / "tests/cost.cpp"), *sources, "-o", program)
    return program


def instructions(program: str, case: str) -> int:
    text = output("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, case)
    found = re.search(r"Collected : (\d+)", text)
    if found is None:
        raise SystemExit(f"valgrind said nothing of instructions:\n{text}")
    return int(found.group(1))


def main(target: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        programs = {m: build(Path(folder), m) for m in ("x86-64", "x86-64-v3")}
        for case, repeats in CASES.items():
            seconds: dict[str, list[float]] = {m: [] for m in programs}
            sums = set()
            for _ in range(TURNS):
                for march, program in programs.items():
                    total, took = output(program, case, str(repeats)).split()
                    sums.add(total)
                    seconds[march].append(float(took))
            if len(sums) != 1:
                raise SystemExit(f"{case}: the builds disagree, {sums}")
            counts = {m: instructions(p, case) for m, p in programs.items()}
            least = {m: min(s) for m, s in seconds.items()}
            rows.append({"case": case, "instructions": counts, "cpu_seconds": least})
            print(
                f"{case:8}: instructions x{counts['x86-64-v3'] / counts['x86-64']:.3f}, "
                f"time x{least['x86-64-v3'] / least['x86-64']:.3f}"
            )
            Path(target).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "isa.json")
