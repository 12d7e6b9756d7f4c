"""Laws of every method in the table, over families, precisions and ties. The laws themselves are `conformance.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CASES, IN_PLACE, MODELS, REFUSED, built, check_method, check_rows, model_of, save_all
from safetensors.torch import load_file, save_file
from tiny_models import answers, bits, disturb, tiny_loaded

from tunesmith.adapt.methods import METHODS
from tunesmith.core.errors import ConfigError
from tunesmith.models.route import Route

OTHERS = ["gemma", "gpt_neox", "phi3", "opt", "mpnet"]
DTYPES = [torch.float32, torch.bfloat16]
EVERY = [(model, dtype) for model in MODELS for dtype in DTYPES] + [(family, torch.float32) for family in OTHERS]
# the fast tests take each method on a decoder, and in turn on another kind of model or in bfloat16
FIRST = ("llama tied", torch.float32)
IN_TURN = [("bert", torch.float32), ("t5 tied", torch.float32), ("gpt2 untied", torch.bfloat16)]


def cells() -> list[Any]:
    """Every method on every model in every precision, as parameters of a test."""
    return [
        pytest.param(
            case, *cell, id=f"{cell[0]}-{str(cell[1])[6:]}-{case}",
            marks=() if cell in (FIRST, IN_TURN[place % len(IN_TURN)]) else pytest.mark.slow,
        )
        for cell in EVERY for place, case in enumerate(CASES)
    ]  # fmt: skip


def family_of(model: str) -> str:
    return MODELS.get(model, (model,))[0]


@pytest.mark.parametrize(("case", "model", "dtype"), cells())
def test_a_method_keeps_the_laws(case: str, model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Kills: a parameter that is declared and never moves, moved and not declared, or trained and not saved."""
    refused = REFUSED.get((case, family_of(model)))
    if refused is None:
        check_method(built(case), model, dtype, tmp_path)
        return
    loaded = model_of(model, tmp_path)
    before = bits(loaded.model)
    with pytest.raises(ConfigError, match=refused):
        built(case).attach(loaded)
    assert bits(loaded.model) == before


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind not in IN_PLACE])
@pytest.mark.parametrize(
    "model",
    ["llama tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2 untied", "bert", "t5 tied"))],
)
def test_rows_of_a_batch_are_what_each_is_alone(case: str, model: str, tmp_path: Path) -> None:
    """Kills: an insert that looks at its neighbours' rows, or at what its last pass has left behind."""
    if (case, family_of(model)) not in REFUSED:
        check_rows(built(case), model, tmp_path)


@pytest.mark.slow
def test_a_fresh_process_says_the_same_bits(tmp_path: Path) -> None:
    """Kills: a start or a random matrix that depends on what the process did before."""
    models = ["llama tied", "gpt2 tied", "bert", "t5 tied"]
    for model in models:
        cases = [
            name
            for name, (kind, _) in CASES.items()
            if kind not in IN_PLACE and (name, family_of(model)) not in REFUSED
        ]
        told = save_all(iter(cases), model, tmp_path / model)
        save_file(
            {name.replace(" ", "-"): value for name, value in told.items()}, tmp_path / model / "told.safetensors"
        )
    tests = Path(__file__).parent
    program = (
        f"import sys; sys.path[:0] = [{str(tests.parent)!r}, {str(tests)!r}]\n"
        "from pathlib import Path\nfrom safetensors.torch import save_file\nfrom conformance import answer_all\n"
        f"for model in {models!r}:\n"
        f"    folder = Path({str(tmp_path)!r}) / model\n"
        "    save_file(answer_all(model, folder), folder / 'again.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for model in models:
        told, again = (load_file(tmp_path / model / f"{name}.safetensors") for name in ("told", "again"))
        assert told.keys() == again.keys()
        assert [name for name, value in told.items() if not torch.equal(value, again[name])] == []


@pytest.mark.slow
def test_a_thousand_switches_between_eight_methods_leave_the_base_bit_identical() -> None:
    """In bfloat16, each answering as when it came. Kills: copies of others' inserts, leftovers of a pass."""
    loaded = tiny_loaded("gemma", dtype=torch.bfloat16)
    before, said = bits(loaded.model), {(): answers(loaded)}
    cases = ("lora", "adapter", "adapter parallel", "bitfit", "ia3", "fpt", "prompt", "top_layers")
    adapters = []
    for seed, case in enumerate(cases):
        adapters.append(adapter := built(case).attach(loaded, case.replace(" ", "-"), seed))
        disturb(adapter, seed, 0.3)
        with adapter.route.enter():
            said[adapter.route.adapters] = answers(loaded)
    assert len({value.float().sum().item() for value in said.values()}) == 9
    routes = list(said)
    for turn in range(1000):
        route = routes[turn * 5 % 9]
        with Route(route).enter():
            assert torch.equal(answers(loaded), said[route])
    for adapter in adapters:
        adapter.detach()
    assert bits(loaded.model) == before


@pytest.mark.parametrize("kind", METHODS.names())
def test_a_method_is_a_section_with_defaults(kind: str) -> None:
    method = METHODS.load(kind)()
    assert method.kind == kind
    assert METHODS.summary(kind)
    assert type(method).model_validate(method.model_dump(mode="json")) == method


@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_counted_without_weights(case: str) -> None:
    """Kills: a shape that is read from data, or a fresh value that needs some."""
    loaded = tiny_loaded("llama")
    with torch.device("meta"):
        bare = replace(loaded, model=type(loaded.model)(loaded.config))
    wanted, found = (built(case).attach(one).parameters for one in (loaded, bare))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}
    assert all(value.is_meta for value in found.values())
