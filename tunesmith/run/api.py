"""What Python programs call: load, generate, tune. The same code as the command line, without its printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config, build_config, load_config

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
    """Runs a configuration (an object, a dictionary, or a YAML file) and answers the run folder."""
    from tunesmith.run import run

    if isinstance(config, dict):
        config = build_config(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    return run(config, resume=resume)
