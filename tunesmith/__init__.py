"""tunesmith: plan, adapt, judge and ship foundation models after pretraining.

Everything public is here and is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "BitFit": "tunesmith.adapt.bitfit",
    "Bottleneck": "tunesmith.adapt.bottleneck",
    "Config": "tunesmith.config",
    "FPT": "tunesmith.adapt.fpt",
    "Full": "tunesmith.adapt.full",
    "IA3": "tunesmith.adapt.ia3",
    "LPFT": "tunesmith.adapt.lp_ft",
    "LinearProbe": "tunesmith.adapt.linear_probe",
    "LoRA": "tunesmith.adapt.lora",
    "Peft": "tunesmith.adapt.peft_bridge",
    "PrefixEmbed": "tunesmith.adapt.prefix_embed",
    "PrefixLayer": "tunesmith.adapt.prefix_layer",
    "Prompt": "tunesmith.adapt.prompt",
    "Subspace": "tunesmith.adapt.subspace",
    "TopLayers": "tunesmith.adapt.top_layers",
    "TunesmithError": "tunesmith.core.errors",
    "combine": "tunesmith.adapt.combine",
    "generate": "tunesmith.run.api",
    "load": "tunesmith.run.api",
    "tune": "tunesmith.run.api",
}

__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
