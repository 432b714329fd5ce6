"""A probe in SGLang's processes: a plug-in of a package that is made for it, beside Mainstem's."""

from __future__ import annotations

import os
from pathlib import Path


def probed(folder: Path, name: str, register: str, file_variable: str, *, alone: bool = False) -> dict[str, str]:
    """What a worker's environment needs so that SGLang calls `register` (MODULE:FUNCTION) in each of its processes.

    folder         where the package is made, and where the probe writes: see `told_by`
    name           of the plug-in, as SGLANG_PLUGINS names it
    file_variable  of the environment; what the probe puts `.` and its process's number behind is its file
    alone          without Mainstem's plug-in
    """
    package = folder / f"mainstem_{name}-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mainstem-{name}\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {register}\n")
    here = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, here)), file_variable: str(folder / name)}
    return environment | ({"SGLANG_PLUGINS": name} if alone else {})


def told_by(folder: Path, name: str) -> list[Path]:
    """Files of the probe's, one for each process that had something to tell."""
    return sorted(folder.glob(f"{name}.*"))
