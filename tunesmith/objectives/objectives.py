"""The table of objectives: one line each, loaded when used."""

from __future__ import annotations

from tunesmith.core.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "sft": ("tunesmith.objectives.sft:SFT", "supervised: learn to write the completion, token by token"),
        "predict": ("tunesmith.objectives.predict:Predict", "a head that classifies, gives a number, or labels words"),
        "grpo": ("tunesmith.objectives.grpo:GRPO", "its own answers to a prompt, rewarded and compared"),
        "ppo": ("tunesmith.objectives.ppo:PPO", "its own answers, rewarded, beside what a value head expected"),
    },
)
