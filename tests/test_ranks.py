"""A rank for each role: counted, scaled, saved for peft and back, also where roles share a map."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from tiny_models import TinyLoaded, answers, disturb, tiny_loaded, tiny_model

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.store import load_adapter, save_adapter
from tunesmith.config import build_config
from tunesmith.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_every_role_has_its_rank_and_the_scale_of_it(family: str) -> None:
    """Its own before its group's before the common one. Kills: the common rank in the scale."""
    loaded = tiny_loaded(family)
    method = LoRA(rank=4, alpha=6, targets=("attn", "down"), ranks={"v": 3, "attn": 2})
    wanted = {"q": 2, "k": 2, "v": 3, "o": 2, "down": 4}
    for _, role, insert in method.attach(loaded).inserts():
        assert (insert["A"].shape[0], insert["B"].shape[1]) == (wanted[role], wanted[role])
        assert insert.scale == 6 / wanted[role]
    assert LoRA(rank=4, ranks={"q": 9}).scaled(9) == 2.0
    assert LoRA(rank=4, alpha=6, rslora=True).scaled(9) == 2.0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_peft_loads_ranks_that_differ(family: str, alpha: float | None, rslora: bool, tmp_path: Path) -> None:
    """Roles of one map have scales of their own there. Kills: the scale of the first used for all; B rounded twice."""
    loaded = tiny_loaded(family, tmp_path / "base")
    loaded.config.save_pretrained(tmp_path / "base")
    method = LoRA(rank=4, alpha=alpha, rslora=rslora, targets=("q", "v", "down"), ranks={"q": 3, "down": 1})
    adapter = method.attach(loaded)
    disturb(adapter)
    said = answers(loaded)
    saved = save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), saved).eval()
    there = answers(TinyLoaded(theirs, loaded.folder, "", loaded.family, "", loaded.config))
    torch.testing.assert_close(there, said, rtol=0, atol=1e-5)
    again = tiny_loaded(family)
    assert load_adapter(again, saved).method == method
    assert torch.equal(answers(again), said)
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert len(settings["rank_pattern"]) <= 3
    (saved / "adapter_config.json").write_text(json.dumps(settings | {"tunesmith_method": None}))
    as_theirs = tiny_loaded(family)
    if family == "llama":
        load_adapter(as_theirs, saved)
        torch.testing.assert_close(answers(as_theirs), said, rtol=0, atol=1e-5)


def test_ranks_that_act_on_nothing_or_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="'down' is none of the targets"):
        LoRA(ranks={"down": 2})
    with pytest.raises(ValidationError):
        LoRA(ranks={"q": 0})
    with pytest.raises(ConfigError, match=r"method\.ranks: 'k' is none of the targets"):
        LoRA(targets=("q_proj",), ranks={"k": 2}).attach(tiny_loaded("llama"))
    with pytest.raises(ConfigError, match=r"method\.ranks: 17 is more than 16"):
        LoRA(ranks={"v": 17}).attach(tiny_loaded("llama"))
    wrong = {"model": "m", "data": {"train": "x"}, "train": {"steps": 1}, "out": "o"}
    with pytest.raises(ConfigError) as raised:
        build_config(wrong | {"method": {"kind": "lora", "ranks": {"up": 2}}})
    assert "'up' is none of the targets" in str(raised.value)
