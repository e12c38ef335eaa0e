"""Benchmarks of reflora; run them as modules from the repository root, `python -m benchmarks.throughput`."""

import os

# torch's profiler, the counter of CPU memory, reads these when torch is loaded; else it writes to the reader's terminal
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
