"""Pipelines whose stages are tensor parallel: the blocks of a stage are cut into parts, and each part has a pipeline.

The one idea: the two cuts do not know of each other. Matrices are cut first, then blocks are left out; processes with
the same place in their stages send each other whole states, for behind a block all of a stage have the same
(Narayanan et al. 2021, arXiv 2104.04473, section 3).
"""

from __future__ import annotations

from tunesmith.parallel.pipeline import Pipeline
from tunesmith.parallel.tensor import TensorParallel


class TensorPipeline(Pipeline, TensorParallel):
    """Blocks in parts, and the matrices of each."""
