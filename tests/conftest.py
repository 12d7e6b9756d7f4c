"""One compute thread a test process: two of them run side by side, and beside a busy core one thread is faster."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
