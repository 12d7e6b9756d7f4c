"""Layouts on a cluster: the lecture's table, the textbook's volumes and bubbles, exact splits, and laws of more."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise, product
from math import inf
from typing import Any, get_args

import pytest
from test_cluster import cluster_of

from tunesmith.parallel.layout import Shard
from tunesmith.plan.layouts import Layout, data_traffic, idle_share, in_flight, pipeline_seconds, tensor_reductions
from tunesmith.plan.loads import Lacks, Work
from tunesmith.plan.memory import TensorSpec, count_memory, estimate_activations
from tunesmith.plan.pieces import Pieces, State, pieces_of
from tunesmith.plan.placed import Board, Placed
from tunesmith.plan.ranking import Ranking, rank
from tunesmith.plan.shape import ModelShape
from tunesmith.plan.spread import Spread
from tunesmith.plan.stages import share_out, split_blocks

PSI = 7_500_000_000
# the account of the lecture: bf16 weights and gradients, K = 12 for float32 masters and two moments
LECTURE = State(weights_bytes=2 * PSI, master_bytes=4 * PSI, gradients_bytes=2 * PSI, optimizer_bytes=8 * PSI)
SHAPE = ModelShape("llama", 8, 64, 160, 8, 4, 8, 512, False, True)
WORK = Work(64, 128)


def specs_of(shape: ModelShape = SHAPE, trained: bool = True, rank: int = 0) -> list[TensorSpec]:
    """The tensors of a llama, with factors on q where there is a rank."""
    d, found = shape.d_model, [TensorSpec("embed.weight", (shape.vocab, shape.d_model), 2, trained)]
    for block in range(shape.n_layers):
        path = f"layers.{block}"
        for role, (inputs, outputs) in shape.matrices().items():
            found.append(TensorSpec(f"{path}.{role}", (outputs, inputs), 2, trained))
        if rank:
            found += [TensorSpec(f"{path}.q.a", (rank, d), 4, True), TensorSpec(f"{path}.q.b", (d, rank), 4, True)]
        found.append(TensorSpec(f"{path}.norm", (d,), 2, trained))
    found.append(TensorSpec("norm", (d,), 2, trained))
    return found if shape.tied else [*found, TensorSpec("head.weight", (shape.vocab, d), 2, trained)]


def pieces(shape: ModelShape = SHAPE, trained: bool = True, rank: int = 0) -> Pieces:
    specs = specs_of(shape, trained, rank)
    base = {spec.name for spec in specs if not spec.name.endswith((".a", ".b"))}
    blocks = [f"layers.{block}" for block in range(shape.n_layers)]
    return pieces_of(specs, shape, blocks=blocks, base=base, context=WORK.row_tokens)


def ranked(model: Pieces, *nodes: dict[str, Any], work: Work = WORK, **more: Any) -> Ranking:
    return rank(cluster_of(*nodes, **more), model, work)


# the textbook


@pytest.mark.parametrize(("shard", "stated"), [("none", 120.0), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_the_lectures_table_comes_from_the_planner(shard: Shard, stated: float) -> None:
    """7.5 B x 64, K = 12 (arXiv 1910.02054, figure 1). Kills: a part that is spread one level too early or late."""
    assert round(LECTURE.held(shard, 64).total_bytes / 1e9, 1) == stated


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("shard", get_args(Shard))
def test_one_process_holds_and_sends_what_the_plan_of_a_run_says(shard: Shard, rank: int) -> None:
    """Kills: a cluster's account that is not that of the layouts that run (`plan.spread`)."""
    specs = specs_of(trained=not rank, rank=rank)
    whole = count_memory(specs, fp32_gradients=True)
    model = pieces(trained=not rank, rank=rank)
    state = sum((part.state(1) for part in model.parts), State())
    spread = Spread(4, shard, micro_batches=3)
    assert state.held(shard, 4).total_bytes == spread.memory(whole, specs).state_bytes
    sent = {kind: round(count) for kind, count in data_traffic(state, shard, 4, 3).items()}
    assert sent == spread.sent_bytes(whole, specs)


@pytest.mark.parametrize(("shard", "psi"), [("none", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)])
def test_volumes_are_those_of_the_textbook(shard: Shard, psi: int) -> None:
    """In numbers of a parameter's size; frozen weights are gathered, never reduced. Kills: 3 psi for frozen weights."""
    trained = State(weights_bytes=64, gradients_bytes=64, trained_bytes=64)
    assert sum(data_traffic(trained, shard, 4, 1).values()) == psi * 64 * 3 / 4
    frozen = State(weights_bytes=64)
    assert sum(data_traffic(frozen, shard, 4, 1).values()) == (2 * 64 * 3 / 4 if shard == "zero3" else 0)


def test_a_tensor_group_adds_up_two_times_forward_and_two_backward() -> None:
    """Kills: sums for blocks that have no backward, and none for a forward that runs again."""
    assert [tensor_reductions(how, True) for how in ("none", "selective", "full")] == [4, 4, 6]
    assert tensor_reductions("none", False) == 2


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), product([1, 2, 4, 8], [1, 4, 32], [1, 2, 4]))
def test_the_idle_share_is_that_of_the_schedule(stages: int, micro_batches: int, chunks: int) -> None:
    """(P - 1) / (V K + P - 1). Kills: a bubble over K instead of over the whole time."""
    expected = (stages - 1) / (chunks * micro_batches + stages - 1)
    assert idle_share([0.5] * stages, micro_batches, chunks) == pytest.approx(expected)


def test_a_pipeline_of_unequal_stages_takes_what_a_simulation_takes() -> None:
    """A micro-batch enters a stage when it and the one before are done. Kills: the average in place of the slowest."""
    times, free = [0.3, 1.0, 0.2, 0.7], [0.0] * 4
    for _ in range(6):
        done = 0.0
        for stage, each in enumerate(times):
            done = free[stage] = max(done, free[stage]) + each
    assert pipeline_seconds(times, 6) == pytest.approx(done)


def test_schedules_hold_as_many_micro_batches_as_they_say() -> None:
    gpipe, one = Layout(pipeline=4, schedule="gpipe"), Layout(pipeline=4, schedule="1f1b")
    inter = replace(one, schedule="interleaved", chunks=2)
    assert [in_flight(gpipe, stage, 16) for stage in range(4)] == [16] * 4
    assert [in_flight(one, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(one, 0, 2) == 2
    # 1 + (P - 1) / (P V) times as much as 1f1b (Korthikanti et al. 2022, section 4.2.3)
    assert in_flight(inter, 0, 16) == pytest.approx(4 * (1 + 3 / 8))


def test_activations_are_those_of_the_plan_of_one_process() -> None:
    """Kills: an account of its own for what a block keeps."""
    model, tokens = pieces(), 256
    inputs = 2 * tokens * SHAPE.d_model  # of the block that is made again: the estimate has them twice
    for how, again, twice in (("none", False, 0), ("full", True, inputs)):
        kept = SHAPE.n_layers * model.kept_bytes(tokens, 1, how) + model.again_bytes(tokens, 1, how)
        told = estimate_activations(SHAPE, tokens, tokens, recompute=again)
        assert kept + model.logits_bytes(tokens, 1) == told - twice


# exact splits


@pytest.mark.parametrize("seed", range(8))
def test_stages_are_cut_as_all_cuts_tried_one_by_one_say(seed: int) -> None:
    """Blocks and devices of all speeds, some without room. Kills: a greedy cut, an even one, memory that is ignored."""
    import random

    draw = random.Random(seed)
    blocks, stages = draw.randint(3, 9), draw.randint(1, 4)
    work = [draw.choice([1.0, 1.0, 2.5]) for _ in range(blocks)]
    slow, room = [draw.choice([1.0, 3.0]) for _ in range(stages)], [draw.randint(1, 6) for _ in range(stages)]
    extra = [draw.choice([0.0, 2.0]) for _ in range(stages)]

    def seconds(stage: int, first: int, end: int) -> float:
        return inf if end - first > room[stage] else slow[stage] * (sum(work[first:end]) + extra[stage])

    def slowest(cuts: tuple[int, ...]) -> float:
        return max(seconds(stage, cuts[stage], cuts[stage + 1]) for stage in range(stages))

    every = [(0, *inner, blocks) for inner in combinations_with_replacement(range(blocks + 1), stages - 1)]
    best = min(map(slowest, every))
    found = split_blocks(blocks, stages, seconds)
    if best == inf:
        assert found is None
        return
    assert found is not None
    assert sum(found) == blocks
    assert slowest(tuple(sum(found[:stage]) for stage in range(stages + 1))) == best


@pytest.mark.parametrize("total", [0, 1, 5, 9])
def test_rows_are_shared_out_as_all_shares_tried_one_by_one_say(total: int) -> None:
    """Kills: shares in proportion, rounded; a limit that is passed over."""
    seconds, before, most = [1.0, 2.2, 0.7], [0.5, 0.0, 3.0], [4, 9, 9]
    every = [counts for counts in product(range(10), repeat=3) if sum(counts) == total and counts[0] <= 4]

    def last(counts: Any) -> float:
        ends = zip(counts, seconds, before, strict=True)
        return max((start + count * each for count, each, start in ends if count), default=0.0)

    found = share_out(total, seconds, before, most)
    assert found is not None
    assert sum(found) == total
    assert last(found) == min(map(last, every))
    assert share_out(23, seconds, before, most) is None


# laws of the whole


LINKS = {
    "within": {"gb_per_second": 5.0, "microseconds": 5.0},
    "between": {"gb_per_second": 1.0, "microseconds": 5.0},
}
NODE = {"device": "rtx-4090", "devices": 4, "count": 2}


def key(found: Placed | Lacks) -> tuple[object, ...]:
    return (found.layout.data, found.layout.shard, found.layout.tensor, found.layout.pipeline)


@pytest.mark.parametrize("where", ["within", "between"])
@pytest.mark.parametrize("rank", [0, 2])
def test_more_bandwidth_is_never_slower(where: str, rank: int) -> None:
    """Kills: a minimum where a maximum belongs, bandwidth and latency mixed up."""
    model = pieces(trained=not rank, rank=rank)
    times = []
    for rate in (0.01, 0.1, 1.0, 100.0):
        link = {"gb_per_second": rate, "microseconds": 10.0}
        found = ranked(model, NODE | {where: link})
        times.append({key(one): (one.seconds, one.exposed_seconds) for one in found.fitting})
    for slower, faster in pairwise(times):
        assert slower.keys() == faster.keys()
        assert all(faster[one][0] <= slower[one][0] * (1 + 1e-12) for one in slower)
    assert times[0] != times[-1]


def test_more_memory_never_excludes_a_layout() -> None:
    """Kills: a comparison the wrong way round, a schedule that is given up too early."""
    big = pieces(replace(SHAPE, n_layers=8, d_model=1024, d_mlp=4096, d_head=128))
    device = {"name": "small", "tflops": 100.0, "memory_gb_per_second": 1000.0}
    device |= {
        "within": {"gb_per_second": 50.0, "microseconds": 5.0},
        "between": {"gb_per_second": 1.0, "microseconds": 5.0},
    }
    fits: set[tuple[object, ...]] = set()
    counts = []
    for memory in (0.3, 0.5, 1.0, 2.0, 8.0):
        found = ranked(big, {"device": device | {"memory_gb": memory}, "devices": 4})
        now = {key(one) for one in found.fitting}
        assert fits <= now
        assert all(one.peak_bytes <= 0.9e9 * memory for one in found.fitting)
        assert all(one.missing_bytes > 0 for one in found.lacking)
        fits = now
        counts.append(len(now))
    assert counts[0] < counts[-1], "the memories tell layouts apart"


def test_first_and_last_stages_carry_the_ends_of_the_model() -> None:
    """A tied table is held at both. Kills: a copy that is forgotten, ends on every stage."""
    for tied in (False, True):
        shape = replace(SHAPE, tied=tied, vocab=8192)
        board = Board(cluster_of({"device": "h100", "devices": 4}), pieces(shape), WORK, 1, 1, 4)
        found = board.place(Layout(pipeline=4, schedule="1f1b"))
        assert isinstance(found, Placed)
        table, block = 2 * shape.head_parameters, pieces(shape).blocks[0].state(1).weights_bytes
        weights = [stage.state.weights_bytes - stage.blocks * block for stage in found.stages]
        assert weights == [table, 0, 0, table + 2 * shape.d_model]
        assert found.stages[3].blocks < found.stages[1].blocks, "the head is work, too"


def test_shares_follow_speed_where_devices_are_unequal() -> None:
    """Kills: even stages and even shares on uneven devices."""
    big = pieces(replace(SHAPE, d_model=1024, d_mlp=4096, d_head=128))
    cluster = cluster_of({"device": "h100", "devices": 2}, {"device": "a100", "devices": 2})
    by_data = Board(cluster, big, Work(256, 512), 1, 4, 1).place(Layout(data=4))
    assert isinstance(by_data, Placed)
    fast, slow = by_data.micro_batches[0], by_data.micro_batches[-1]
    assert sum(by_data.micro_batches) == 256
    assert fast / slow == pytest.approx(989.5 / 312, rel=0.05)
    by_stage = Board(cluster, big, Work(256, 512), 1, 2, 2).place(Layout(data=2, pipeline=2, schedule="1f1b"))
    assert isinstance(by_stage, Placed)
    assert by_stage.stages[0].blocks > by_stage.stages[1].blocks


def test_gpipe_is_as_fast_as_1f1b_and_holds_more() -> None:
    """Why it is not searched. Kills: a search that leaves out what could win."""
    board = Board(cluster_of(NODE), pieces(), WORK, 1, 2, 4)
    layout = Layout(data=2, pipeline=4)
    gpipe, one = (board.place(replace(layout, schedule=schedule)) for schedule in ("gpipe", "1f1b"))
    assert isinstance(gpipe, Placed)
    assert isinstance(one, Placed)
    assert (gpipe.seconds, gpipe.idle) == (one.seconds, one.idle)
    assert gpipe.peak_bytes > one.peak_bytes


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Kills: a bound that is not one, rows of a micro-batch that are given up too early."""
    model = pieces(replace(SHAPE, d_model=256, d_mlp=1024, d_head=32))
    device = {"name": "small", "tflops": 100.0, "memory_gb": 0.08, "memory_gb_per_second": 500.0}
    device |= {
        "within": {"gb_per_second": 5.0, "microseconds": 5.0},
        "between": {"gb_per_second": 1.0, "microseconds": 5.0},
    }
    cluster = cluster_of({"device": device, "devices": 4})
    found = rank(cluster, model, WORK)
    assert found.fitting
    assert found.lacking
    for best in found.fitting:
        layout = best.layout
        board = Board(cluster, model, WORK, layout.tensor, layout.data, layout.pipeline)
        pipelines: list[tuple[Any, int]] = [("none", 1)]
        if layout.pipeline > 1:
            pipelines = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
        tried = []
        for (schedule, chunks), how, power in product(pipelines, ("none", "selective", "full"), range(7)):
            even = 64 // 2**power % (layout.data * layout.pipeline) == 0 and chunks * layout.pipeline <= 8
            one = replace(layout, schedule=schedule, chunks=chunks, recompute=how, micro_rows=2**power)
            if chunks == 1 or even:
                tried.append(board.place(one))
        times = [one.seconds for one in tried if isinstance(one, Placed)]
        assert best.seconds == min(times), layout


def test_utilisation_is_work_over_peak() -> None:
    """One device without links: 60 % while computing. Kills: recomputation that counts as useful."""
    big = pieces(replace(SHAPE, d_model=2048, d_mlp=8192, d_head=256))
    board = Board(cluster_of({"device": "h200", "devices": 1}), big, Work(32, 4096), 1, 1, 1)
    kept, again = (board.place(Layout(recompute=how, micro_rows=1)) for how in ("none", "full"))
    assert isinstance(kept, Placed)
    assert isinstance(again, Placed)
    # a backward of attention makes its scores again, which is not useful
    assert 0.55 < kept.mfu < 0.6
    assert again.mfu == pytest.approx(kept.mfu * kept.seconds / again.seconds)
    assert again.seconds > 1.25 * kept.seconds
