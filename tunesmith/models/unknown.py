"""Families without a table: blocks and roles guessed from the modules of the model.

Such a family runs padded, through its own forward. Targets may always be module names; the guess lets the usual roles
work where a family uses the usual names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.models.families import Family, Kind

if TYPE_CHECKING:
    from torch import nn

# what an unknown family's maps are probably for, by the last part of their names
_GUESSES = {
    "q": ("q_proj", "query", "q_lin", "wq", "query_proj", "q"),
    "k": ("k_proj", "key", "k_lin", "wk", "key_proj", "k"),
    "v": ("v_proj", "value", "v_lin", "wv", "value_proj", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "o"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w3"),
    "down": ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2"),
}


def guess(name: str, kind: Kind, model: nn.Module) -> Family:
    """A table from module names: blocks are the longest list of like modules."""
    lists = [(path, list(module.children())) for path, module in model.named_modules() if _is_stack(module)]
    blocks = tuple(path for path, children in lists if len(children) == max(len(other) for _, other in lists))[:1]
    inner = {path[len(blocks[0]) :].split(".", 2)[2] for path, _ in model.named_modules() if _within(path, blocks)}
    inside = {}
    for role, leaves in _GUESSES.items():
        names = tuple(sorted(path for path in inner if path.rpartition(".")[2] in leaves))
        if names:
            inside[role] = names
    norms = [path for path, module in model.named_modules() if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))]
    within = tuple(sorted({path[len(blocks[0]) :].split(".", 2)[2] for path in norms if _within(path, blocks)}))
    outside = tuple(path for path in norms if not _within(path, blocks))
    return Family(
        name,
        kind,
        blocks,
        inside | ({"norm": within} if within else {}),
        _ends(model) | ({"norm": outside} if outside else {}),
    )


def _ends(model: nn.Module) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for role, getter in (("embed", "get_input_embeddings"), ("head", "get_output_embeddings")):
        module = getattr(model, getter, lambda: None)()
        if id(module) in paths:
            found[role] = (paths[id(module)],)
    return found


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    alike = len({type(child) for child in children}) == 1
    return type(module).__name__ == "ModuleList" and alike and any(True for _ in module.parameters())


def _within(path: str, blocks: Sequence[str]) -> bool:
    return bool(blocks) and path.startswith(blocks[0] + ".") and path[len(blocks[0]) :].count(".") >= 2
