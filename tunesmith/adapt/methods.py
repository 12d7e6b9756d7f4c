"""The table of methods. Adding one is one file and one line here."""

from tunesmith.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "lora": ("tunesmith.adapt.lora:LoRA", "low-rank updates beside chosen linear maps; the base stays as it is"),
        "full": ("tunesmith.adapt.full:Full", "every parameter of the model"),
        "top_layers": ("tunesmith.adapt.top_layers:TopLayers", "the last blocks, everything below frozen"),
    },
)
