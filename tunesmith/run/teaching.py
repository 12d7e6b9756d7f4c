"""A teacher beside its student: loaded, asked in every step or once before them, and what held-out rows show.

The one idea: with `top_k` everything that a run will ask is asked before it trains, and the teacher is let go of.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tunesmith.core.progress import progress_bar
from tunesmith.core.types import Batch
from tunesmith.data.batch import to_batch
from tunesmith.data.encode import Example
from tunesmith.data.pack import Cursor
from tunesmith.evaluate.losses import BATCH_TOKENS, batches, row_losses
from tunesmith.models.distances import ask
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE
from tunesmith.objectives.distill import Distill
from tunesmith.run.kept_teaching import KeptTeaching, key_of
from tunesmith.run.opening import open_model
from tunesmith.run.starting import beside

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.run.prepare import Prepared


class Teaching:
    """The teacher of a run.

    Attributes:
        teacher: the model; None once it has said all that is needed.
        kept: what it said, with `top_k`.

    Args:
        loaded: the student's model.
        compute: in what numbers both compute.

    Raises what loading raises; ResourceError.
    """

    def __init__(self, prepared: Prepared, loaded: Loaded, compute: str) -> None:
        objective, found = prepared.config.objective, prepared.teacher
        assert isinstance(objective, Distill)
        assert found is not None
        self.prepared, self.objective = prepared, objective
        self.adapter: Adapter | None = None
        packed = prepared.config.data.packing
        if found.beside:
            if found.named.adapter is not None:
                self.adapter = beside(loaded, found.named.adapter, "teacher")
            route = BASE if self.adapter is None else self.adapter.route
            self.teacher: Policy | None = Policy(loaded, route, packed=packed)
        else:
            opened = open_model(objective.teacher, precision=compute)
            opened.loaded.model.requires_grad_(False)
            self.teacher = Policy(opened.loaded, opened.route, packed=packed)
        self.kept: KeptTeaching | None = None
        if objective.top_k:
            base = prepared.config.precision.base if found.beside else "same"
            facts = {"teacher": found.hashes(), "compute": compute, "base": base, "temperature": objective.temperature}
            self.kept = KeptTeaching(facts, objective.top_k)
            self._ask_all(self.kept, objective.top_k)

    def stand_by(self, policy: Policy) -> None:
        """Makes the teacher what a policy learns from; what the policy's own adapter made trainable is frozen again."""
        for parameter in self.adapter.parameters.values() if self.adapter is not None else ():
            parameter.requires_grad_(False)
        policy.teacher = self.teacher

    def collate(self, rows: Sequence[Example]) -> Batch:
        """Rows as a batch, with what the teacher said of them where that is kept."""
        batch = to_batch(rows)
        return batch if self.kept is None else replace(batch, likeliest=self.kept.of(rows))

    def distances(self, policy: Policy, rows: Sequence[Example]) -> tuple[list[float], list[int]]:
        """Summed distance from the teacher and number of supervised tokens of each row."""
        distance = self.objective.distance
        student = policy.under(policy.route)
        student.teacher = self.teacher
        return row_losses(student, rows, of=lambda batch: student.taught(batch, distance, 0.0)[1], collate=self.collate)

    def close(self) -> None:
        """Lets go of the file."""
        if self.kept is not None:
            self.kept.close()

    def _ask_all(self, kept: KeptTeaching, count: int) -> None:
        """Has the teacher say what is missing of all rows of the run, then lets go of it."""
        rows = self._rows()
        chunks = [[rows[place] for place in places] for places in batches(rows, BATCH_TOKENS)]
        # a chunk is asked whole: what is said of a row does not depend on where an earlier process was killed
        wanted = [chunk for chunk in chunks if any(kept.read(row) is None for row in chunk)]
        assert self.teacher is not None
        device = self.teacher.model.device
        with progress_bar("the teacher reads", len(wanted), bytes_=False) as report:
            for number, chunk in enumerate(wanted, 1):
                said = ask(self.teacher, to_batch(chunk).to(device), count, self.objective.temperature)
                kept.write(chunk, said.to("cpu"))
                report(number, len(wanted))
        self.teacher = None
        gc.collect()

    def _rows(self) -> list[Example]:
        """The rows that the run will learn from or be judged on, each once."""
        prepared = self.prepared
        found: dict[str, Example] = {}
        for step in islice(prepared.stream(Cursor()), prepared.totals.steps):
            found |= {key_of(row): row for rows in step.micro_batches for row in rows}
        section = prepared.config.evaluate
        if prepared.eval is not None and (section.metrics or section.every):
            held_out: list[Any] = [prepared.eval.example(*place) for place in prepared.eval.places()][: section.rows]
            found |= {key_of(row): row for row in held_out if isinstance(row, Example)}
        return list(found.values())
