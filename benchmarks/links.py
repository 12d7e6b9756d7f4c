"""The planner's links against real ones: gloo ranks in network namespaces whose links a token bucket holds back.

    python benchmarks/links.py [--ranks 2 4] [--megabits 100] [--json]

Every rank has a network namespace of its own, tied to a bridge by a pair of virtual devices with `tc tbf` at both ends,
so a link has its rate in each direction. Latency and bandwidth are fitted on every second size and the other sizes are
predicted with `tunesmith.plan.links`. Needs root and iproute2; namespaces and bridge are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.plan.links import Link, coefficients, fit

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "send")
SIZES = tuple(2**power for power in range(16, 24))  # 64 KiB to 8 MiB
TURNS = 4
NAME = f"ts{os.getpid() % 10_000}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabits", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="bytes of the largest buffer")
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)  # a worker: its number, of how many
    options = parser.parse_args()
    if options.rank:
        rank, ranks = options.rank
        work(rank, ranks, options.most)
        return
    rows = [row for ranks in options.ranks for row in measured(ranks, options.megabits, options.most)]
    links = fitted(rows)
    for row in rows:
        steps, moved = expected(row["kind"], row["ranks"], row["bytes"])
        row["expected_bytes"] = moved
        link = links[row["ranks"]]
        row["predicted"] = steps * link.seconds + moved / link.bytes_per_second
        row["error"] = row["predicted"] / row["seconds"] - 1
    report(rows, links, options.megabits, options.json)


def expected(kind: str, ranks: int, nbytes: int) -> tuple[int, float]:
    """Steps and bytes of a collective as gloo makes it: it scatters sums by adding everything up everywhere, which is
    an all-reduce, as the bytes that leave a namespace show."""
    return coefficients("all_reduce" if kind == "reduce_scatter" else kind, ranks, nbytes)


def fitted(rows: list[dict[str, Any]]) -> dict[int, Link]:
    """One link for each number of ranks, from every second size of all collectives."""
    return {
        ranks: fit(
            [
                (*expected(row["kind"], ranks, row["bytes"]), row["seconds"])
                for row in rows
                if row["ranks"] == ranks and row["fitted"]
            ]
        )
        for ranks in {row["ranks"] for row in rows}
    }


def report(rows: list[dict[str, Any]], links: dict[int, Link], megabits: int, as_json: bool) -> None:
    predicted = [row for row in rows if not row["fitted"]]
    errors = {ranks: [abs(row["error"]) for row in predicted if row["ranks"] == ranks] for ranks in links}
    if as_json:
        found = {ranks: asdict(link) for ranks, link in links.items()}
        medians = {ranks: statistics.median(each) for ranks, each in errors.items()}
        print(json.dumps({"megabits": megabits, "links": found, "median_error": medians, "rows": rows}))
        return
    print("| ranks | collective | bytes | sent, over expected | measured, ms | predicted, ms | error |")
    print("|---|---|---|---|---|---|---|")
    for row in predicted:
        over = row["sent"] / row["expected_bytes"]
        times = f"{1e3 * row['seconds']:.1f} | {1e3 * row['predicted']:.1f} | {100 * row['error']:+.1f} %"
        print(f"| {row['ranks']} | {row['kind']} | {row['bytes']:,} | {over:.2f} | {times} |")
    for ranks, link in sorted(links.items()):
        rate = f"{link.bytes_per_second * 8e-6:.0f} Mbit/s of {megabits}, {1e6 * link.seconds:.0f} us"
        middle, most = statistics.median(errors[ranks]), max(errors[ranks])
        print(f"\n{ranks} ranks: {rate}; median error {100 * middle:.1f} %, largest {100 * most:.1f} %")


def measured(ranks: int, megabits: int, most: int = SIZES[-1]) -> Iterator[dict[str, Any]]:
    """Seconds of every collective and size: the fastest turn, as others use the processors."""
    with namespaces(ranks, megabits) as names:
        environment = {**os.environ, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": "eth0"}
        environment |= {"OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    sys.executable,
                    __file__,
                    "--rank",
                    str(rank),
                    str(ranks),
                    "--most",
                    str(most),
                ],
                env=environment,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank, name in enumerate(names)
        ]
        try:
            output, _ = processes[0].communicate(timeout=300)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for line in output.splitlines():
        yield json.loads(line)


@contextmanager
def namespaces(ranks: int, megabits: int) -> Iterator[list[str]]:
    """A namespace for each rank, all on one bridge."""
    names, bridge = [f"{NAME}n{rank}" for rank in range(ranks)], f"{NAME}b"
    bucket = f"tbf rate {megabits}mbit burst 16kb latency 50ms"
    try:
        ip(f"link add {bridge} type bridge")
        ip(f"link set {bridge} up")
        for rank, name in enumerate(names):
            ip(f"netns add {name}")
            ip(f"link add {NAME}v{rank} type veth peer name eth0 netns {name}")
            ip(f"link set {NAME}v{rank} master {bridge} up")
            ip(f"-n {name} addr add 10.77.0.{rank + 1}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
            run(f"tc -n {name} qdisc add dev eth0 root {bucket}")
            run(f"tc qdisc add dev {NAME}v{rank} root {bucket}")
        yield names
    finally:
        for rank, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"{NAME}v{rank}"], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", bridge], check=False, stderr=subprocess.DEVNULL)


def ip(line: str) -> None:
    run(f"ip {line}")


def run(line: str) -> None:
    subprocess.run(line.split(), check=True)


def work(rank: int, ranks: int, most: int) -> None:
    """A rank: does everything with the others; the first one tells the times."""
    import torch
    import torch.distributed as dist

    from tunesmith.parallel.traffic import Traffic

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    traffic = Traffic(ranks)
    for kind in KINDS:
        for number, nbytes in enumerate(size for size in SIZES if size <= most):
            whole, part = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4 // ranks)
            times, before = [], sent_bytes()
            for _ in range(TURNS + 1):
                dist.barrier()
                began = time.perf_counter()
                call(kind, traffic, whole, part, rank)
                times.append(time.perf_counter() - began)
            sent = (sent_bytes() - before) / (TURNS + 1)
            told = torch.tensor(min(times[1:]), dtype=torch.float64)  # the first opens connections
            dist.all_reduce(told, dist.ReduceOp.MAX)
            row = {
                "ranks": ranks,
                "kind": kind,
                "bytes": nbytes,
                "seconds": told.item(),
                "sent": sent,
                "fitted": number % 2 == 0,
            }
            if rank == 0:
                print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def sent_bytes() -> int:
    """That have left this namespace, headers included."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def call(kind: str, traffic: Any, whole: Any, part: Any, rank: int) -> None:
    if kind == "all_gather":
        traffic.all_gather(whole, part)
    elif kind == "reduce_scatter":
        traffic.reduce_scatter(part, whole)
    elif kind == "all_reduce":
        traffic.all_reduce(whole)
    elif rank == 0:
        traffic.send(whole, 1)
    elif rank == 1:
        traffic.receive(whole, 0)


if __name__ == "__main__":
    main()
