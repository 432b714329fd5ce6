"""Everything that a worker imports, imported once: what the launcher's zygote does before it forks.

Importing SGLang takes half a minute of CPU time in each of a worker's three
processes, and reading the tokenizer several seconds in each, twice in one of them.
Forked from one process that has done both, they share it.

Only for a CPU: a process that has initialized CUDA must not be forked.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.spec import ZYGOTE_MODEL_VARIABLE

HEAVY_MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "transformers",
)
"""What a worker's HTTP server, scheduler and detokenizer import, at once or later."""

GPU_MODULES = ("flashinfer",)
"""SGLang tries to import these and does without them where they are missing; on a CPU they are never used (4 s)."""

DISABLED_MODELS = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's own variable: modules of `sglang.srt.models` that it shall not import."""


def import_engine() -> None:
    """Imports SGLang, loads the plug-in and the model's tokenizer. Raises RuntimeError where CUDA was initialized."""
    model = os.environ.get(ZYGOTE_MODEL_VARIABLE)
    sys.modules.update(dict.fromkeys(GPU_MODULES))  # type: ignore[arg-type]  # None is what makes an import fail
    if model is not None:
        os.environ.setdefault(DISABLED_MODELS, ",".join(other_models(Path(model))))
    # Its threads would not live on in a forked child.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in HEAVY_MODULES:
        importlib.import_module(module)
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from engine import sglang_server
    from engine.sglang_load import load

    HookRegistry.register("sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer", Remembered(), HookType.AROUND)
    load()
    if model is not None:
        _read_tokenizer(model)
    if torch.cuda.is_initialized():
        raise RuntimeError("launch.start: wanted fork on a machine where nothing uses CUDA, found CUDA initialized")
    sglang_server.keep_forking()


class Remembered:
    """A function's result for each set of arguments, kept for this process and those forked from it."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in self._results:
            self._results[key] = original(*args, **kwargs)
        return self._results[key]


def other_models(checkpoint: Path) -> list[str]:
    """Modules of SGLang's models that this checkpoint does not need; none where its architecture is not found.

    SGLang imports the code of all its two hundred models to serve one: 5 s.
    """
    architectures = json.loads((checkpoint / "config.json").read_text()).get("architectures") or []
    folder = _models_folder()
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    pattern = re.compile(rf"^class ({'|'.join(map(re.escape, architectures))})\b", re.MULTILINE)
    needed = [name for name in names if architectures and pattern.search((folder / f"{name}.py").read_text())]
    return [name for name in names if name not in needed] if needed else []


def _models_folder() -> Path:
    """Found without importing SGLang, which would read the variable too early."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        raise ImportError("sglang: wanted the locked package, found none")
    return Path(found.origin).parent / "srt" / "models"


def _read_tokenizer(model: str) -> None:
    """As every one of a worker's processes will ask for it; other arguments are read where they are asked for."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    defaults = {name: field.default for name, field in ServerArgs.__dataclass_fields__.items()}
    wanted = ("tokenizer_mode", "trust_remote_code", "revision", "tokenizer_backend")
    get_tokenizer(model, **{name: defaults[name] for name in wanted})
