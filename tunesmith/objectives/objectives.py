"""The table of objectives: one line each, loaded when used."""

from __future__ import annotations

from tunesmith.core.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "sft": ("tunesmith.objectives.sft:SFT", "supervised: learn to write the completion, token by token"),
        "predict": ("tunesmith.objectives.predict:Predict", "a head that classifies, gives a number, or labels words"),
        "reward": ("tunesmith.objectives.reward:Reward", "a score for answers, learnt from pairs and rankings"),
        "dpo": ("tunesmith.objectives.dpo:DPO", "prefer the chosen answer, by pairs and no reward model"),
        "distill": ("tunesmith.objectives.distill:Distill", "the distributions of a teacher, token by token"),
        "grpo": ("tunesmith.objectives.grpo:GRPO", "its own answers to a prompt, rewarded and compared"),
        "ppo": ("tunesmith.objectives.ppo:PPO", "its own answers, rewarded, beside what a value head expected"),
    },
)
