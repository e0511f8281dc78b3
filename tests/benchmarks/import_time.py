"""What `import dmdkit` costs: python tests/benchmarks/import_time.py.

The aim is 0.3 s at the most over `import torch`. Each import runs in a process of its
own, after one that warms the disk's cache; the median of seven is printed.
"""

import statistics
import subprocess
import sys

PROGRAM = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import dmdkit
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    """Times seven processes."""
    times = []
    for _ in range(8):
        output = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)
        times.append([float(value) for value in output.split()])
    torch_time, own_time = (
        statistics.median(column) for column in zip(*times[1:], strict=True)
    )
    print(f"import torch {torch_time:.2f} s, import dmdkit {own_time:.2f} s on top")


if __name__ == "__main__":
    main()
