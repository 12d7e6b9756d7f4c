"""What models earn on held-out prompts: python benchmarks/drawn.py CONFIG MODEL_OR_RUN... [--rows 500] [--draws 2]

CONFIG is that of a run over its own completions; prompts are those of its data.eval, the rewards and limits its own.
Answers are greedy, and drawn with the temperature of the run; intervals are 95 % bootstraps over prompts. The commonest
answer of data.train, said to every prompt, stands beside the models, and ten drawn answers of the last one are shown.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEED = 5
RESAMPLES = 2000


def main() -> None:
    """Measures, and prints a table and ten answers, or one JSON document."""
    import torch

    from tunesmith.config import load_config

    options = parse()
    torch.set_num_threads(1)
    config: Any = load_config(options.config)
    shown: list[tuple[str, str, float]] = []
    found: dict[str, Any] = {}
    for number, name in enumerate(options.models):
        asked = Asked(config, name, options.rows)
        if number == 0:
            found["commonest answer"] = {"greedy": interval(asked.constant())}
        greedy, _ = asked.earned(1, 0.0)
        drawn, shown = asked.earned(options.draws, config.objective.temperature)
        found[name] = {"greedy": interval(greedy), "drawn": interval(drawn)}
        print(name, found[name], file=sys.stderr, flush=True)
    ten = random.Random(SEED).sample(shown, min(10, len(shown)))
    if options.json:
        print(json.dumps({"models": found, "answers": ten}, indent=1))
        return
    print("| | greedy answers | drawn answers |\n|---|---|---|")
    for name, ways in found.items():
        print(f"| {name} | {told(ways['greedy'])} | {told(ways['drawn']) if 'drawn' in ways else ''} |")
    print("\n| prompt | answer | reward |\n|---|---|---|")
    for prompt, answer, reward in ten:
        print(f"| {prompt} | `{answer}` | {reward:g} |".replace("\n", " "))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rows", type=int, default=500, help="first prompts")
    parser.add_argument("--draws", type=int, default=2, help="drawn answers of a prompt")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Asked:
    """A model and held-out prompts for it."""

    def __init__(self, config: Any, name: str, rows: int) -> None:
        from tunesmith.data.encode import Prompt
        from tunesmith.evaluate.rewards import open_rewards
        from tunesmith.run.opening import open_model
        from tunesmith.run.prepare import read_data

        self.objective, self.rewards = config.objective, open_rewards(config.objective.reward)
        self.opened = open_model(name, plain=True)
        limit = self.objective.max_new_tokens
        self.data, _ = read_data(config.data.eval, config.data, self.opened.codec, "data.eval", answered=limit)
        self.train, _ = read_data(config.data.train, config.data, self.opened.codec, "data.train")
        prompts = (self.data.prompt(*place) for place in islice(self.data.places(), rows))
        self.prompts = [one for one in prompts if isinstance(one, Prompt)]

    def constant(self) -> list[float]:
        """What the commonest answer of the training rows earns with each prompt."""
        text = Counter(one.completion for one in self.train.dialogues(None)).most_common(1)[0][0].strip()
        return [self.reward(prompt, text) for prompt in self.prompts]

    def reward(self, prompt: Any, text: str) -> float:
        """What an answer earns."""
        return sum(one.weight * one(prompt, text) for one in self.rewards)

    def earned(self, draws: int, temperature: float) -> tuple[list[float], list[tuple[str, str, float]]]:
        """The mean reward of each prompt, and every question, answer and reward."""
        from tunesmith.models.generate import generate

        asked = [prompt for prompt in self.prompts for _ in range(draws)]
        written = generate(
            self.opened.loaded,
            self.opened.route,
            [prompt.ids for prompt in asked],
            max_new_tokens=self.objective.max_new_tokens,
            stop_ids=set(self.data.template_of(asked[0].dialogue).stop_ids),
            temperature=temperature,
            seed=SEED,
            batch_size=64,
        )
        texts = [self.opened.codec.decode(one.ids).strip() for one in written]
        rewards = [self.reward(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
        rows = [(prompt.question, text, reward) for prompt, text, reward in zip(asked, texts, rewards, strict=True)]
        return [sum(rewards[at : at + draws]) / draws for at in range(0, len(rewards), draws)], rows


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its interval."""
    draw, count = random.Random(0), len(values)
    means = sorted(sum(draw.choices(values, k=count)) / count for _ in range(RESAMPLES))
    return sum(values) / count, means[RESAMPLES // 40], means[-RESAMPLES // 40]


def told(found: tuple[float, float, float]) -> str:
    """An interval for people."""
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


if __name__ == "__main__":
    main()
