"""The table of methods. Adding one is one file and one line here."""

from tunesmith.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "lora": ("tunesmith.adapt.lora:LoRA", "low-rank updates beside chosen linear maps; the base stays as it is"),
        "adapter": ("tunesmith.adapt.bottleneck:Bottleneck", "narrow pairs of maps inside the blocks"),
        "bitfit": ("tunesmith.adapt.bitfit:BitFit", "biases alone"),
        "ia3": ("tunesmith.adapt.ia3:IA3", "factors for keys, values and inner numbers of the MLP"),
        "fpt": ("tunesmith.adapt.fpt:FPT", "norms and input and output layers; attention and MLP frozen"),
        "linear_probe": ("tunesmith.adapt.linear_probe:LinearProbe", "the output layer alone"),
        "lp_ft": ("tunesmith.adapt.lp_ft:LPFT", "the output layer first, then everything"),
        "peft": ("tunesmith.adapt.peft_bridge:Peft", "a tuner of the peft library (extra: peft)"),
        "subspace": ("tunesmith.adapt.subspace:Subspace", "few numbers that move all weights of the blocks"),
        "prompt": ("tunesmith.adapt.prompt:Prompt", "trained vectors before the input"),
        "prefix_layer": (
            "tunesmith.adapt.prefix_layer:PrefixLayer",
            "trained keys and values before those of the input",
        ),
        "prefix_embed": ("tunesmith.adapt.prefix_embed:PrefixEmbed", "trained vectors before the input and within it"),
        "full": ("tunesmith.adapt.full:Full", "every parameter of the model"),
        "top_layers": ("tunesmith.adapt.top_layers:TopLayers", "the last blocks, everything below frozen"),
    },
)
