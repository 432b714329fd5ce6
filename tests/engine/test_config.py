"""The cluster file: what it accepts, and the one line that each mistake gives."""

from pathlib import Path

import pytest

from engine.config import RANK_FLAGS, ClusterConfig, parse_cluster, read_cluster
from engine.launch.errors import BadInput
from engine.launch.flags import OWNED, FlagValue, arguments, known_flags, parse_flags

ROOT = Path(__file__).parents[2]
WORKERS = "workers: [{role: prefill, count: 2}, {role: decode}]\n"
HEAD = f"name: tiny\nmodel: {{path: smollm2}}\n{WORKERS}"


def parse(text: str) -> ClusterConfig:
    return parse_cluster(text, Path("/nowhere"))


def lines_of(text: str) -> tuple[str, ...]:
    with pytest.raises(BadInput) as caught:
        parse(text)
    return caught.value.lines


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_in_configs_is_valid(path: Path) -> None:
    assert read_cluster(path).name == path.stem


@pytest.mark.parametrize(
    ("added", "line"),
    [
        ("router: {port: abc}", "router.port: wanted an integer from 1 to 65535, found 'abc'"),
        ("router: {port: 0}", "router.port: wanted an integer from 1 to 65535, found 0"),
        ("router: {prot: 1}", "router.prot: unknown key, did you mean 'port'?"),
        ("rooter: {port: 1}", "rooter: unknown key, did you mean 'router'?"),
        ("router: {replicas: 0}", "router.replicas: wanted an integer from 1 to 16, found 0"),
        ("router: {replicas: 17}", "router.replicas: wanted an integer from 1 to 16, found 17"),
        (
            "router: {port: 65535, replicas: 2}",
            "router.replicas: wanted ports up to 65535, found 65536 for the last one",
        ),
        ("transfer: {audit_s: 0}", "transfer.audit_s: wanted a number above 0, found 0"),
        ("router: {cost: {alpha: 0}}", "router.cost.alpha: wanted a number of at least 1, found 0"),
        ("router: 8000", "router: wanted a mapping, found 8000"),
        ("launch: {start: frok}", "launch.start: wanted one of auto, fork, spawn, found 'frok'"),
        ("launch: {restarts: true}", "launch.restarts: wanted an integer of at least 0, found true"),
        ("launch: {stop_timeout_s: 0}", "launch.stop_timeout_s: wanted a number above 0, found 0"),
        ("transfer: {transports: []}", "transfer.transports: wanted a list with at least one entry, found a list of 0"),
        ("transfer: {transports: [ucx]}", "transfer.transports[0]: wanted one of nvlink, shm, tcp, nixl, found 'ucx'"),
        ("transfer: {tcp_lanes: 0}", "transfer.tcp_lanes: wanted an integer from 1 to 64, found 0"),
        ("transfer: {silence_s: 0.5}", "transfer.silence_s: wanted a number of at least 1, found 0.5"),
        (
            "transfer: {transports: [nixl], nixl_devices: [eth0]}",
            "transfer.nixl_devices[0]: wanted a device that is in transfer.trusted_devices, found 'eth0': nixl's data "
            "port knows no key, so whoever reaches it can write any memory of the worker",
        ),
        (
            "engine: {tp-size: 2}",
            "engine.tp-size: wanted 1 with the roles prefill and decode, found 2: a hand-off between several ranks is "
            "not supported",
        ),
        (
            "engine: {dp-size: 2}",
            "engine.dp-size: is not yours to set: a worker is one SGLang server on one host; for more replicas raise "
            "workers[].count",
        ),
        ("environment: {A: true}", "environment.A: wanted text, found true; write it in quotes"),
        ("engine: {page-size: 0}", "engine.page-size: wanted an integer of at least 1, found 0"),
        ("engine: {page-size: true}", "engine.page-size: wanted an integer of at least 1, found true"),
        (
            "engine: {device: {type: cpu}}",
            "engine.device: wanted true or false, an integer, a number, text or a list, found a mapping",
        ),
        ("engine: {--device: cpu}", "engine.--device: wanted the name without dashes, write 'device'"),
        ("engine: {page_size: 16}", "engine.page_size: wanted SGLang's long name, did you mean 'page-size'?"),
        (
            "engine: {atention-backend: x}",
            "engine.atention-backend: unknown SGLang flag, did you mean 'attention-backend'?",
        ),
        (
            "engine: {port: 30000}",
            "engine.port: is not yours to set: the launcher chooses ports; workers[].port_base sets where they start",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place_what_was_wanted_and_what_was_found(added: str, line: str) -> None:
    assert lines_of(HEAD + added) == (line,)


@pytest.mark.parametrize(
    ("workers", "line"),
    [
        ("[{role: prefill, cout: 2}]", "workers[0].cout: unknown key, did you mean 'count'?"),
        ("[{role: prefill, count: 0}]", "workers[0].count: wanted an integer from 1 to 512, found 0"),
        ("[{role: prefil}]", "workers[0].role: wanted one of prefill, decode, both, found 'prefil'"),
        ("[{count: 1}]", "workers[0].role: wanted one of prefill, decode, both, found nothing"),
        ("[]", "workers: wanted a list with at least one entry, found a list of 0"),
        ("[{role: prefill}]", "workers: wanted prefill and decode workers, or role both; found no decode worker"),
        ("[{role: decode}]", "workers: wanted prefill and decode workers, or role both; found no prefill worker"),
        (
            "[{role: both, engine: {page-size: 1}}]",
            "workers[0].engine.page-size: must be the same for all workers, set it in engine.page-size",
        ),
        (
            "[{role: both, engine: {pag-size: 1}}]",
            "workers[0].engine.pag-size: unknown SGLang flag, did you mean 'page-size'?",
        ),
        ("[{role: both, port_base: 80}]", "workers[0].port_base: wanted an integer from 1024 to 65000, found 80"),
        (
            "[{role: both, port_base: 7998, count: 2}]",
            "workers[0].port_base: wanted 8 free ports in a row up to 65535, found that 8000 is taken or too high",
        ),
    ],
)
def test_a_mistake_in_a_group_of_workers_names_the_group(workers: str, line: str) -> None:
    assert lines_of(f"name: tiny\nmodel: {{path: smollm2}}\nworkers: {workers}") == (line,)


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    assert lines_of("name: Tiny\nworkers: [{role: both, host: 3}]") == (
        "name: wanted text matching ^[a-z0-9][a-z0-9-]{0,39}$, found 'Tiny'",
        "model: wanted a mapping, found nothing",
        "workers[0].host: wanted text, found 3",
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\nmodel: {path: x}\nname: b\n", "line 3: name: wanted once, found again (first on line 1)"),
        ("name: [\n", "line 2: expected the node content, but found '<stream end>'"),
        ("- a\n- b\n", "wanted a mapping with name, model and workers, found a list of 2"),
        ("", "wanted a mapping with name, model and workers, found nothing"),
        (
            "name: !!python/object:os.system {}\n",
            "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        (
            "name: a\nmodel: {path: 2024-13-01}\n",
            "line 2: wanted a valid timestamp, found '2024-13-01'; write it in quotes if it is text",
        ),
        (
            "workers:\n- count: 0x_\n",
            "line 2: wanted a valid int, found '0x_'; write it in quotes if it is text",
        ),
        ("name: !!int ''\n", "line 1: wanted a valid int, found ''; write it in quotes if it is text"),
        ("name: a\nworkers: " + "[" * 5000, "line 2: wanted fewer levels, found too many to read"),
    ],
)
def test_what_is_not_yaml_for_a_cluster_is_one_line(text: str, line: str) -> None:
    assert lines_of(text) == (line,)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml: no such file"):
        read_cluster(tmp_path / "none.yaml")


def test_each_line_of_a_file_on_disk_begins_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: tiny\n")
    with pytest.raises(BadInput) as caught:
        read_cluster(path)
    assert len(caught.value.lines) == 2
    assert all(line.startswith(f"{path}: ") for line in caught.value.lines)


def test_the_router_cannot_be_moved_to_a_port_of_a_worker() -> None:
    config = parse("name: tiny\nmodel: {path: smollm2}\nworkers: [{role: both, port_base: 9000, count: 2}]")
    for port in (9000, 9007):
        with pytest.raises(BadInput) as caught:
            config.with_router_port(port)
        assert caught.value.lines == (
            f"router.port: wanted a port that no worker has, found {port}: workers[0].port_base takes 9000 to 9007",
        )
    assert config.with_router_port(9008).router.port == 9008
    assert config.with_router_port(9008).chosen_ports == frozenset(range(9000, 9009))


def test_several_routers_have_ports_in_a_row_that_no_worker_may_have() -> None:
    workers = "workers: [{role: both, port_base: 9000}]"
    head = "name: tiny\nmodel: {path: smollm2}\n"
    (line,) = lines_of(f"{head}router: {{port: 8998, replicas: 3}}\n{workers}")
    assert line.startswith("workers[0].port_base: wanted 4 free ports in a row up to 65535, found that 9000 is taken")

    config = parse(f"{head}router: {{port: 8990, replicas: 3}}\n{workers}")
    assert config.chosen_ports == {8990, 8991, 8992, 9000, 9001, 9002, 9003}
    with pytest.raises(BadInput) as caught:
        config.with_router_port(8999)
    assert caught.value.lines == (
        "router.port: wanted a port that no worker has, found 9000: workers[0].port_base takes 9000 to 9003",
    )
    with pytest.raises(BadInput, match=r"router\.port: wanted 3 ports up to 65535, found 65534 as the first one"):
        config.with_router_port(65534)
    assert list(config.with_router_port(8991).router.ports) == [8991, 8992, 8993]


def test_fork_is_refused_with_a_gpu_and_says_why() -> None:
    (line,) = lines_of(HEAD + "engine: {device: cuda}\nlaunch: {start: fork}")
    assert line.startswith("launch.start: fork wants engine.device cpu, found 'cuda': ")


def test_one_group_with_a_gpu_is_enough_to_refuse_fork() -> None:
    text = "name: a\nmodel: {path: x}\nengine: {device: cpu}\nworkers: [{role: both, engine: {device: cuda}}]"
    (line,) = lines_of(text + "\nlaunch: {start: fork}")
    assert "found 'cuda'" in line


@pytest.mark.parametrize(("device", "forks"), [("cpu", True), ("cuda", False)])
def test_auto_forks_on_a_cpu_only(device: str, forks: bool) -> None:
    transports = {"cpu": "[shm]", "cuda": "[nvlink]"}[device]
    text = HEAD + f"engine: {{device: {device}}}\ntransfer: {{transports: {transports}}}"
    assert parse(text).forks is forks


def test_spawn_can_be_chosen_on_a_cpu() -> None:
    assert not parse(HEAD + "engine: {device: cpu}\nlaunch: {start: spawn}").forks


def test_a_router_that_everybody_reaches_needs_a_key(tmp_path: Path) -> None:
    (line,) = lines_of(HEAD + "router: {host: 0.0.0.0}")
    assert line == "router.api_key_file: wanted a file, as host '0.0.0.0' is not loopback, found none"

    (tmp_path / "key").write_text("secret\n")
    with_key = HEAD + "router: {host: 0.0.0.0, api_key_file: key}"
    assert parse_cluster(with_key, tmp_path).router.api_key_file == tmp_path / "key"
    (line,) = lines_of(with_key)
    assert line == "router.api_key_file: wanted a file, found none at /nowhere/key"


PAIR = "workers: [{role: prefill}, {role: decode}]\n"


@pytest.mark.parametrize(
    ("device", "transports", "problem"),
    [
        ("cuda", "[nvlink, nixl]", ""),
        ("cpu", "[shm, tcp, nixl]", ""),
        (
            "cuda",
            "[nvlink, shm]",
            "transports[1]: wanted nvlink or nixl, as workers[0] keeps its pages in a GPU's memory",
        ),
        (
            "cpu",
            "[nvlink]",
            "transports[0]: wanted shm or tcp or nixl, as workers[0] keeps its pages in a CPU's memory",
        ),
    ],
)
def test_pages_of_a_gpu_are_moved_by_others_than_those_of_a_cpu(device: str, transports: str, problem: str) -> None:
    text = f"name: a\nmodel: {{path: x}}\n{PAIR}engine: {{device: {device}}}\ntransfer: {{transports: {transports}}}\n"
    if problem:
        (line,) = lines_of(text)
        assert problem in line
    else:
        assert parse(text).transfer.transports


def test_workers_that_do_both_hand_nothing_over() -> None:
    text = "name: a\nmodel: {path: x}\nworkers: [{role: both}]\nengine: {device: cuda}"
    assert parse(text).transfer.transports == ("shm", "tcp")


NIXL = "transfer: {transports: [nixl, tcp], "
OFF_LOOPBACK = "name: tiny\nmodel: {path: smollm2}\nworkers: [{role: prefill}, {role: decode, host: 10.0.0.1}]\n"


def test_nixl_uses_loopback_where_all_workers_do_and_only_trusted_devices_elsewhere() -> None:
    assert parse(HEAD + NIXL + "}").transfer.nixl_devices == ("lo",)
    (line,) = lines_of(OFF_LOOPBACK + NIXL + "}")
    assert line.startswith("transfer.nixl_devices[0]: wanted a device that is in transfer.trusted_devices, found 'lo'")
    devices = "nixl_devices: [eth1, 'mlx5_0:1']"
    (line,) = lines_of(OFF_LOOPBACK + NIXL + devices + ", trusted_devices: [eth1]}")
    assert line.startswith("transfer.nixl_devices[1]: ")
    trusted = parse(OFF_LOOPBACK + NIXL + devices + ", trusted_devices: ['mlx5_0:1', eth1]}")
    assert trusted.transfer.nixl_devices == ("eth1", "mlx5_0:1")
    # Without nixl nothing listens there.
    assert parse(OFF_LOOPBACK + "transfer: {transports: [tcp]}").transfer.transports == ("tcp",)


@pytest.mark.parametrize("flag", RANK_FLAGS)
def test_a_worker_that_hands_over_has_one_rank_and_one_that_does_both_may_have_more(flag: str) -> None:
    alone = "name: tiny\nmodel: {path: smollm2}\nworkers: [{role: both, engine: {%s: 2}}]"
    (line,) = lines_of(HEAD.replace("{role: decode}", f"{{role: decode, engine: {{{flag}: 2}}}}"))
    assert line.startswith(f"workers[1].engine.{flag}: wanted 1 with the roles prefill and decode, found 2: ")
    assert parse(HEAD + f"engine: {{{flag}: 1}}").engine == {flag: 1}
    assert parse(alone % flag).workers[0].engine == {flag: 2}


def test_the_page_size_is_sixteen_unless_the_engine_is_told_otherwise() -> None:
    assert parse(HEAD).page_tokens == 16
    assert parse(HEAD + "engine: {page-size: 64}").page_tokens == 64


def test_numbers_in_the_environment_become_text() -> None:
    assert parse(HEAD + "environment: {OMP_NUM_THREADS: 1}").environment == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("flag", sorted(OWNED))
def test_each_flag_that_the_launcher_owns_is_refused_with_a_reason(flag: str) -> None:
    (line,) = lines_of(HEAD + f"engine: {{{flag}: 1}}")
    assert line == f"engine.{flag}: is not yours to set: {OWNED[flag]}"


def test_flags_become_the_words_of_a_command_line() -> None:
    flags: dict[str, FlagValue] = {
        "device": "cpu",
        "page-size": 16,
        "enable-metrics": True,
        "sleep-on-idle": False,
        "cuda-graph-bs": [1, 2],
    }
    assert arguments(flags) == ("--device", "cpu", "--page-size", "16", "--enable-metrics", "--cuda-graph-bs", "1", "2")


def test_the_installed_sglang_is_read_for_its_flags() -> None:
    known = known_flags()
    assert {"page-size", "disable-overlap-schedule", "tensor-parallel-size", "tool-call-parser"} <= known
    assert OWNED.keys() <= known  # a flag that SGLang dropped needs no protection


def test_flags_are_found_as_fields_aliases_and_options_added_by_hand() -> None:
    source = """
class ServerArgs:
    tp_size: A[int, Arg(help="...", aliases=["--tensor-parallel-size"])] = 1
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--config", type=str)
"""
    assert parse_flags(source) == {"tp-size", "tensor-parallel-size", "config"}
    assert parse_flags("class Other: pass") == frozenset()
