"""Memory of a process of its own."""

import subprocess
import sys

_PROGRAM = """
import resource, torch
{imports}
torch.set_num_threads(1)

def step(rows):
    {step}

step(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({rows})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_growth(imports: str, step: str, rows: int, *, timeout: float) -> int:
    """Growth of a process's peak memory (KiB on Linux) by ``step`` with ``rows`` after one with 100.

    Args:
        imports: Statements before the step; torch is there.
        step: Lines that use the number ``rows``.
        rows: Of the step that counts.
        timeout: Seconds after which the process is given up.
    """
    program = _PROGRAM.format(imports=imports, step=step.strip().replace("\n", "\n    "), rows=rows)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=timeout
    )
    return int(run.stdout)
