"""How the processes of a layout are started: with torchrun, whose command line is written here and nothing else.

Needs no torch. What torchrun tells its processes is in their environment: RANK, WORLD_SIZE and where to meet.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import ConfigError
from tunesmith.parallel.layout import AutoLayout, LayoutSection

PORT = 29500


@dataclass(frozen=True)
class Launch:
    """The processes of a run on some machines.

    Attributes:
        layout: how many processes there are.
        words: of the command that each of them runs, after `tunesmith`.
        nodes: machines; the processes are spread evenly.
        endpoint: where the processes of several machines meet, as HOST or HOST:PORT.
        restarts: how many times torchrun starts all again after a failure; they go on from the newest checkpoint.
    """

    layout: LayoutSection
    words: Sequence[str]
    nodes: int = 1
    endpoint: str = ""
    restarts: int = 0

    def __post_init__(self) -> None:
        if self.layout.processes % self.nodes:
            told = f"{self.layout.processes} processes cannot be spread evenly over {self.nodes} machines"
            raise ConfigError(told, where="--nodes")

    def arguments(self, endpoint: str = "", name: str = "tunesmith") -> list[str]:
        """What torchrun is given."""
        if self.nodes == 1:
            found = ["--standalone"]
        else:
            host = endpoint or self.endpoint or "HOST"
            host = host if ":" in host else f"{host}:{PORT}"
            found = ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", host, "--rdzv-id", name]
        found += ["--nproc-per-node", str(self.layout.processes // self.nodes)]
        if self.restarts:
            found += ["--max-restarts", str(self.restarts)]
        return [*found, "-m", "tunesmith", *self.words]

    def line(self) -> str:
        """The command line, for a shell; on several machines it is run on each."""
        return shlex.join(["torchrun", *self.arguments()])

    def slurm(self) -> str:
        """A batch script for Slurm: `sbatch FILE`."""
        words = shlex.join(["torchrun", *self.arguments("HEAD", "JOB")])
        # the shell fills these in on the cluster
        words = words.replace(f"HEAD:{PORT}", f'"$head:{PORT}"').replace("--rdzv-id JOB", '--rdzv-id "$SLURM_JOB_ID"')
        return (
            "#!/bin/bash\n"
            "#SBATCH --job-name=tunesmith\n"
            f"#SBATCH --nodes={self.nodes}\n"
            "#SBATCH --ntasks-per-node=1\n"
            # a minute before the end of its time each process gets SIGTERM, saves and stops
            "#SBATCH --signal=TERM@60\n"
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
            f"srun {words}\n"
        )


def started(layout: LayoutSection, line: str) -> tuple[int, int]:
    """Rank of this process and how many there are. Raises ConfigError where that is not what the layout needs.

    Args:
        line: how to start it, for the hint.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size != layout.processes and not isinstance(layout, AutoLayout):
        here = "this is one process" if size == 1 else f"torchrun has started {size}"
        told = f"a layout of {layout.processes} process{'es' if layout.processes > 1 else ''}, and {here}"
        raise ConfigError(told, where="layout", hint=line if layout.processes > 1 else f"set layout.data={size}")
    return int(os.environ.get("RANK", "0")), size


def is_restarted() -> bool:
    """Whether torchrun has started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
