"""What peft puts before a text: the same answers, gradients and files on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_cases import bridged, fresh, trained_by
from safetensors.torch import load_file
from tiny_models import TinyLoaded, disturb, tiny_batch, tiny_loaded, tiny_model
from torch import Tensor

from tunesmith.adapt.peft_bridge import ENCODERS
from tunesmith.adapt.store import TENSORS, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError, ConfigError
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route

DOCUMENT = tiny_batch((9,))
# peft has no keys before an encoder's text, and tells it of no task
CASES = [(kind, family) for kind in ENCODERS for family in ("llama", "gpt2")] + [("P_TUNING", "bert")]
pytestmark = pytest.mark.filterwarnings("ignore")


def ours(loaded: TinyLoaded) -> Tensor:
    policy: Any = Policy(loaded, Route(("default",)))
    return policy.hidden(DOCUMENT) if loaded.family.kind == "encoder" else policy.logits(DOCUMENT, torch.arange(9))


def theirs(model: Any, kind: str) -> Tensor:
    """What peft's model says of the document's own tokens."""
    task = {"task_ids": torch.zeros(1, dtype=torch.int64)} if kind == "MULTITASK_PROMPT_TUNING" else {}
    output = model.eval()(input_ids=DOCUMENT.ids[None], **task)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found[0, -9:]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_an_encoder_is_that_of_peft(kind: str, family: str, tmp_path: Path) -> None:
    """Kills: values before keys; a frozen row that trains; CPT's own forward, which moves what it reads."""
    loaded = tiny_loaded(family, tmp_path)
    adapter = bridged(kind, family).attach(loaded, seed=3)
    disturb(adapter, size=0.3)
    adapter.after_step(1, 1)  # of CPT: what it may hold
    mine = ours(loaded)
    mine.pow(2).mean().backward()
    model = fresh(kind, family)
    encoder = adapter.inserts()[0][2].encoder
    model.prompt_encoder["default"].load_state_dict(encoder.state_dict())
    said = theirs(model, kind)
    said.pow(2).mean().backward()
    torch.testing.assert_close(mine, said, rtol=0, atol=1e-5)
    wanted = {name.removeprefix("prompt_encoder.default."): value for name, value in trained_by(model).items()}
    found = {name: value for name, value in encoder.named_parameters() if value.requires_grad}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].grad, value.grad, rtol=1e-4, atol=1e-6)
    assert list(map(id, adapter.parameters.values())) == list(map(id, dict(sorted(found.items())).values()))


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_files_go_both_ways(kind: str, family: str, tmp_path: Path) -> None:
    """Kills: an encoder that is run again over the vectors that it has made."""
    loaded = tiny_loaded(family, tmp_path)
    disturb(adapter := bridged(kind, family).attach(loaded), size=0.3)
    path = save_adapter(adapter, tmp_path / "ours")
    with torch.no_grad():
        said = ours(loaded)
        back = peft.PeftModel.from_pretrained(tiny_model(family), path)
        torch.testing.assert_close(theirs(back, kind), said, rtol=0, atol=1e-5)
        back.save_pretrained(tmp_path / "theirs")
        for source in ("ours", "theirs"):
            again = tiny_loaded(family, tmp_path)
            other = load_adapter(again, tmp_path / source)
            assert torch.equal(ours(again), said)
            save_adapter(other, tmp_path / "twice")
            old, new = (load_file(tmp_path / name / TENSORS) for name in (source, "twice"))
            assert old.keys() == new.keys()
            assert all(torch.equal(new[name], value) for name, value in old.items())


def test_what_is_read_from_a_file_trains_as_vectors(tmp_path: Path) -> None:
    """Kills: an encoder that is drawn anew behind vectors that are done."""
    for kind in ("P_TUNING", "CPT"):
        path = save_adapter(bridged(kind).attach(tiny_loaded("llama", tmp_path)), tmp_path / kind)
        adapter = load_adapter(tiny_loaded("llama", tmp_path), path)
        assert [value.shape for value in adapter.parameters.values()] == [(3, 32)]


def test_cpt_holds_no_more_than_it_may() -> None:
    """Kills: an update that is never shortened (at width 32 the length is 0.1 x sqrt(32 / 2048))."""
    adapter = bridged("CPT").attach(tiny_loaded("llama"))
    disturb(adapter, size=3.0)
    adapter.after_step(1, 9)
    [moved] = adapter.parameters.values()
    torch.testing.assert_close(moved.norm(dim=1), torch.full((3,), 0.1 * (32 / 2048) ** 0.5))


def test_positions_are_counted_and_what_does_not_fit_is_told(tmp_path: Path) -> None:
    """Kills: rows that are as long as the model's table, with vectors before them."""
    assert [bridged(kind).positions for kind in ENCODERS] == [3, 3, 3, 3]
    assert bridged("LOHA").positions == 0
    for kind, family in (("CARTRIDGE", "mpnet"), ("CPT", "bert"), ("CARTRIDGE", "t5")):
        with pytest.raises(ConfigError, match=f"{family}|CAUSAL_LM"):
            bridged(kind, family).attach(tiny_loaded(family))
    path = save_adapter(bridged("CARTRIDGE").attach(tiny_loaded("llama", tmp_path)), tmp_path / "ours")
    loaded = tiny_loaded("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(AdapterError, match="prompt_embeddings is"):
        load_adapter(loaded, path)
    assert not any("inserts" in name for name, _ in loaded.model.named_modules())
