"""Role tables and targets: every family's roles mean exactly the right modules, with and without torch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from tiny_models import DECODERS, ENCODERS, FAMILY_NAMES, UNKNOWN, roles_of, tiny_config, tiny_loaded

from tunesmith.core.errors import ConfigError
from tunesmith.models.families import FAMILIES, GROUPS, family_of
from tunesmith.models.inserts import gathered, spread
from tunesmith.models.ports import port_kind
from tunesmith.models.targets import Rows, block_paths, check_targets, match, norm_paths, placed


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_map_of_a_block_has_a_role(family: str) -> None:
    """Kills: an entry of the table removed or misspelt."""
    loaded = tiny_loaded(family)
    maps = {path: module for path, module in loaded.model.named_modules() if port_kind(module) not in (None, "norm")}
    table = placed(loaded.family, maps, loaded.model)
    blocks = tuple(f"{path}." for path in block_paths(loaded.model, loaded.family))
    beside = ("pos_key_proj", "pos_query_proj", "relative_attention_bias")  # deberta's and t5's own
    inner = [path for path in maps if path.startswith(blocks) and not path.endswith(beside)]
    assert inner
    assert [path for path in inner if path not in table] == []


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_role_matches_once_a_block(family: str) -> None:
    """Kills: `output.dense` taken as a suffix of the path rather than as a name within the block."""
    loaded = tiny_loaded(family)
    blocks = block_paths(loaded.model, loaded.family)
    assert len(blocks) == (4 if family == "t5" else 2)
    for role in roles_of(family):
        found = match(loaded.model, loaded.family, [role])
        if role in GROUPS or family == "t5":
            assert found
            continue
        wanted = {"embed": 1, "head": 1}.get(role, len(blocks))
        assert len(found) == wanted, (role, found)
        assert {target.role for target in found} == {role}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_norms_are_found_and_are_norms(family: str) -> None:
    loaded = tiny_loaded(family)
    found = norm_paths(loaded.model, loaded.family)
    wanted = [path for path, module in loaded.model.named_modules() if "Norm" in type(module).__name__]
    assert found == wanted
    assert [(target.path, target.role) for target in match(loaded.model, loaded.family, ["norm"])] == [
        (path, "norm") for path in wanted
    ]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_rows_of_a_fused_map_are_what_the_model_reads(family: str) -> None:
    """Zeroing the rows of v leaves attention nothing to add; those of q and k leave it uniform.

    Kills: rows of gpt-neox taken as thirds instead of head by head; query and value exchanged.
    """
    loaded = tiny_loaded(family)
    seen: dict[str, torch.Tensor] = {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["mixed"] = inputs[0]

    out = match(loaded.model, loaded.family, ["o"])[0]
    loaded.model.get_submodule(out.path).register_forward_pre_hook(note)
    (target, *_) = match(loaded.model, loaded.family, ["v"])
    assert target.rows is not None
    module = loaded.model.get_submodule(target.path)
    keep = 1 - spread(torch.ones(target.rows.count), target.rows)
    with torch.no_grad():
        module.weight *= keep if port_kind(module) == "conv1d" else keep[:, None]
        if module.bias is not None:
            module.bias *= keep
        loaded.model(input_ids=torch.arange(3, 12)[None])
    assert not seen["mixed"].any()
    parts = match(loaded.model, loaded.family, ["q", "k", "v"])[:3]
    covered = sum(spread(torch.ones(part.rows.count), part.rows) for part in parts if part.rows)
    assert torch.equal(covered, torch.ones_like(covered))


def test_spread_and_gathered_are_inverse() -> None:
    rows = Rows(groups=3, period=6, start=2, stop=4)
    values = torch.randn(5, rows.count)
    assert torch.equal(gathered(spread(values, rows), rows), values)
    assert spread(values, rows).shape == (5, 18)


def test_a_target_that_matches_nothing_says_what_would() -> None:
    loaded = tiny_loaded("llama")
    with pytest.raises(ConfigError) as raised:
        match(loaded.model, loaded.family, ["query"])
    assert str(raised.value) == (
        "method.targets: 'query' matches nothing in llama; roles are q k v o gate up down attn mlp embed head norm\n"
        "hint: did you mean q?"
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_check_without_torch_agrees_with_the_match(family: str) -> None:
    """Kills: the check refusing a role or module name that the model has."""
    loaded = tiny_loaded(family)
    config = tiny_config(family).to_dict()
    for role in roles_of(family):
        check_targets(config, [role])
        for target in match(loaded.model, loaded.family, [role]):
            check_targets(config, [target.path, target.path.rpartition(".")[2]])
    with pytest.raises(ConfigError, match="matches nothing"):
        check_targets(config, ["query_of_something"])


def test_validating_targets_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from tunesmith.models.targets import check_targets\n"
        "from tunesmith.adapt.lora import LoRA\nfrom tunesmith.adapt.methods import METHODS\n"
        "[METHODS.load(name)().check({'model_type': 'gpt2', 'n_layer': 4}) for name in METHODS.names()]\n"
        "check_targets({'model_type': 'llama'}, ['q', 'mlp', 'q_proj', '.*down_proj'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_targets_may_be_suffixes_and_regexes() -> None:
    loaded = tiny_loaded("llama")

    def paths(*targets: str) -> list[str]:
        return [target.path for target in match(loaded.model, loaded.family, targets)]

    assert paths("q_proj") == paths("q")
    assert paths("layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    assert paths(r".*layers\.0\.mlp\.(up|down)_proj") == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert paths("q", "q_proj", "attn") == paths("attn")
    assert len(paths("attn", "mlp")) == 14


def test_a_runaway_regex_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: matching in this process, which nothing can interrupt."""
    monkeypatch.setattr("tunesmith.models.patterns.LIMIT_SECONDS", 0.5)
    loaded = tiny_loaded("llama")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="takes more than"):
        match(loaded.model, loaded.family, ["(([a-z_.0-9])+)+!"])
    assert time.monotonic() - began < 20
    with pytest.raises(ConfigError, match="is not a regex"):
        check_targets({"model_type": "llama"}, ["(unclosed"])
    with pytest.raises(ConfigError, match="characters"):
        check_targets({"model_type": "llama"}, ["(a|b)" * 500])


def test_a_fused_map_named_as_a_whole_includes_its_roles() -> None:
    loaded = tiny_loaded("gpt2")
    found = match(loaded.model, loaded.family, ["q", "c_attn"])
    assert [(target.role, target.rows) for target in found] == [("c_attn", None)] * 2


def test_an_unknown_family_works_by_module_names() -> None:
    (name,) = UNKNOWN
    loaded = tiny_loaded(name)
    assert not loaded.family.table
    assert len(block_paths(loaded.model, loaded.family)) == 2
    assert len(match(loaded.model, loaded.family, ["query_key_value"])) == 2
    assert len(match(loaded.model, loaded.family, ["up", "down"])) == 4
    assert family_of({"model_type": name}).name == name


def test_every_named_family_has_a_table() -> None:
    assert set(DECODERS) | set(ENCODERS) | {"t5"} <= set(FAMILIES)
