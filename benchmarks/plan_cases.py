"""The runs that the plan is judged by: models x methods x formats x sizes, each a few updates on real rows.

The one idea: a case is a name and what it sets; nothing of the planner is fitted on any of them. Two random models
stand for families without a bundled one: a llama with grouped heads and a gpt2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Case = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 8, "targets": ["q", "v"]},
    "lora-all": {"kind": "lora", "rank": 16, "targets": ["q", "k", "v", "o", "gate", "up", "down"]},
    "lora-mlp": {"kind": "lora", "rank": 16, "targets": ["q", "v", "up", "down"]},
    "adapter": {"kind": "adapter", "size": 64},
    "prefix_layer": {"kind": "prefix_layer", "length": 20},
    "prompt": {"kind": "prompt", "length": 20},
    "bitfit": {"kind": "bitfit"},
    "ia3": {"kind": "ia3"},
    "top_layers": {"kind": "top_layers", "layers": 2},
}

# model, objective, method, compute, base, tokens of a micro-batch, longest row, and what else
_LINES = """
minilm       predict lora         fp32 same 1024 128
minilm       predict lora         bf16 nf4  1024 128
minilm       predict lora         fp32 same 1024 128 padded
minilm       predict adapter      fp32 same 1024 128
minilm       predict adapter      fp32 nf4  1024 128
minilm       predict prefix_layer fp32 same 1024 128
minilm       predict prompt       fp32 same 1024 128
minilm       predict prompt       fp32 same 1024 128 padded
llama        sft     lora         fp32 same 1024 256
llama        sft     lora         bf16 nf4  1024 256 padded
llama        sft     prefix_layer bf16 same 1024 256
llama        predict adapter      fp32 same 1024 128
gpt2         sft     lora         fp32 same 1024 256 padded
gpt2         sft     adapter      bf16 same 1024 256
gpt2         sft     prompt       fp32 same 1024 256
gpt2         predict lora         bf16 nf4  1024 128
gpt2         sft     prefix_layer fp32 same 1024 256
minilm       predict lora         bf16 same 2048 128
minilm       predict lora         fp32 same 2048 256 recompute
minilm       predict lora-mlp     fp32 same 2048 128
minilm       predict adapter      bf16 same 2048 256
minilm       predict prefix_layer bf16 same 2048 256
minilm       predict prompt       bf16 same 2048 256
llama        sft     lora-all     bf16 same 2048 512
gpt2         sft     lora         bf16 same 2048 512
minilm       predict lora         fp32 same 4096 256
minilm       predict full         fp32 same 1024 128
minilm       predict full         bf16 same 1024 128
minilm       predict full         fp32 same 1024 128 padded
llama        sft     full         fp32 same 1024 256
llama        sft     full         bf16 same 1024 256 recompute
gpt2         sft     full         fp32 same 1024 256
gpt2         sft     full         bf16 same 1024 256 recompute
minilm       predict full         fp32 same 2048 256
minilm       predict full         fp32 same 2048 256 recompute
llama        sft     full         bf16 same 2048 512
smollm2-135m sft     lora         bf16 same  512 128
smollm2-135m sft     lora         bf16 same  512 256 padded
smollm2-135m sft     lora         bf16 nf4   512 256
smollm2-135m sft     adapter      bf16 nf4   512 256
smollm2-135m sft     prefix_layer bf16 nf4   512 128
smollm2-135m sft     prompt       bf16 nf4   512 256 recompute
smollm2-135m predict adapter      bf16 nf4   512 128
smollm2-135m sft     lora         bf16 same 1024 512
smollm2-135m sft     lora         bf16 same 1024 256 recompute
smollm2-135m sft     lora-all     bf16 nf4  1024 512
smollm2-135m sft     lora-all     bf16 same 1024 256
smollm2-135m sft     adapter      bf16 same 1024 256
smollm2-135m sft     prefix_layer bf16 same 1024 512
smollm2-135m sft     prompt       bf16 same 1024 256
smollm2-135m predict lora         bf16 same 1024 256
smollm2-135m sft     lora         bf16 same 2048 512
smollm2-135m sft     lora         fp32 same  512 256
smollm2-135m sft     lora-all     fp32 nf4   512 128 recompute
smollm2-135m sft     adapter      fp32 same  512 256
smollm2-135m sft     prefix_layer fp32 same  512 256
smollm2-135m sft     prompt       fp32 same  512 256
smollm2-135m predict lora         fp32 same  512 128
smollm2-135m sft     lora         fp32 same 1024 256
smollm2-135m sft     full         bf16 same  512 256
smollm2-135m predict full         bf16 same  512 128
smollm2-135m sft     full         bf16 same 1024 512
smollm2-135m sft     full         bf16 same 1024 256 recompute
smollm2-135m sft     full         fp32 same  512 256
"""

# what is fitted (how much more than tensors a process takes) is fitted on these, with methods that are not above
_FITTED = """
minilm       predict bitfit       fp32 same 2048 256
minilm       predict top_layers   bf16 same 1024 128
smollm2-135m sft     ia3          bf16 same 1024 256
smollm2-135m sft     top_layers   fp32 same  512 256
llama        sft     bitfit       bf16 same 2048 256
llama        sft     top_layers   fp32 same 1024 512
gpt2         sft     ia3          fp32 same 2048 256
gpt2         predict bitfit       bf16 same 1024 128
"""

_RANDOM: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 49152,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 256, "n_layer": 6, "n_head": 8,
        "n_positions": 1024, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 49152,
    },
}  # fmt: skip


def cases(fitted: bool = False) -> dict[str, Case]:
    """Every case by its name, which says what it is; those that are scored, or those that are fitted on."""
    found = {}
    for line in (_FITTED if fitted else _LINES).strip().splitlines():
        words = line.split()
        found["-".join(words)] = _case(words)
    return found


def _case(words: list[str]) -> Case:
    model, objective, method, compute, base, tokens, longest, *more = words
    is_long = model == "smollm2-135m" and method != "full" and int(tokens) >= 1024
    return {
        "model": model,
        "objective": {"kind": "predict", "problem": "classification"} if objective == "predict" else {"kind": "sft"},
        "method": METHODS[method],
        "precision": {"compute": compute, "base": base},
        "data": {"max_length": int(longest), "packing": "padded" not in more},
        "train": {
            "steps": 2,
            "tokens_per_step": int(tokens) * (1 if is_long else 2),
            "micro_batch_tokens": int(tokens),
            "recompute": "full" if "recompute" in more else "none",
        },
    }


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of a case, its model and rows written below `folder` where they are not bundled."""
    case = {**cases(), **cases(fitted=True)}[name]
    rows = "alpaca-demo" if case["objective"]["kind"] == "sft" else str(labelled(folder))
    model = case["model"] if case["model"] not in _RANDOM else str(_random(case["model"], folder))
    return {
        **case,
        "model": model,
        "data": {**case["data"], "train": rows},
        "evaluate": {"metrics": []},
        "log": [],
        "out": str(folder / "runs" / name),
    }


def labelled(folder: Path) -> Path:
    """The rows of alpaca-demo with a label: whether the answer is longer than the question."""
    path = folder / "labelled.jsonl"
    if not path.exists():
        from tunesmith.data.codec import Codec
        from tunesmith.data.dataset import open_data
        from tunesmith.data.rows import Dialogue
        from tunesmith.data.section import DataSection
        from tunesmith.models.source import resolve

        section = DataSection(train="alpaca-demo")  # type: ignore[arg-type]
        data = open_data(section.train, section, Codec.open(resolve("minilm")))
        lines = []
        for dialogue in data.rows():
            assert isinstance(dialogue, Dialogue)
            question, answer = dialogue.prompt[-1].content, dialogue.completion
            label = "long" if len(answer) > len(question) else "short"
            lines.append(json.dumps({"text": f"{question}\n{answer}", "label": label}))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return path


def _random(name: str, folder: Path) -> Path:
    """A model with random weights and the tokenizer of smollm2-135m."""
    target = folder / "models" / name
    if not (target / "model.safetensors").exists():
        import shutil

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from tunesmith.models.source import resolve

        torch.manual_seed(0)
        settings = dict(_RANDOM[name])
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        model.save_pretrained(target)
        for file in resolve("smollm2-135m").glob("token*"):
            shutil.copy(file, target / file.name)
    return target
