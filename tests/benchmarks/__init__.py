"""Benchmarks: ``make bench``, or ``python -m tests.benchmarks``."""

import os

# Read when torch is loaded. The profiler that counts allocations would announce itself at every call.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
