"""The other side of benchmarks: trl's SFTTrainer, with peft's LoRA or everything training, on the same steps.

It goes through its own `train()`. Rows reach it as token ids with labels, the form its own preparation ends in. What
it is set to is in VARIANTS; that accelerate's autocast is on inside the model is asserted in the first step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Measured, Turns, ceiling, counting, peak_bytes

IGNORE = -100
ROWS_BY_DEFAULT = 8  # of a forward pass, in trl's settings
# layout: `packed` one row of documents with their lengths (what packing="bfd" makes), `free` padding-free, `padded`;
# micro: rows a forward pass, 0 for all rows of the step; numbers: amp (fp32 weights, bf16 autocast), bf16, fp32
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {"layout": "padded", "micro": ROWS_BY_DEFAULT, "numbers": "amp", "checkpointing": True},
    "padded": {"layout": "padded", "micro": 0, "numbers": "amp"},
    "packing": {"layout": "packed", "micro": 0, "numbers": "amp"},
    "padding-free": {"layout": "free", "micro": 0, "numbers": "amp"},
    "padding-free-4": {"layout": "free", "micro": 4, "numbers": "amp"},
    "padding-free-2": {"layout": "free", "micro": 2, "numbers": "amp"},
    "one-row": {"layout": "padded", "micro": 1, "numbers": "amp"},
}
for _name in ("padded", "packing", "padding-free", "padding-free-4", "padding-free-2", "one-row"):
    VARIANTS |= {f"{_name}-{_numbers}": VARIANTS[_name] | {"numbers": _numbers} for _numbers in ("bf16", "fp32")}


def main(command: str, path: str) -> None:
    """Trains as the settings say."""
    settings = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(settings["threads"])
    turns = Turns(lambda: ceiling(settings["precision"]))
    with tempfile.TemporaryDirectory() as run:
        trainer = build(settings, turns, run)
        turns.begin()
        with counting(turns, trainer.model, settings.get("count", False)):
            trainer.train()


def build(settings: dict[str, Any], turns: Turns, run: str) -> Any:
    """The trainer, with the same factors and order of rows as the other side."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    imported = peak_bytes()
    variant = VARIANTS[settings["variant"]]
    folder = settings["model_folder"]
    trainer = noting(SFTTrainer, turns, len(settings["use"]))(
        model=folder,
        args=arguments(settings, variant, run),
        train_dataset=Dataset.from_list(rows(settings, variant["layout"])),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora(settings),
    )
    if settings["method"]["kind"] == "lora":
        copy_factors(trainer.model, Path(settings["folder"]) / f"init-{settings.get('seed', 0)}.safetensors")
    weights = next(p for n, p in trainer.model.named_parameters() if "lora_" not in n).dtype
    assert weights == (torch.bfloat16 if variant["numbers"] == "bf16" else torch.float32)
    trainer.wanted_autocast = variant["numbers"] == "amp"
    turns.tell(imports_bytes=imported, loaded_bytes=peak_bytes(), what=f"weights {weights}, {variant}")
    return trainer


def lora(settings: dict[str, Any]) -> Any:
    """peft's configuration of the method; None where everything trains."""
    from peft import LoraConfig

    method = settings["method"]
    if method["kind"] == "full":
        return None
    return LoraConfig(r=method["rank"], lora_alpha=method["alpha"], lora_dropout=0.0, target_modules=settings["places"])


def arguments(settings: dict[str, Any], variant: dict[str, Any], run: str) -> Any:
    """trl's settings of a variant."""
    from trl import SFTConfig

    packed, free = variant["layout"] == "packed", variant["layout"] == "free"
    micro = 1 if packed else min(variant["micro"] or settings["rows"], settings["rows"])
    assert settings["rows"] % micro == 0, "rows of an update are a multiple of the rows of a forward pass"
    return SFTConfig(
        output_dir=run,
        use_cpu=True,
        bf16=variant["numbers"] == "amp",
        model_init_kwargs={"dtype": "bfloat16" if variant["numbers"] == "bf16" else "float32"},
        gradient_checkpointing=variant.get("checkpointing", False),
        packing=packed,
        padding_free=free,
        max_length=None if free else 8192,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=1 if packed else settings["rows"] // micro,
        max_steps=len(settings["use"]),
        train_sampling_strategy="sequential",
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
    )


def rows(settings: dict[str, Any], layout: str) -> list[dict[str, list[int]]]:
    """The rows of the steps, in order."""
    steps = json.loads((Path(settings["folder"]) / "steps.json").read_text())
    return [row for index in settings["use"] for row in shaped_rows(steps[index], layout)]


def shaped_rows(step: list[dict[str, Any]], layout: str) -> list[dict[str, list[int]]]:
    """The rows of a step as trl's collator takes them; packed: one."""
    found: list[dict[str, list[int]]] = [
        {
            "input_ids": row["ids"],
            "labels": [i if s else IGNORE for i, s in zip(row["ids"], row["supervised"], strict=True)],
        }
        for row in step
    ]
    if layout != "packed":
        return found
    joined = {key: [value for row in found for value in row[key]] for key in ("input_ids", "labels")}
    return [joined | {"seq_lengths": [len(row["input_ids"]) for row in found]}]


def noting(trainer_class: type, turns: Turns, total: int, device: str = "cpu") -> type:
    """The trainer, noting the loss and the supervised tokens of each update, and pausing between blocks.

    `wanted_autocast` of what is made is compared with what is on in the first step; None compares nothing.
    """
    import torch
    from transformers import TrainerCallback

    class Pause(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            done = Measured(self.trainer.noted_loss, self.trainer.noted_tokens)
            self.trainer.noted_loss = 0.0
            turns.step(done, state.global_step == total)

    class Noting(trainer_class):  # type: ignore[misc]
        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.noted_loss, self.noted_tokens = 0.0, 0
            self.wanted_autocast: bool | None = True
            self.add_callback(Pause(self))
            layer = next(m for n, m in self.model.named_modules() if n.endswith("layers.0"))
            self.look = layer.register_forward_pre_hook(self.check_autocast)

        def check_autocast(self, module: Any, inputs: Any) -> None:
            found = torch.is_autocast_enabled(device)
            assert self.wanted_autocast in (None, found), "accelerate's autocast is not as it was set"
            self.look.remove()

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.noted_loss += float(loss)
            self.noted_tokens = int(num_items_in_batch)
            return loss

    return Noting


def copy_factors(model: Any, path: Path) -> None:
    """Sets every A to the one that the other side starts from; B is zero on both."""
    import torch
    from safetensors.torch import load_file

    factors = load_file(path)
    for place, values in factors.items():
        module = model.get_submodule(f"base_model.model.{place}")
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(values)
        assert not module.lora_B["default"].weight.any()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(factors)


if __name__ == "__main__":
    main(*sys.argv[1:])
