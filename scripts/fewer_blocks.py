"""A student out of its teacher: the model with evenly spread blocks, and no others.

`python scripts/fewer_blocks.py smollm2-135m student 15` writes the folder `student`, of 15 blocks. It says
nothing sensible before it has learnt from its teacher (docs/results/distill.md).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from torch import nn

import tunesmith as ts


def main(source: str, out: str, count: int) -> None:
    loaded = ts.load(source)
    model, blocks = loaded.model, loaded.model.model.layers
    last = len(blocks) - 1
    kept = sorted({round(place * last / (count - 1)) for place in range(count)})
    model.model.layers = nn.ModuleList([blocks[place] for place in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in kept]
    for file in Path(loaded.folder).iterdir():
        if file.is_file() and not file.name.startswith("model") and file.name != "config.json":
            Path(out).mkdir(exist_ok=True)
            shutil.copy(file, out)
    model.save_pretrained(out)
    print(f"{out}: blocks {' '.join(map(str, kept))} of {last + 1}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
