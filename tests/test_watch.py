"""How processes find out that one of them is gone, with a store in place of a network."""

from __future__ import annotations

import time

import torch.distributed as dist

from tunesmith.parallel.watch import Watch


def pair() -> tuple[Watch, Watch]:
    store = dist.HashStore()
    return Watch(store, 0, 2), Watch(store, 1, 2)


def test_a_process_that_no_longer_counts_is_gone_and_one_that_counts_is_not() -> None:
    """Kills: taking the time of another machine's clock; a peer that is slow for one that is dead."""
    mine, peer = pair()
    assert mine._failure(0.05) == ""
    time.sleep(0.1)
    peer._beat()
    assert mine._failure(0.05) == ""
    time.sleep(0.1)
    assert "rank 1: gone" in mine._failure(0.05)


def test_a_process_that_has_left_is_not_missed() -> None:
    """Kills: an error at the end of every run, when the first process goes on to judge."""
    mine, peer = pair()
    peer.start()
    peer.close()
    assert mine._failure(0.05) == ""
    time.sleep(0.1)
    assert mine._failure(0.05) == ""


def test_the_first_failure_that_is_told_is_the_reason() -> None:
    """Kills: hiding the cause behind the errors that follow from it."""
    mine, peer = pair()
    peer.tell("the disk is full")
    mine.tell("a peer process is gone")
    assert mine.reason(1.0) == "rank 1: the disk is full"
