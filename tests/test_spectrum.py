"""How low the rank of a change is: exact for changes whose spectrum is known."""

from __future__ import annotations

import torch
from tiny_models import disturb, tiny_loaded

from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.evaluate.spectrum import (
    changes_of_adapter,
    changes_of_model,
    effective_rank,
    singular_values,
    spectrum,
)


def with_values(values: list[float], rows: int = 12, columns: int = 7) -> torch.Tensor:
    """A matrix that has these singular values."""
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64)).Q
    middle = torch.zeros(rows, columns, dtype=torch.float64)
    middle.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return left @ middle @ right


def test_singular_values_are_those_of_the_matrix_whichever_side_is_longer() -> None:
    """Kills: eigenvalues without the root; the larger Gram matrix, which adds zeros."""
    matrix = with_values([5.0, 2.0, 0.5])
    for one in (matrix, matrix.T):
        found = singular_values(one)
        assert len(found) == 7
        assert torch.allclose(found[:3], torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64))
        assert float(found[3:].max()) < 1e-6


def test_the_effective_rank_counts_energy_not_size() -> None:
    """3 and 1: nine tenths of the energy are in the first. Kills: sums of values instead of squares; one too many."""
    assert effective_rank(torch.tensor([3.0, 1.0])) == 1
    assert effective_rank(torch.tensor([3.0, 1.01])) == 2
    assert effective_rank(torch.ones(10)) == 9


def test_a_spectrum_is_over_all_changed_matrices_and_leaves_out_those_that_did_not() -> None:
    """Kills: a zero change that counts as rank one; a mean over matrices of different sides that is cut short."""
    found = spectrum([with_values([1.0]), with_values([1.0] * 7), with_values([2.0, 2.0]), torch.zeros(4, 4)])
    assert found is not None
    assert (found.matrices, found.median_rank, found.largest_rank, found.full_rank) == (3, 2, 7, 7)
    assert abs(found.shares[0] - (1 + 1 / 7 + 1 / 2) / 3) < 1e-5
    assert found.shares[-1] == 1.0
    assert len(found.shares) == 7
    assert spectrum([torch.zeros(3, 3)]) is None


def test_lora_changes_have_at_most_its_rank() -> None:
    loaded = tiny_loaded("gpt2")
    adapter = LoRA(rank=3, targets=("q", "v")).attach(loaded)
    assert spectrum(changes_of_adapter(adapter)) is None  # step 0
    disturb(adapter)
    found = spectrum(changes_of_adapter(adapter))
    assert found is not None
    assert (found.matrices, found.full_rank) == (4, 32)
    assert found.largest_rank <= 3


def test_trained_weights_are_compared_with_the_base_in_place_or_as_copies() -> None:
    """Kills: the tuned weight itself taken for its change."""
    loaded, base = tiny_loaded("llama"), tiny_loaded("llama")
    adapter = TopLayers(layers=1).attach(loaded)
    assert spectrum(changes_of_adapter(adapter)) is None
    with torch.no_grad():
        adapter.trained["model.layers.1.mlp.up_proj.weight"] += torch.ones(48, 1) @ torch.ones(1, 32)
    found = spectrum(changes_of_adapter(adapter))
    assert found is not None
    assert (found.matrices, found.largest_rank) == (1, 1)
    with torch.no_grad():
        base.model.model.layers[0].mlp.up_proj.weight += 1
    found = spectrum(changes_of_model(base.model, tiny_loaded("llama").model))
    assert found is not None
    assert (found.matrices, found.largest_rank) == (1, 1)
