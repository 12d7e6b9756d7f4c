"""Both sides of `gpu.py`: `gpu_sides.py train SETTINGS` trains random weights until the parent has seen enough.

Each goes through its own `train()`. Not run on a GPU yet; see `gpu.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.roofline import ALL_MAPS, SHAPES
from benchmarks.turns import Measured, Turns, ceiling

ENDLESS = 10**6  # steps: the parent ends a run
ROWS, STEPS = 8, 6  # rows of an update, and updates before they come again


class SyncedTurns(Turns):
    """Turns that wait for the device before they look at the clock, and tell its memory."""

    def __init__(self, device: str) -> None:
        super().__init__(lambda: ceiling("bf16", device, 8192 if device == "cuda" else 256))
        self.device = device

    def step(self, done: Measured, last: bool) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        super().step(done, last)

    def tell(self, **what: Any) -> None:
        if self.device == "cuda":
            import torch

            what |= {"device_bytes": torch.cuda.max_memory_allocated(), "held_bytes": torch.cuda.max_memory_reserved()}
        super().tell(**what)


def main(command: str, path: str) -> None:
    """Trains until the parent has seen enough."""
    settings = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(settings["threads"])
    turns = SyncedTurns(settings["device"])
    with tempfile.TemporaryDirectory() as run:
        (train_ours if settings["peer"] is None else train_theirs)(settings, turns, run)


def random_model(settings: dict[str, Any], dtype: str, attention: str = "sdpa") -> Any:
    """The shape with random weights, the same on every side."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(SHAPES[settings["shape"]])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, max_position_embeddings=32768)
    torch.manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with torch.device(settings["device"]):
        return AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=attention)


def train_ours(settings: dict[str, Any], turns: Turns, run: str) -> None:
    """tunesmith's own trainer, policy and LoRA."""
    from benchmarks.ours import Tuned, attached, cut
    from tunesmith.data.encode import Example
    from tunesmith.models.families import family_of
    from tunesmith.models.load import Loaded
    from tunesmith.models.policy import Policy
    from tunesmith.objectives.sft import SFT
    from tunesmith.train.section import PrecisionSection, TrainSection
    from tunesmith.train.trainer import train as tunesmith_train

    model = random_model(settings, "bf16").eval()
    loaded = Loaded(model, Path(run), settings["shape"], family_of(model.config, model), model.config)
    method = {"kind": "lora", "rank": settings["rank"], "alpha": 2.0 * settings["rank"], "targets": list(ALL_MAPS)}
    adapter = attached({"method": method}, loaded)
    tuned = Tuned(adapter.parameters, Policy(loaded, adapter.route))
    kept = json.loads(Path(settings["steps"]).read_text())
    examples = [[Example(row["ids"], row["supervised"], f"row:{n}") for row in step] for n, step in enumerate(kept)]

    def stream(cursor: Any) -> Iterator[Any]:
        for number in itertools.count(1):
            yield cut(examples[(number - 1) % STEPS], number, settings["micro_tokens"])

    section = TrainSection(
        steps=ENDLESS, rows_per_step=ROWS, lr=1e-4, schedule="constant", warmup=0.0, save_every=ENDLESS
    )
    turns.tell(parameters=sum(parameter.numel() for parameter in model.parameters()))
    turns.begin()
    tunesmith_train(
        tuned, stream, SFT(), section, PrecisionSection(compute="bf16"), Path(run), total_steps=ENDLESS,
        observers=[lambda record: turns.step(Measured(record["loss"], record["supervised_tokens"]), last=False)],
    )  # fmt: skip


def train_theirs(settings: dict[str, Any], turns: Turns, run: str) -> None:
    """trl's trainer as the peer says, with peft's LoRA or Unsloth's."""
    peer = settings["peer"]
    if peer.get("unsloth"):
        import unsloth  # noqa: F401  it changes the others, and has to come first
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    from benchmarks.theirs import noting, shaped_rows

    lora = {"r": settings["rank"], "lora_alpha": 2 * settings["rank"], "lora_dropout": 0.0}
    lora["target_modules"] = [f"{role}_proj" for role in ALL_MAPS]
    if peer.get("unsloth"):
        model, config = unsloth_model(settings, lora, run), None
    else:
        numbers = "fp32" if peer["numbers"] == "amp" else "bf16"
        flash = importlib.util.find_spec("flash_attn") and settings["device"] == "cuda"
        model = random_model(settings, numbers, "flash_attention_2" if flash else "sdpa")
        config = LoraConfig(**lora)
    steps = json.loads(Path(settings["steps"]).read_text())
    rows = [row for step in steps for row in shaped_rows(step, peer["layout"])]
    trainer = noting(SFTTrainer, turns, ENDLESS, settings["device"])(
        model=model,
        args=arguments(settings, peer, run),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
        peft_config=config,
    )
    trainer.wanted_autocast = None if peer.get("unsloth") else peer["numbers"] == "amp"
    turns.tell(parameters=sum(parameter.numel() for parameter in model.parameters()))
    turns.begin()
    trainer.train()


def arguments(settings: dict[str, Any], peer: dict[str, Any], run: str) -> Any:
    """trl's settings of a peer."""
    from trl import SFTConfig

    packed = peer["layout"] == "packed"
    return SFTConfig(
        output_dir=run,
        use_cpu=settings["device"] == "cpu",
        bf16=peer["numbers"] == "amp",
        gradient_checkpointing=peer["checkpointing"],
        use_liger_kernel=peer.get("liger", False),
        packing=packed,
        max_length=settings["micro_tokens"],
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=1 if packed else ROWS,
        max_steps=ENDLESS,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=ENDLESS,
        seed=0,
    )


def unsloth_model(settings: dict[str, Any], lora: dict[str, Any], run: str) -> Any:
    """The same weights through Unsloth, which reads a folder; with its own LoRA."""
    import torch
    from transformers import AutoTokenizer
    from unsloth import FastLanguageModel

    folder = Path(run) / "model"
    random_model(settings, "bf16").save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings["tokenizer"]).save_pretrained(folder)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=settings["micro_tokens"], dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
