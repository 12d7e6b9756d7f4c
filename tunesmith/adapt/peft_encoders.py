"""What the peft library puts before a text: vectors at the embedding, or keys and values in every block.

The one idea: peft's encoder makes them, whole, whenever they are asked for; soft tokens (`models/soft.py`) and keys
(`models/prefixes.py`) are where they go. As in peft, a file has what P_TUNING and CPT have made and not the encoder
that made it: what is loaded from there trains as plain vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.utils import PeftType
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn

from tunesmith.adapt.peft_config import as_config_error, as_json, made, method_of, seed_of, stored
from tunesmith.adapt.vectors import embedding_place
from tunesmith.core.errors import AdapterError
from tunesmith.core.rng import seed_for
from tunesmith.models.copies import as_base, swap_of
from tunesmith.models.inserts import Insert, Keys, SoftTokens
from tunesmith.models.ports import Port

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.adapt.method import Method
    from tunesmith.adapt.peft_bridge import Peft
    from tunesmith.models.inserts import Acts
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target

_TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
_OF_THE_MODEL = ("num_layers", "num_attention_heads", "token_dim")
NAME = "prompt_embeddings"


class Encoded(SoftTokens):
    """Soft tokens that an encoder makes.

    Attributes:
        encoder: peft's.
        plain: its table is the vectors themselves, as it is read from a file.
    """

    def __init__(self, method: Acts, encoder: Any, count: int, plain: bool) -> None:
        Insert.__init__(self, method, {}, None, 1.0)
        self.before, self.inside = count, 0
        self.encoder, self.plain = encoder, plain

    def __getitem__(self, name: str) -> Any:
        assert name == "vectors"
        return self.made()

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains."""
        return _asking(self)

    def made(self) -> Tensor:
        """The vectors: [count, width]."""
        encoder = self.encoder
        if self.plain:
            vectors: Tensor = encoder.embedding.weight
        elif hasattr(encoder, "delta_embedding"):  # CPT; its own forward moves what trains (see `project`)
            vectors = encoder.embedding.weight + encoder.delta_embedding.weight
        else:
            device = encoder.embedding.weight.device
            places = torch.arange(self.before, device=device)[None]
            task = [torch.zeros(1, dtype=torch.int64, device=device)] if hasattr(encoder, "prefix_task_cols") else []
            vectors = encoder(places, *task)[0]
        return vectors


class Cartridge(Keys):
    """Keys or values of one block, cut out of peft's table of all.

    Attributes:
        encoder: has the table: [length, blocks x 2 x width], keys before values in each block.
        part: this one's number in a row of the table.
    """

    def __init__(self, method: Acts, encoder: Any, length: int, part: int, width: int) -> None:
        super().__init__(method, {}, length)
        self.encoder, self.part, self.width = encoder, part, width

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, at the first of all."""
        return _asking(self) if self.part == 0 else {}

    def states(self) -> Tensor:
        """The keys or values: [length, width]."""
        table: Tensor = self.encoder.weight
        return table[:, self.part * self.width : (self.part + 1) * self.width]


def attach(method: Peft, loaded: Loaded, name: str, seed: int) -> Adapter:
    """As `Peft.attach`."""
    return _attach(method, method.config, loaded, name, seed)


def project(adapter: Adapter) -> None:
    """Shortens what CPT has learnt to the length that it may have (Blau et al. 2024, arXiv 2410.17222, section 4.2)."""
    insert = _first(adapter)
    if isinstance(insert, Encoded) and not insert.plain:
        with torch.no_grad():
            insert.encoder.delta_embedding.weight.copy_(insert.encoder.get_projection())


def written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `peft_bridge.written`."""
    insert = _first(adapter)
    settings = as_json(insert.encoder.settings)
    return settings | {"tunesmith_seed": adapter.seed}, {key: value.detach() for key, value in _tensors(insert).items()}


def read(
    loaded: Loaded, settings: Mapping[str, Any], tensors: dict[str, Tensor], name: str, where: str, own: Method | None
) -> Adapter:
    """As `peft_bridge.read`."""
    from tunesmith.adapt.store import fits

    method, more = method_of(settings, own), settings.get("num_transformer_submodules")
    if more not in (None, 1):
        raise AdapterError("it has vectors for the decoder, too, which are not supported here", where=where)
    plain = method.type in ("P_TUNING", "CPT")
    config = {key: value for key, value in stored(settings).items() if key not in _OF_THE_MODEL}
    adapter = _attach(method, config, loaded, name, seed_of(settings, where), plain=plain)
    insert = _first(adapter)
    try:
        fits({key: tuple(value.shape) for key, value in _tensors(insert).items()}, tensors, where)
    except AdapterError:
        adapter.detach()
        raise
    with torch.no_grad():
        insert.encoder._load_adapter_state_dict(tensors)
    return adapter


def _attach(
    method: Peft, config: Mapping[str, Any], loaded: Loaded, name: str, seed: int, plain: bool = False
) -> Adapter:
    from tunesmith.adapt.adapter import Adapter

    settings = made(
        method.type, config, loaded,
        task_type=_TASKS[loaded.family.kind], num_transformer_submodules=1, inference_mode=plain,
    )  # fmt: skip
    keys = method.type == "CARTRIDGE"
    places = _key_places(loaded) if keys else [embedding_place(loaded, method.type)]
    encoder = _encoder(method.type, settings, loaded, places[0], seed)
    count = settings.num_virtual_tokens
    adapter = Adapter(name, method, loaded)
    adapter.seed = seed
    for part, place in enumerate(places):
        insert = (
            Cartridge(method, encoder, count, part, settings.token_dim)
            if keys
            else Encoded(method, encoder, count, plain)
        )
        adapter.add(place, insert)
    return adapter.close()


def _key_places(loaded: Loaded) -> list[Target]:
    """The maps that make keys and values, block by block, as they lie in peft's table."""
    from tunesmith.adapt.prefix_layer import PrefixLayer

    method = PrefixLayer()
    method.check(loaded.config.to_dict())
    found = method.places(loaded)
    sides = [[place for place in found if place.role == side] for side in ("k", "v")]
    return [place for pair in zip(*sides, strict=True) for place in pair]


def _encoder(kind: str, settings: Any, loaded: Loaded, place: Target, seed: int) -> Any:
    """peft's encoder, float32 on the device of the model."""
    module: Any = loaded.model.get_submodule(place.path)
    bare: Any = module.base if isinstance(module, Port) else module
    with torch.random.fork_rng(), warnings.catch_warnings(), as_base(swap_of(bare)), as_config_error(kind):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_for(seed, "init", "peft"))
        settings = _prepare_prompt_learning_config(settings, loaded.config.to_dict())
        make: Any = peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)]
        # the last two begin as words; without weights any will do
        words = nn.Embedding(*bare.weight.shape) if bare.weight.is_meta else bare
        encoder = make(settings) if kind in ("CARTRIDGE", "P_TUNING") else make(settings, words)
    encoder.__dict__["settings"] = settings
    return encoder.float().to(bare.weight.device)


def _first(adapter: Adapter) -> Any:
    return next(insert for _, _, insert in adapter.inserts() if getattr(insert, "part", 0) == 0)


def _tensors(insert: Any) -> dict[str, Tensor]:
    """What peft stores, by its names."""
    if isinstance(insert, Cartridge):
        return {NAME: insert.encoder.weight}
    if hasattr(insert.encoder, "prefix_task_cols"):
        encoder = insert.encoder
        return {
            "prefix_task_cols": encoder.prefix_task_cols,
            "prefix_task_rows": encoder.prefix_task_rows,
            NAME: encoder.embedding.weight,
        }
    return {NAME: insert.made()}


def _asking(insert: Insert) -> dict[str, nn.Parameter]:
    return {path: value for path, value in insert.named_parameters() if value.requires_grad}
