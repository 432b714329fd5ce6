"""A probe in SGLang's processes: a plug-in of a package that is made for it, beside Mainstem's."""

from __future__ import annotations

import os
from pathlib import Path


def probed(folder: Path, name: str, register: str) -> dict[str, str]:
    """What a worker's environment needs so that SGLang calls `register` (MODULE:FUNCTION) in each of its processes.

    folder  where the package is made
    name    of the plug-in, as SGLANG_PLUGINS names it
    """
    package = folder / f"mainstem_{name}-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mainstem-{name}\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {register}\n")
    here = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, here))}
