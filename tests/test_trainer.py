"""Laws of the loop: budgets, best weights, evaluation, randomness, divergence."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from tiny_training import Row, TinyTuned, collate, evaluation, lasting, rows, run, settings, stream

from tunesmith.core.errors import ConfigError, DataError, DivergedError, Stopped
from tunesmith.core.types import Mean
from tunesmith.objectives.sft import SFT
from tunesmith.train.section import PrecisionSection, StopSection
from tunesmith.train.trainer import train

PLAIN = PrecisionSection(compute="fp32")


def test_the_whole_run_is_the_same_at_any_micro_batch_size(tmp_path):
    """Kills: anything that depends on the number of micro-batches between two steps."""
    ends = {}
    for micro in (1, 2, 5):
        tuned = TinyTuned(dtype=torch.float64)
        run(tmp_path / str(micro), settings(micro_batch_rows=micro, weight_decay=0.1), tuned=tuned)
        ends[micro] = torch.cat([value.detach().flatten() for value in tuned.parameters.values()])
    for micro in (1, 2):
        assert torch.allclose(ends[micro], ends[5], rtol=1e-9, atol=1e-12)


class Spiking(SFT):
    """A loss or gradient that stops being a number at its fourth call."""

    def loss(self, policy, batch):
        mean = super().loss(policy, batch)
        calls[0] += 1
        if calls[0] < 4:
            return mean
        spoilt = mean.total * math.nan if calls[1] else _Spoil.apply(mean.total)
        return Mean(spoilt, mean.weight)


calls = [0, 0]


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize(("spoil", "told"), [(1, "step 4: the loss is not"), (0, "step 4: the norm of the gradient")])
def test_a_number_that_is_not_finite_ends_the_run_before_anything_changes(tmp_path, monkeypatch, spoil, told):
    """Kills: clipping with a norm of NaN, which makes every parameter NaN."""
    monkeypatch.setattr("tiny_training.SFT", Spiking)
    calls[:] = [0, spoil]
    tuned = TinyTuned()
    kept = []
    with pytest.raises(DivergedError, match=told) as caught:
        run(
            tmp_path,
            settings(save_every=2, micro_batch_rows=5),
            tuned=tuned,
            observers=[lambda record: kept.append([p.detach().clone() for p in tuned.parameters.values()])],
        )
    assert caught.value.exit_code == 6
    assert "rows.jsonl:" in str(caught.value)
    assert "step-000002" in caught.value.hint
    assert len(kept) == 3
    assert all(torch.equal(*pair) for pair in zip(kept[-1], tuned.parameters.values(), strict=True))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_that_diverges_before_its_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_training.SFT", Spiking)
    calls[:] = [0, 1]
    with pytest.raises(DivergedError) as caught:
        run(tmp_path, settings(save_every=5, micro_batch_rows=5))
    assert caught.value.hint.endswith("; nothing was saved yet")


def test_evaluating_more_often_changes_no_byte(tmp_path):
    """Kills: an evaluation that draws from the training's random numbers or leaves the model in another mode."""
    ends = []
    for every in (0, 1, 3):
        tuned = TinyTuned(dropout=0.3)
        evaluate = evaluation(tuned) if every else None
        run(tmp_path / str(every), tuned=tuned, evaluate=evaluate, evaluate_every=every)
        found = lasting(tmp_path / str(every))
        lines = [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]
        ends.append((found, [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines]))
    assert ends[0] == ends[1] == ends[2]


def test_evaluation_runs_without_dropout(tmp_path):
    """Kills: leaving the model in training mode after a step."""
    tuned = TinyTuned(dropout=0.5)
    modes = []
    run(tmp_path, tuned=tuned, evaluate=lambda step: {"x": float(modes.append(tuned.policy.model.training) or 0)},
        evaluate_every=4)  # fmt: skip
    assert modes == [False] * 3


def test_dropout_differs_between_steps_and_micro_batches_and_depends_on_the_seed(tmp_path):
    """Kills: one seed for all micro-batches; a seed that is not used."""
    data = [Row([1, 2, 3, 4], [False, True, True, True], "same")] * 4
    still = settings(steps=2, lr=0.0, rows_per_step=2, micro_batch_rows=1)
    losses = {}
    for seed in (0, 1):
        seen = []

        class Watching(SFT):
            def loss(self, policy, batch, seen=seen):
                mean = super().loss(policy, batch)
                seen.append(mean.total.item())
                return mean

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tiny_training.SFT", Watching)
            run(tmp_path / str(seed), still.model_copy(update={"seed": seed}), tuned=TinyTuned(dropout=0.5), data=data)
        losses[seed] = seen
    assert len({*losses[0], *losses[1]}) == 8


def test_training_leaves_the_random_state_of_the_caller_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def scripted(values):
    """An evaluation that answers what it is told to, one value a call."""
    left = list(values)
    return lambda step: {"bleu": left.pop(0)}


def test_early_stop_ends_after_patience_and_the_best_weights_are_the_result(tmp_path):
    """Kills: returning the last weights; pruning the best checkpoint."""
    tuned = TinyTuned()
    at_step = {}
    result = run(
        tmp_path,
        settings(steps=50, save_every=100, keep=1, stop=StopSection(metric="bleu", patience=3)),
        tuned=tuned,
        evaluate=scripted([1.0, 4.0, 3.0, 4.0, 2.0]),
        evaluate_every=2,
        observers=[lambda r: at_step.update({r["step"]: {k: p.detach().clone() for k, p in tuned.parameters.items()}})],
    )
    assert (result.reason, result.step, result.weights_step, result.best_value) == ("stop", 10, 4, 4.0)
    assert all(torch.equal(p, at_step[4][name]) for name, p in tuned.parameters.items())
    assert not all(torch.equal(p, at_step[10][name]) for name, p in tuned.parameters.items())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000010"]


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path, caplog):
    """Kills: `value > best` written the other way round, where NaN wins."""
    result = run(
        tmp_path,
        settings(steps=8, stop=StopSection(metric="bleu", patience=9)),
        evaluate=scripted([math.nan, 2.0, math.nan, 1.0]),
        evaluate_every=2,
    )
    assert (result.weights_step, result.best_value) == (4, 2.0)
    assert "cannot be the best" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["eval_bleu"] is None


def test_a_loss_is_best_when_it_is_low(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    result = run(
        tmp_path,
        settings(steps=6, stop=StopSection(metric="loss", patience=9)),
        evaluate=lambda step: {"loss": next(values)},
        evaluate_every=2,
    )
    assert (result.weights_step, result.best_value) == (4, 1.0)


def test_an_evaluation_loss_that_is_not_finite_is_divergence(tmp_path):
    with pytest.raises(DivergedError, match="step 2: the evaluation's loss"):
        run(tmp_path, evaluate=lambda step: {"loss": math.inf}, evaluate_every=2)


def test_stopping_on_a_metric_that_is_not_evaluated_names_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="bleu"):
        run(tmp_path, settings(stop=StopSection(metric="blue")), evaluate=scripted([1.0]), evaluate_every=1)


@pytest.mark.parametrize(
    ("changes", "epochs", "reason", "step"),
    [
        ({"steps": 7}, 1000, "steps", 7),
        ({"steps": None, "epochs": 2}, 2, "epochs", 10),
        ({"steps": 90, "tokens": 100}, 1000, "tokens", 3),
        ({"steps": 90, "minutes": 1e-9}, 1000, "minutes", 1),
    ],
)
def test_each_budget_ends_the_run_saved(tmp_path, changes, epochs, reason, step):
    """Kills: a budget that ends without a checkpoint of the last step; a partial last step that is dropped."""
    result = run(tmp_path, settings(**changes), epochs=epochs, total_steps=changes["steps"] or 99)
    assert (result.reason, result.step) == (reason, step)
    assert (tmp_path / f"checkpoints/step-{step:06d}").is_dir()
    if reason == "epochs":
        assert result.rows == 48
    if reason == "tokens":
        assert result.tokens >= 100


def test_rows_that_are_left_out_are_counted_over_the_whole_run(tmp_path):
    """Kills: a count that begins anew on resume; keeping only the last step's."""
    section = settings(steps=4, save_every=9)

    def steps(start):
        return (replace(step, dropped={"too long": 2, "empty": 1}) for step in stream(rows(), section)(start))

    def once(**rest):
        return train(
            TinyTuned(), steps, SFT(), section, PLAIN, tmp_path, total_steps=4, collate=collate, **rest
        )  # fmt: skip

    with pytest.raises(Stopped):
        once(observers=[lambda record: signal.raise_signal(signal.SIGTERM)])
    result = once(resume=True)
    assert result.resumed_step == 1
    assert result.dropped == {"too long": 8, "empty": 4}


def test_a_run_without_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no rows to train on"):
        run(tmp_path, epochs=0)


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match="checkpoints of another run"):
        run(tmp_path)


def test_an_observer_without_disk_is_switched_off_and_the_run_goes_on(tmp_path, caplog):
    def full(record):
        raise OSError(28, "No space left on device")

    assert run(tmp_path, observers=[full]).step == 12
    assert caplog.text.count("is switched off") == 1


def test_the_objective_overfits_a_few_rows(tmp_path):
    """Kills: targets that are shifted by one: tokens would have to be guessed."""
    data = [Row([3, 4, 5, 6], [False, True, True, True], "a"), Row([7, 8, 9], [False, True, True], "b")]
    run(tmp_path, settings(steps=60, lr=0.03, rows_per_step=2, save_every=60), data=data, tuned=TinyTuned())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.02
