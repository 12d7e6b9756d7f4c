"""Work in closed form: FLOPs of a token, where only a config is at hand.

It counts forward, the gradient of inputs and the gradient of weights apart, because freezing saves only the last. A
traced model (`trace`) gives the exact number; how long work takes is in `calibration`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tunesmith.plan.shape import ModelShape


@dataclass(frozen=True)
class Flops:
    """Work for one token, on average; one multiply-add is two.

    Attributes:
        forward: matrices of the blocks and inserted ones.
        backward_inputs: gradients handed down through matrices, frozen or not.
        backward_weights: gradients of what trains; nothing for what is frozen.
        attention_forward, attention_backward: scores and their use, counted as full squares.
        head: logits at supervised tokens only, all directions.
    """

    forward: float
    backward_inputs: float
    backward_weights: float
    attention_forward: float
    attention_backward: float
    head: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def flops_per_token(
    shape: ModelShape,
    *,
    trained: int,
    inserted: int = 0,
    context: float,
    supervised_share: float = 1.0,
    lowest: int = 0,
    head_trained: bool = False,
) -> Flops:
    """Closed-form work of a step, for each token.

    Args:
        trained: numbers in matrices of the blocks (inserted ones too) whose gradients are wanted.
        inserted: numbers in matrices that an adapter adds.
        context: tokens of the document that a token lies in, on average over tokens: sum of squares / sum of lengths.
        supervised_share: tokens with a target / tokens.
        lowest: first block that trains; below it nothing is handed down. That block is counted whole.
        head_trained: the matrix of the head moves, too.

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1 (2 N forward, 4 N backward); the recomputed scores in
    the backward of attention are those of Dao et al. 2022, arXiv 2205.14135 (5 products against 2).
    """
    matrices = shape.matrix_parameters + inserted
    passed = matrices * (shape.n_layers - lowest) / shape.n_layers
    scores = 4.0 * shape.n_layers * shape.n_heads * shape.d_head * context
    directions = 3 if head_trained else 2
    return Flops(
        forward=2.0 * matrices,
        backward_inputs=2.0 * passed,
        backward_weights=2.0 * trained,
        attention_forward=scores,
        attention_backward=2.5 * scores * (shape.n_layers - lowest) / shape.n_layers,
        head=2.0 * directions * shape.head_parameters * supervised_share,
    )
