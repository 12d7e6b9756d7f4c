"""Laws of one update: sums and weights, one division, AdamW, clipping, what may change."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from tiny_training import Row, TinyTuned, collate, rows, run, settings

from tunesmith.core.errors import DataError, ModelError
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.layout import Single
from tunesmith.train.optim import AdamW
from tunesmith.train.precision import Precision
from tunesmith.train.section import PrecisionSection
from tunesmith.train.step import accumulate, update

PLAIN = PrecisionSection(compute="fp32")


def gradients(dtype, cut, data):
    """Loss and gradient of one step whose rows are cut into pieces of `cut`."""
    tuned = TinyTuned(dtype=dtype)
    precision = Precision(tuned.parameters, PLAIN)
    batches = [collate(data[at : at + cut]) for at in range(0, len(data), cut)]
    loss = accumulate(SFT(), tuned.policy, batches, precision, Single())
    return loss, torch.cat([master.grad.flatten() for master in precision.masters.values()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("count", [8, 7])
def test_how_a_step_is_cut_changes_neither_loss_nor_gradient(dtype, tolerance, count):
    """Kills: dividing by a micro-batch's own weight, by their number, or by the configured window."""
    data = rows(count)
    loss, whole = gradients(dtype, count, data)
    for cut in (1, 2, 4, 8):
        cut_loss, cut_gradient = gradients(dtype, cut, data)
        assert cut_loss == pytest.approx(loss, rel=tolerance)
        assert ((cut_gradient - whole).norm() / whole.norm()).item() <= tolerance


def test_the_loss_is_the_mean_over_supervised_tokens():
    """Kills: averaging over rows or over all tokens."""
    data = rows(6)
    tuned = TinyTuned(dtype=torch.float64)
    losses = torch.cat([tuned.policy.token_losses(collate([row])) for row in data])
    loss, _ = gradients(torch.float64, 2, data)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert losses.numel() == sum(sum(row.supervised) for row in data)


def test_a_micro_batch_without_supervised_tokens_changes_nothing():
    """Kills: 0 / 0 for a batch that teaches nothing."""
    silent = Row([1, 2, 3], [False] * 3, "silent")
    data = rows(4)
    loss, whole = gradients(torch.float64, 1, data)
    with_silent = gradients(torch.float64, 1, [data[0], silent, *data[1:]])
    assert with_silent[0] == loss
    assert torch.equal(with_silent[1], whole)


def test_a_step_without_supervised_tokens_is_an_error_naming_its_rows(tmp_path):
    """Kills: reporting a loss of 0 and going on."""
    silent = [Row([1, 2, 3], [False] * 3, f"rows.jsonl:{n}") for n in (1, 2)]
    with pytest.raises(DataError, match=r"rows\.jsonl:[12], rows\.jsonl:[12]") as caught:
        run(tmp_path, settings(rows_per_step=2), data=silent)
    assert caught.value.exit_code == 3


def test_adamw_is_the_formula_of_the_paper():
    """Kills: moments, bias correction, epsilon, decay order, decay of norms and biases."""
    names = ("matrix", "bias")
    draw = torch.Generator().manual_seed(0)
    start = {"matrix": torch.randn(4, 3, generator=draw), "bias": torch.randn(3, generator=draw)}
    masters = {name: torch.nn.Parameter(start[name].double()) for name in names}
    optimizer = AdamW(masters, weight_decay=0.1)
    value = {name: start[name].double().clone() for name in names}
    first = {name: torch.zeros_like(value[name]) for name in names}
    second = {name: torch.zeros_like(value[name]) for name in names}
    for step in range(1, 6):
        lr = 0.01 * step
        for name in names:
            gradient = torch.randn(value[name].shape, generator=draw).double()
            masters[name].grad = gradient.clone()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            decay = 0.1 if name == "matrix" else 0.0
            value[name] = value[name] - lr * (corrected[0] / (corrected[1].sqrt() + 1e-8) + decay * value[name])
        optimizer.step(lr)
    for name in names:
        assert torch.allclose(masters[name], value[name], rtol=1e-12, atol=1e-14)
        assert torch.allclose(optimizer.state()["first/" + name], first[name], rtol=1e-12)
        assert torch.allclose(optimizer.state()["second/" + name], second[name], rtol=1e-12)


def test_the_optimizer_holds_exactly_what_is_declared_trainable():
    """Kills: leaving norms and biases out of the groups."""
    tuned = TinyTuned()
    optimizer = AdamW(tuned.parameters)
    held = [parameter for group in optimizer.inner.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in tuned.parameters.values()}
    assert len(held) == len(tuned.parameters)
    with pytest.raises(ModelError, match="nothing is trainable"):
        AdamW({})
    with pytest.raises(ModelError, match="two names"):
        AdamW({"a": held[0], "b": held[0]})


def test_only_what_is_declared_changes_and_all_of_it_does(tmp_path):
    """Kills: an optimizer over model.parameters()."""
    tuned = TinyTuned()
    before = {name: value.detach().clone() for name, value in tuned.policy.model.named_parameters()}
    for value in tuned.parameters.values():
        value.requires_grad_(False)
    tuned.parameters = {"up.weight": tuned.parameters["up.weight"].requires_grad_(True)}
    run(tmp_path, settings(steps=1), tuned=tuned)
    changed = {name for name, value in tuned.policy.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"up.weight"}


def test_a_parameter_that_no_loss_reaches_is_named(tmp_path, caplog):
    tuned = TinyTuned()
    tuned.parameters["idle"] = torch.nn.Parameter(torch.ones(3))
    run(tmp_path / "some", settings(steps=2), tuned=tuned)
    assert caplog.text.count("no gradient reaches 1 trainable tensors: idle") == 1
    tuned.parameters = {"idle": tuned.parameters["idle"]}
    with pytest.raises(ModelError, match="no gradient reaches anything"):
        run(tmp_path / "none", settings(steps=2), tuned=tuned)


def test_clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before():
    """Kills: clipping each tensor alone; reporting the clipped norm."""
    parameters = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2, 2))}
    precision = Precision(parameters, PLAIN)
    seen = {}

    class Watching(AdamW):
        def step(self, lr):
            seen.update({name: master.grad.clone() for name, master in self.masters.items()})

    for name, gradient in (("a", torch.full((3,), 2.0)), ("b", torch.full((2, 2), 1.0))):
        parameters[name].grad = gradient
    norm = update(Watching(parameters), precision, Single(), lr=0.1, clip=0.5)
    assert norm == pytest.approx(4.0)
    assert torch.cat([value.flatten() for value in seen.values()]).norm() == pytest.approx(0.5, rel=1e-6)


def test_no_clipping_at_zero_or_below_the_limit(tmp_path):
    """Kills: always normalising."""
    ends = []
    for clip in (0.0, 1e6):
        tuned = TinyTuned()
        run(tmp_path / str(clip), settings(steps=3, clip=clip), tuned=tuned)
        ends.append(torch.cat([value.detach().flatten() for value in tuned.parameters.values()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_for_gradients_is_taken_before_passes_that_are_summed(dtype, monkeypatch):
    """Kills: room for a single pass, which needs it only when its activations are gone; sums that lie elsewhere."""
    rooms = []
    plain = Precision.make_room

    def watched(precision):
        plain(precision)
        rooms.append({master: room.data_ptr() for master, room in precision._rooms.items()})

    monkeypatch.setattr(Precision, "make_room", watched)
    for cut in (8, 2):
        tuned = TinyTuned(dtype=dtype)
        precision = Precision(tuned.parameters, PLAIN)
        batches = [collate(rows(8)[at : at + cut]) for at in range(0, 8, cut)]
        for turn in range(2):
            accumulate(SFT(), tuned.policy, batches, precision, Single())
            assert len(rooms) == (0 if cut == 8 else turn + 1)
            if rooms:
                assert rooms[-1] == {master: master.grad.data_ptr() for master in precision.masters.values()}
            precision.clear()


def test_the_graph_of_one_pass_is_gone_when_the_next_begins():
    """Its nodes would lie between the tensors of the next. Kills: a loss that is held until there is another."""
    tuned, graphs = TinyTuned(), []

    class Watched(SFT):
        def loss(self, policy, batch):
            assert all(graph() is None for graph in graphs)
            found = super().loss(policy, batch)
            graphs.append(ref(found.total))
            return found

    precision = Precision(tuned.parameters, PLAIN)
    accumulate(Watched(), tuned.policy, [collate([row]) for row in rows(3)], precision, Single())
    assert len(graphs) == 3
