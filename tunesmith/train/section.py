"""The `train:` and `precision:` sections: how long, how fast, in what numbers, when to save, when to stop.

Every default is written out by building the section, so that the resolved configuration of a run says what ran.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tunesmith.core.section import Section

TOKENS_PER_STEP, MICRO_BATCH_TOKENS = 4096, 1024
MICRO_BATCH_ROWS = 4
SIZES = ("tokens_per_step", "micro_batch_tokens", "rows_per_step", "micro_batch_rows")


class StopSection(Section):
    """Early stop, and which checkpoint is the best one.

    Attributes:
        metric: one of the metrics of `evaluate`.
        patience: evaluations in a row without a new best after which the run ends.
    """

    metric: str = Field(min_length=1)
    patience: int = Field(default=3, ge=1)


class TrainSection(Section):
    """One run of the trainer. `{steps: 100}` alone is enough.

    Attributes:
        steps: optimizer updates; or
        epochs: times that every row is seen.
        tokens_per_step: tokens (prompt and completion) of the rows of an update, at most; or
        rows_per_step: rows of an update.
        micro_batch_tokens: tokens that the model sees at once; changes memory and speed, never the result.
        micro_batch_rows: the same in rows.
        lr: highest learning rate.
        schedule: what follows the warm-up.
        warmup: fraction of the steps during which the learning rate rises.
        weight_decay: decoupled, on matrices; norms and biases are never decayed.
        clip: the gradient's norm is scaled down to this; 0 leaves it alone.
        optimizer: AdamW.
        optimizer_state: in what AdamW keeps its two moments between updates; bf16 and int8 are rounded by chance.
        save_every: steps between checkpoints; the last step is always saved.
        keep: newest checkpoints that stay on disk, besides the best one.
        seed: of data order and dropout.
        minutes: the run ends, saved, after so long.
        tokens: the run ends, saved, after so many tokens.
        recompute: what is made again in the backward pass instead of kept: of every block (`full`), of the MLP of
            every block (`selective`), or as little as lets the run fit into the memory that is free (`auto`).
        offload: what waits outside the memory that the model computes in, with the same result: `optimizer` (master
            weights and moments) or `activations`. On a CPU that is on the disk, beside the run.
        cache_trunk: bytes on disk for what frozen lower blocks make of the rows, so that they run once; 0 is off.
        stop: early stop on a metric; the best checkpoint's weights are the result.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    tokens_per_step: int | None = Field(default=None, ge=1)
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    rows_per_step: int | None = Field(default=None, ge=1)
    micro_batch_rows: int | None = Field(default=None, ge=1)
    lr: float = Field(default=2.0e-4, ge=0, le=100)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    clip: float = Field(default=1.0, ge=0)
    optimizer: Literal["adamw"] = "adamw"
    optimizer_state: Literal["fp32", "bf16", "int8"] = "fp32"
    save_every: int = Field(default=50, ge=1)
    keep: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    minutes: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, ge=1)
    recompute: Literal["none", "selective", "full", "auto"] = "none"
    offload: Literal["none", "optimizer", "activations"] = "none"
    cache_trunk: int = Field(default=0, ge=0)
    stop: StopSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        """Fills in the sizes of the one family that is used; tokens where neither is."""
        if not isinstance(values, dict):
            return values
        # None is "not given" where it may be; elsewhere it is told off below, not replaced by the default
        given = {name: value for name, value in values.items() if value is not None or name not in SIZES}
        rows = "rows_per_step" in given
        if rows:
            default, micro, whole = MICRO_BATCH_ROWS, "micro_batch_rows", given["rows_per_step"]
        else:
            if "micro_batch_rows" in given:
                return given  # told off below
            default, micro = MICRO_BATCH_TOKENS, "micro_batch_tokens"
            whole = given.setdefault("tokens_per_step", TOKENS_PER_STEP)
        if isinstance(whole, int):
            given.setdefault(micro, min(whole, default))
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            told = "neither is given" if self.steps is None else "both are given"
            raise ValueError(f"exactly one of steps and epochs is needed; {told}")
        if self.micro_batch_rows and not self.rows_per_step:
            raise ValueError("micro_batch_rows needs rows_per_step")
        if self.rows_per_step and (self.tokens_per_step or self.micro_batch_tokens):
            raise ValueError(
                "sizes are either tokens (tokens_per_step, micro_batch_tokens) "
                "or rows (rows_per_step, micro_batch_rows); both are given"
            )
        self._micro_fits("micro_batch_tokens", self.micro_batch_tokens, "tokens_per_step", self.tokens_per_step)
        self._micro_fits("micro_batch_rows", self.micro_batch_rows, "rows_per_step", self.rows_per_step)
        return self

    @model_validator(mode="after")
    def _offloaded_in_fp32(self) -> Self:
        if self.offload == "optimizer" and self.optimizer_state != "fp32":
            raise ValueError(
                f"offload: optimizer keeps moments in fp32, and optimizer_state is {self.optimizer_state}; "
                "leave out one of them"
            )
        return self

    @staticmethod
    def _micro_fits(micro_name: str, micro: int | None, name: str, whole: int | None) -> None:
        if micro and whole and micro > whole:
            raise ValueError(f"{micro_name} is {micro}, more than {name}, which is {whole}")


class PrecisionSection(Section):
    """In what numbers.

    Attributes:
        compute: of weights and activations in forward and backward; `auto` is bf16 where the hardware has it; fp16
            scales the loss.
        base: what the frozen weights of linear maps are held in, but the output head's; they are computed with in
            `compute`. `same` is that format.
        master: trained weights that are held in bf16 or fp16 get an fp32 copy, which is what the optimizer updates.
    """

    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    master: bool = True
    base: Literal["same", "bf16", "int8", "nf4"] = "same"

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.compute == "fp16" and not self.master:
            raise ValueError(
                "fp16 is trained through fp32 masters: its own smallest number, 6e-8, is larger than most updates; "
                "set master to true, or compute to bf16"
            )
        return self
