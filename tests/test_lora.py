"""LoRA: its arithmetic against the formula, its start, its limits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import IDS, answers, disturb, tiny_loaded

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.inserts import gathered
from tunesmith.models.ports import ports

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_port_computes_the_formula(family: str, rslora: bool) -> None:
    """y + s B A x in float64 at the rows of each role. Kills: a wrong scale, a transposed factor, wrong rows."""
    loaded = tiny_loaded(family)
    method = LoRA(rank=4, alpha=6.0, rslora=rslora, targets=("q", "v", "down"))
    disturb(method.attach(loaded))
    scale = 6.0 / (4**0.5 if rslora else 4)
    for port in ports(loaded.model):
        x = torch.randn(3, port.base.weight.shape[1 if type(port.base) is torch.nn.Linear else 0])
        with torch.no_grad():
            change = (port(x) - port.base(x)).double()
        for insert in port.inserts["default"].values():
            a, b = (insert[name].detach().double().numpy() for name in "AB")
            part = change if insert.rows is None else gathered(change, insert.rows)
            np.testing.assert_allclose(part.numpy(), scale * x.double().numpy() @ a.T @ b.T, rtol=0, atol=2e-6)


def test_alpha_is_twice_the_rank_unless_told() -> None:
    assert LoRA(rank=4).scale == 2.0
    assert LoRA(rank=4, alpha=4).scale == 1.0
    assert LoRA(rank=16, alpha=4, rslora=True).scale == 1.0


def start(adapter: Adapter) -> str:
    """A digest of all initial values."""
    raw = b"".join(value.detach().numpy().tobytes() for value in adapter.parameters.values())
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.slow
def test_the_start_depends_on_the_seed_and_on_nothing_else() -> None:
    """Not on numbers drawn before, not on the other targets. Kills: drawing from torch's own generator."""
    torch.manual_seed(1)
    first = LoRA(rank=2).attach(tiny_loaded("llama"), seed=5)
    torch.manual_seed(2)
    torch.randn(100)
    again = LoRA(rank=2).attach(tiny_loaded("llama"), seed=5)
    other = LoRA(rank=2).attach(tiny_loaded("llama"), seed=6)
    more = LoRA(rank=2, targets=("attn", "mlp")).attach(tiny_loaded("llama"), seed=5)
    assert start(first) == start(again) != start(other)
    assert all(torch.equal(more.parameters[name], value) for name, value in first.parameters.items())
    values = [value for name, value in first.parameters.items() if name.endswith(".A")]
    assert not torch.equal(values[0], values[1])
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch; torch.randn(7)\n"
        "from test_lora import *\n"
        "print(start(LoRA(rank=2).attach(tiny_loaded('llama'), seed=5)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(start(first))


def test_the_start_of_the_narrow_factor_is_that_of_a_linear_map() -> None:
    adapter = LoRA(rank=16, targets=("q",)).attach(tiny_loaded("llama"))
    values = torch.cat([value.detach().flatten() for name, value in adapter.parameters.items() if name.endswith(".A")])
    bound = 32**-0.5
    assert 0.95 * bound < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_rank_must_fit() -> None:
    """Kills: rank 0; a rank beyond the smaller side, which peft takes without a word."""
    with pytest.raises(ValidationError):
        LoRA(rank=0)
    with pytest.raises(ConfigError, match=r"method\.rank: 17 is more than 16, the smaller side of model\.layers\.0"):
        LoRA(rank=17).attach(tiny_loaded("llama"))
    loaded = tiny_loaded("gpt_neox")
    LoRA(rank=32, targets=("q",)).attach(loaded).detach()
    with pytest.raises(ConfigError, match="33 is more than 32"):
        LoRA(rank=33, targets=("q",)).attach(loaded)
    assert ports(loaded.model) == []


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"targets": []}, {"dropout": 1.0}, {"alpha": 0}, {"rank": 2.5}, {"ranks": 3}):
        with pytest.raises(ValidationError):
            LoRA(**wrong)
    with pytest.raises(ConfigError, match="norm is no linear map"):
        LoRA(targets=("norm",)).attach(tiny_loaded("llama"))
    with pytest.raises(AdapterError, match="no adapter name"):
        LoRA().attach(tiny_loaded("llama"), "a.b")


def test_dropout_acts_in_training_alone_and_follows_the_seed() -> None:
    loaded = tiny_loaded("llama")
    disturb(LoRA(rank=2, dropout=0.5).attach(loaded))
    still = answers(loaded)
    assert torch.equal(answers(loaded), still)
    loaded.model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answers(loaded))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], still)


def test_factors_stay_float32_beside_a_bfloat16_base() -> None:
    """Kills: factors in the base's dtype, which lose small steps."""
    loaded = tiny_loaded("llama", dtype=torch.bfloat16)
    adapter = LoRA(rank=2).attach(loaded)
    disturb(adapter)
    output = loaded.model(IDS).logits
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert {value.dtype for value in adapter.parameters.values()} == {torch.float32}
    assert {value.grad.dtype for value in adapter.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_an_embedding_with_an_insert_is_an_embedding_with_another_weight(family: str) -> None:
    """Also where the family scales its embedding. Kills: the scale left out of the delta."""
    loaded = tiny_loaded(family)
    adapter = LoRA(rank=2, targets=("embed",)).attach(loaded)
    ((port, _, insert),) = adapter.inserts()
    assert bool(insert["B"].any())
    assert not insert["A"].any()
    disturb(adapter)
    with torch.no_grad():
        said = port(IDS)
        twin = tiny_loaded(family).model.get_input_embeddings()
        twin.weight += insert.method.weight(insert).T
        torch.testing.assert_close(said, twin(IDS), rtol=0, atol=2e-6)
