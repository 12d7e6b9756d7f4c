"""What Python programs call: load, generate, tune. The same code as the command line, without its printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config, build_config

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded


def load(source: str | Path, *, precision: str = "fp32") -> Loaded:
    """A model, or a run with its adapter: `.model` is the transformers module, `.tokenizer` its tokenizer.

    Raises: ModelError, AdapterError.
    """
    from tunesmith.run.opening import open_model

    return open_model(str(source), precision=precision).loaded


def generate(
    source: str | Path,
    prompts: str | Sequence[str],
    *,
    system: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """A model's answers to prompts; greedy at temperature 0."""
    from tunesmith.run.speaking import Speaker

    speaker = Speaker(str(source))
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    dialogues = [speaker.dialogue(prompt, system) for prompt in asked]
    answers = speaker.answer(dialogues, max_new_tokens=max_tokens, temperature=temperature, seed=seed)
    return [answer["completion"] for answer in answers]


def tune(config: Config | dict[str, Any] | str | Path, *, resume: bool = False) -> Path:
    """Runs a configuration or a list of stages (an object, a dictionary, or a YAML file) and answers its folder."""
    from tunesmith.run import run
    from tunesmith.run.staged import run_stages
    from tunesmith.run.stages import build_stages, load_stages

    if isinstance(config, dict):
        wanted = build_stages(config) if "stages" in config else build_config(config)
    else:
        wanted = config if isinstance(config, Config) else load_stages(config)
    if isinstance(wanted, Config):
        return run(wanted, resume=resume)
    return run_stages(wanted, resume=resume) if wanted.is_list else run(wanted.only, resume=resume)
