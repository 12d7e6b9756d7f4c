"""People who judge while the server is killed: nothing that was acknowledged is lost, nothing is there twice.

`python tests/killing_judges.py 16 5000 20` lets 16 people give 5,000 judgements while the server is killed 20 times,
and prints what was counted; exit 1 where a judgement is lost, double, or other than it was sent.
"""

from __future__ import annotations

import random
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparing import Served, filled, judgement, persist
from sqlalchemy import func, select

from tunesmith.compare.store import Store
from tunesmith.compare.tables import judgements, undone


@dataclass
class Person:
    """One who judges until nothing is left, and keeps account of what was acknowledged."""

    link: str
    seed: int
    until: float
    acknowledged: list[dict[str, Any]] = field(default_factory=list)
    taken_back: set[str] = field(default_factory=set)
    resent: int = 0

    def run(self) -> None:
        draw = random.Random(self.seed)
        turn = persist(self.link + "next", {}, self.until)
        while turn["item"] is not None or turn["waiting"]:
            if turn["item"] is None:
                time.sleep(0.2)
                turn = persist(self.link + "next", {}, self.until)
                continue
            kind = draw.choices(["ranked", "bad", "skip"], [90, 5, 5])[0]
            ranks = draw.choice([[1, 2], [2, 1], [1, 1]]) if kind == "ranked" else None
            sent = judgement(turn["item"], ranks, kind, comment=draw.choice(["", "why not"]))
            turn = persist(self.link + "judge", sent, self.until)
            self.acknowledged.append(sent)
            if draw.random() < 0.05:  # a reply may get lost although the judgement arrived
                turn = persist(self.link + "judge", sent, self.until)
                self.resent += 1
            if draw.random() < 0.03:
                undo = {"client": f"undo-{sent['client'][:20]}", "judgement": sent["client"]}
                turn = persist(self.link + "undo", undo, self.until)
                self.taken_back.add(sent["client"])


def free_port() -> int:
    """A port that nobody listens on: a server that comes back has to be where it was."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(folder: Path, people: int, prompts: int, kills: int, overlap: int, seconds: float) -> dict[str, Any]:
    """Counts of what was acknowledged and what is in the store."""
    store = filled(folder, prompts)
    names = ",".join(f"p{number}" for number in range(people))
    options = ("--annotators", names, "--overlap", str(overlap), "--port", str(free_port()))
    server = Served(folder, *options)
    until = time.monotonic() + seconds
    crowd = [Person(link, number, until) for number, link in enumerate(server.links.values())]
    threads = [threading.Thread(target=one.run) for one in crowd]
    for thread in threads:
        thread.start()
    wanted, done = prompts * overlap, 0
    try:
        for number in range(1, kills + 1):
            # spread over the work, so that each kill hits people who are judging
            while done < wanted * number / (kills + 1) and any(one.is_alive() for one in threads):
                time.sleep(0.01)
                done = sum(len(one.acknowledged) for one in crowd)
            server.kill()
            server.start()
        for thread in threads:
            thread.join()
    finally:
        server.kill()
    return counted(store, crowd, kills)


def counted(store: Store, crowd: list[Person], kills: int) -> dict[str, Any]:
    """What people were told beside what is kept."""
    told = {one["client"]: one for person in crowd for one in person.acknowledged}
    back = set().union(*(person.taken_back for person in crowd))
    with store.reading() as connection:
        rows = {row.client: row for row in connection.execute(select(judgements))}
        count = connection.execute(select(func.count()).select_from(judgements)).scalar_one()
        gone = set(connection.execute(select(judgements.c.client).join(undone)).scalars())
    standing = [(row.annotator, row.prompt) for client, row in rows.items() if client not in gone]
    return {
        "kills": kills,
        "acknowledged": len(told),
        "sent again": sum(person.resent for person in crowd),
        "lost": len(set(told) - set(rows)),
        "never sent": len(set(rows) - set(told)),
        "double": count - len(rows) + len(standing) - len(set(standing)),
        "changed": sum(one["kind"] != rows[client].kind for client, one in told.items() if client in rows),
        "taken back": len(back),
        "undo lost or invented": len(back ^ gone),
        "standing": len(standing),
    }


def main() -> int:
    people, wanted, kills = map(int, sys.argv[1:4])
    overlap = 2
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found = run(Path(folder) / "c", people, -(-wanted // overlap), kills, overlap, 3000.0)
    for name, value in found.items():
        print(f"{name:24} {value}")
    print(f"{'seconds':24} {time.monotonic() - began:.0f}")
    return int(any(found[name] for name in ("lost", "never sent", "double", "changed", "undo lost or invented")))


if __name__ == "__main__":
    sys.exit(main())
