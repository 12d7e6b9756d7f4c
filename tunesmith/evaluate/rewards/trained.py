"""A reward model: what a run of `objective: reward` says of prompt and completion, read at the completion's end.

The one idea: its adapter and head stand on the base that writes, under a route of their own, so that no second model
is loaded. Who asks it is `run/reward_models.py`; here is which run it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import read_json
from tunesmith.core.problem import HEAD_KEY
from tunesmith.evaluate.rewards.reward import Reward


class Trained(Reward):
    """The score of a reward model.

    Attributes:
        run: folder of a finished run of `objective: reward` on the same base.
    """

    kind: Literal["run"] = "run"
    run: str = Field(min_length=1)

    @property
    def adapter(self) -> Path:
        """Where its adapter is."""
        return Path(self.run) / "adapter"

    @property
    def files(self) -> tuple[str, ...]:
        """The adapter and its head."""
        return tuple(str(path) for path in sorted(self.adapter.glob("*.safetensors")))

    def check_there(self) -> None:
        """The run has an adapter whose head scores answers."""
        path = self.adapter / "adapter_config.json"
        if not path.is_file():
            hint = "finish a run of objective: reward with a method that saves an adapter, such as lora"
            raise ConfigError(f"{self.run!r} is no run with an adapter", where="objective.reward", hint=hint)
        settings = read_json(path, ModelError)
        head = settings.get(HEAD_KEY) if isinstance(settings, dict) else None
        if not isinstance(head, dict) or head.get("problem") != "reward":
            hint = "name a run of objective: reward"
            raise ConfigError(f"{self.run!r} has no head that scores answers", where="objective.reward", hint=hint)
