"""What an update costs by the format of its moments: python benchmarks/moments.py

Processor nanoseconds a trained number, one thread, fp32 masters, for each `train.optimizer_state`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Measures every format and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    options = parser.parse_args()
    import torch

    from tunesmith.train.optim import optimizer_for
    from tunesmith.train.section import TrainSection

    torch.set_num_threads(1)
    for state in ("fp32", "bf16", "int8"):
        masters = {f"w{place}": torch.nn.Parameter(torch.randn(1536, 576)) for place in range(6)}
        settings: dict[str, Any] = {"steps": 1, "optimizer_state": state}
        optimizer = optimizer_for(masters, TrainSection(**settings), {})
        for master in masters.values():
            master.grad = torch.randn_like(master)
        optimizer.step(1e-4)
        began = time.process_time()
        for _ in range(options.updates):
            optimizer.step(1e-4)
        count = options.updates * sum(master.numel() for master in masters.values())
        print(f"{state:5} {(time.process_time() - began) / count * 1e9:7.1f} ns")


if __name__ == "__main__":
    main()
