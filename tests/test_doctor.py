"""``edge doctor``: what it says of this machine and of made-up ones; quotas of the CPUs, and threads that heed them."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edge.budget import disk, machine, nvml, rates
from edge.budget.disk import DiskSpeed, Reads, Unmeasured
from edge.budget.quota import Quota, cpu_quota
from edge.budget.rates import Rates
from edge.cli import doctor
from edge.engine import threads
from edge.engine.native import library
from edge.profile import cpu, facts
from edge.profile.advice import advice
from edge.store.cache import recall
from tests.command import Cli, cli_fixture, environment, refused  # noqa: F401

SPEED = DiskSpeed(
    "/x", disk.DIRECT, 8 << 20, 2e9, Reads(9e3, 1.1e-4), Reads(8e3, 1.2e-4), Reads(3e4, 3e-4), Reads(2e4, 4e-4)
)
Asked = list[str]


@pytest.fixture(name="asked")
def asked_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Measurements at no cost, by what was asked for; a cache of its own."""
    asked: Asked = []

    def bandwidth(count: int | None = None) -> float:
        asked.append("memory")
        return 12.5e9

    def speed(place: Path) -> DiskSpeed:
        asked.append("disk")
        return SPEED

    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "measured_bandwidth", bandwidth)
    monkeypatch.setattr(disk, "measured", speed)
    return asked


@pytest.fixture(name="usual")
def usual_fixture(asked: Asked) -> dict[str, Any]:
    """Facts of a machine with nothing wrong."""
    found = facts.machine_facts(measure=True)
    cores = {"physical_cores": 8, "logical_cores": 16, "usable_cores": 16, "threads": 8}
    found["cpu"] |= {**cores, "quota_cores": None, "threads_named": None, "clock": None, "vector": "avx2"}
    found["memory"] |= {"total_bytes": 32 * 10**9, "huge_pages": "madvise"}
    found |= {"limits": [], "gpus": []}
    found["engines"]["native"] = {"available": True, "why": None, "version": "1", "devices": ["cpu"], "streams": {}}
    found["system"] |= {"power": None, "virtual_machine": None}
    assert advice(found) == []
    return found


# The command


def test_json_is_one_object_of_what_this_machine_is(cli: Cli, asked: Asked) -> None:
    done = cli("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert list(found) == [
        *("cpu", "memory", "limits", "disk", "disk_why", "bandwidth_gbps", "gpus"),
        *("engines", "energy", "system", "advice"),
    ]
    assert found["bandwidth_gbps"] == 12.5
    assert (found["disk"]["one_4k"], found["disk_why"]) == ({"per_second": 9e3, "p50_s": 1.1e-4}, None)
    assert found["cpu"]["threads"] == threads.thread_count()
    assert found["cpu"]["vector"] == library.isas()[0]
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert set(found["engines"]) == {"native", "torch", "ort"}
    for engine in found["engines"].values():
        assert set(engine) == {"available", "why", "version", "devices", "streams"}
        assert engine["available"] is (engine["why"] is None) is ("cpu" in engine["devices"])
    assert (found["energy"]["source"] is None) is (found["energy"]["why"] is not None)
    assert asked == ["memory", "disk"]


def test_it_measures_once_or_when_told_to(cli: Cli, asked: Asked) -> None:
    bare = cli("doctor", "--no-measure", "--json").json
    assert (bare["disk"], bare["bandwidth_gbps"], asked) == (None, None, [])
    assert bare["disk_why"].endswith("not measured yet")
    assert "not measured" in cli("doctor", "--no-measure").out
    for _ in range(2):
        assert cli("doctor").code == 0
    assert asked == ["memory", "disk"]
    known = cli("doctor", "--no-measure", "--json").json
    assert (known["bandwidth_gbps"], known["disk"]["sequential"]) == (12.5, 2e9)
    assert cli("doctor", "--fresh").code == 0
    assert asked == ["memory", "disk"] * 2
    refused(cli("doctor", "--fresh", "--no-measure"), 2, "--fresh", "--no-measure")


def test_a_remembered_file_of_nonsense_stops_nothing(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / machine.FILE
    kept.parent.mkdir()
    own = (disk.key(tmp_path), machine.bandwidth_key(threads.thread_count()))
    for value in (None, [], "x", 5, True, {"bytes_per_s": 1e400, "at": 1.0}, {"at": {}, "path": ["\ud800"]}):
        kept.write_text(json.dumps(dict.fromkeys(own, value)))
        done = cli("doctor", "--json", "--no-measure")
        assert (done.code, done.json["disk"], done.json["bandwidth_gbps"]) == (0, None, None)
    assert cli("doctor", "--json").json["disk"] is not None
    assert set(own) <= set(recall(machine.FILE))


def test_a_disk_that_cannot_be_measured_is_said_and_no_error(
    cli: Cli, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path) -> DiskSpeed:
        raise Unmeasured("less than 32 MiB are free", file="/some\x1b[2J/place")

    monkeypatch.setattr(disk, "measured", full)
    done = cli("doctor")
    assert done.code == 0
    assert "less than 32 MiB are free" in done.out
    assert "\x1b" not in done.out
    assert cli("doctor", "--json").json["disk"] is None


def test_it_imports_no_engine(tmp_path: Path) -> None:
    script = (
        "import sys; from edge.cli.app import run_app; code = run_app(['doctor', '--no-measure']); "
        "from edge.profile.facts import brief, versions; brief(); versions(); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules]); sys.exit(code)"
    )
    env = environment(EDGE_CACHE=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_nothing_is_cut_on_a_terminal(usual: dict[str, Any], width: int) -> None:
    usual["gpus"] = [
        {"index": 0, "name": "A GPU", "driver": "580.1", "memory_bytes": 8 * 10**9, "used_bytes": None, "hidden": False}
    ]
    usual["advice"] = ["word " * 40 + "end", "[bold]as it is[/bold]"]
    usual["limits"] = [
        {"limit_bytes": 2 * 10**9, "used_bytes": 10**9, "source": "cgroup v2, /sys/fs/cgroup/memory.max"}
    ]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    doctor.show(usual, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    whole = " ".join(" ".join(line.split()) for line in lines)
    for words in (
        "8 cores, 16 CPUs: edge computes with 8 threads",
        "8 threads read 12.5 GB/s",
        "2.00 GB/s in order",
        "4 KB: 9,000/s, 0.11 ms each; 8 at once: 30,000/s, 0.3 ms each",
        "A GPU, 8.00 GB, driver 580.1",
        "limit: 2.00 GB, 1.00 GB used (cgroup v2, /sys/fs/cgroup/memory.max)",
        "word end",
        "[bold]as it is[/bold]",
    ):
        assert words in whole
    assert "…" not in text


def test_a_machine_that_knows_little_is_shown(usual: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """None wherever a system may not tell."""
    missing = {
        "available": False,
        "why": "not installed: pip install it",
        "version": None,
        "devices": [],
        "streams": {},
    }
    usual |= {"disk": None, "disk_why": "no disk", "bandwidth_gbps": None}
    usual["engines"] = dict.fromkeys(("native", "torch", "ort"), missing)
    usual["cpu"] |= {"physical_cores": None, "flags": [], "kernels": []}
    usual["memory"] |= {"huge_pages": None, "swap_bytes": 0}
    usual["gpus"] = [{"name": "unknown", "driver": "unknown", "memory_bytes": None, "used_bytes": None, "hidden": True}]
    usual["advice"] = advice(usual)
    doctor.show(usual, Console(width=160))
    out = capsys.readouterr().out
    assert out.count("missing: not installed: pip install it") == 3
    assert "memory unknown" in out
    assert "None" not in out


# Advice


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("memory.huge_pages", "never", "about a fifth slower"),
        ("cpu.quota_cores", 1.5, "a CPU quota of 1.5 cores (cgroup v2, cpu.max): edge computes with 8 threads"),
        ("cpu.usable_cores", 4, "4 of 16 CPUs"),
        ("cpu.vector", "any", "portable ones"),
        ("cpu.clock", {"governor": "powersave", "driver": "acpi-cpufreq"}, "governor is powersave"),
        ("cpu.clock", {"governor": "powersave", "preference": "power"}, "preference is power"),
        ("cpu.clock", {"governor": "performance", "allowed_mhz": 1500}, "1500 of 3000 MHz"),
        ("system.power", "battery", "on battery"),
        ("engines.native.available", False, "no native engine: it was not compiled"),
        ("limits", [{"limit_bytes": 2 * 10**9, "source": "cgroup v2, m"}], "a memory limit of 2.00 GB (cgroup v2, m)"),
        ("limits", [{"limit_bytes": 2 * 10**9, "source": "ulimit -v"}], "mapped count in full"),
        ("gpus", [{"hidden": True}], "CUDA_VISIBLE_DEVICES hides"),
        ("gpus", [{"hidden": False}], "built without CUDA"),
        ("engines.torch.available", False, "no torch to use it"),
        ("disk.one_4k.p50_s", 0.012, "a slow disk, 12.0 ms a read"),
    ],
)
def test_what_holds_a_machine_back_is_one_line(usual: dict[str, Any], path: str, value: Any, words: str) -> None:
    clock = {"governor": "", "driver": "intel_pstate", "preference": None, "allowed_mhz": 3000, "most_mhz": 3000}
    usual["cpu"]["quota_source"] = "cgroup v2, cpu.max"
    usual["engines"]["native"]["why"] = "it was not compiled when edge was installed"
    usual["engines"]["torch"] |= {"available": True, "devices": ["cpu"]}
    if path == "engines.torch.available":
        usual["gpus"] = [{"hidden": False}]
    *folders, name = path.split(".")
    place = usual
    for folder in folders:
        place = place[folder]
    place[name] = {**clock, **value} if name == "clock" else value
    found = advice(usual)
    assert len(found) == 1
    assert words in found[0]
    assert "\n" not in found[0]


def test_what_holds_nothing_back_is_not_mentioned(usual: dict[str, Any]) -> None:
    """intel_pstate calls powersave what others call ondemand; limits above the memory there is limit nothing."""
    clock = {"governor": "powersave", "driver": "intel_pstate", "preference": "balance_performance"}
    usual["cpu"]["clock"] = {**clock, "allowed_mhz": 4000, "most_mhz": None}
    usual["cpu"] |= {"quota_cores": 64.0, "threads_named": "8"}
    usual["limits"] = [{"limit_bytes": 10**15, "source": "cgroup v1, x"}]
    usual["gpus"], usual["engines"]["torch"]["devices"] = [{"hidden": False}], ["cpu", "cuda"]
    usual["memory"]["huge_pages"] = None
    usual |= {"disk": None, "disk_why": "no room"}
    assert advice(usual) == []


def test_threads_that_the_environment_takes_away_are_said(usual: dict[str, Any]) -> None:
    usual["cpu"] |= {"threads": 1, "threads_named": "1"}
    (line,) = advice(usual)
    assert "edge computes with 1 thread, and there are 8 cores" in line


def test_how_fast_an_engine_was_measured_to_be_is_shown(
    cli: Cli, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_opened", lambda: (None, "it was not compiled"))
    found = {("ort", "cpu"): Rates({"int8": 0.5, "float32": 0.875})}
    monkeypatch.setattr(rates, "known", lambda engine, device: found.get((engine, device)))
    engines = cli("doctor", "--json").json["engines"]
    assert engines["ort"]["streams"] == {"cpu": {"int8": 0.5, "float32": 0.875}}
    assert engines["torch"]["streams"] == engines["native"]["streams"] == {}
    assert "decoding on cpu streams int8 at 50%, float32 at 88% of the speed of memory" in cli("doctor").out


# Facts of made-up machines


def test_a_processor_is_named_by_whoever_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name\t: Some CPU @ 2GHz\nflags : fpu avx2 fma amx_int8\n\nmodel name : Other\n"
    )
    assert (cpu.cpu_name(tmp_path), cpu.flags(tmp_path)) == ("Some CPU @ 2GHz", ["fma", "avx2", "amx_int8"])
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd42\n")
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_bytes(b"Jetson\0")
    assert (cpu.cpu_name(tmp_path), cpu.flags(tmp_path)) == ("Cortex-A78AE (Jetson)", ["asimd", "asimddp", "i8mm"])
    info.write_bytes(b"\xff\xfe:\0:::\n\n" * 99)
    assert cpu.cpu_name(tmp_path) == "Jetson"
    assert (cpu.flags(tmp_path), cpu.hypervisor(tmp_path, tmp_path)) == ([], None)
    assert cpu.cpu_name(tmp_path / "missing")
    info.write_text("flags : hypervisor\n")
    assert cpu.hypervisor(tmp_path, tmp_path) == "unknown"


def test_a_clock_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    assert cpu.frequency(tmp_path) is None
    folder = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("powersave\n")
    (folder / "cpuinfo_max_freq").write_text("-1\n")
    found = cpu.frequency(tmp_path)
    assert found == {"governor": "powersave", "driver": None, "preference": None, "allowed_mhz": None, "most_mhz": None}
    assert cpu.held_back(found) is not None
    (folder / "scaling_governor").unlink()
    (folder / "scaling_governor").mkdir()
    assert cpu.frequency(tmp_path) is None


def test_power_comes_from_the_machines_own_battery(tmp_path: Path) -> None:
    assert cpu.power(tmp_path) is None
    battery = tmp_path / "class" / "power_supply" / "BAT1"
    battery.mkdir(parents=True)
    assert cpu.power(tmp_path) == "mains"
    (battery / "status").write_text("Discharging\n")
    assert cpu.power(tmp_path) == "battery"
    (battery / "scope").write_text("Device\n")
    assert cpu.power(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("always [madvise] never\n", "madvise"), ("always madvise [never]", "never"), ("[]", ""), ("x", None), ("", None)],
)
def test_large_pages_are_those_in_brackets(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "enabled").write_text(text)
    assert facts.huge_pages(tmp_path / "enabled") == found
    assert facts.huge_pages(tmp_path) is None


def test_limits_of_control_groups_come_with_their_source(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "job").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/job\n")
    (proc / "self" / "mountinfo").write_text("1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    for folder, most in ((groups / "job", 2 << 30), (groups, "max")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("4096\n")
    (first, *rest) = facts.limits(str(proc), str(groups))
    assert first["limit_bytes"] == 2 << 30
    assert first["source"].startswith("cgroup v2, ")
    assert all(limit["source"].startswith("ulimit") for limit in rest)


def test_a_partition_reads_ahead_as_its_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "devices" / "sda"
    (whole / "queue").mkdir(parents=True)
    (whole / "queue" / "read_ahead_kb").write_text("128\n")
    (whole / "sda1").mkdir()
    (whole / "sda1" / "uevent").write_text("MAJOR=8\nDEVNAME=sda1\n")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    number = tmp_path.stat().st_dev
    name = f"{facts.os.major(number)}:{facts.os.minor(number)}"
    assert facts.block_device(tmp_path, tmp_path) == {"device": None, "read_ahead_kb": None}
    (tmp_path / "dev" / "block" / name).symlink_to(whole / "sda1")
    assert facts.block_device(tmp_path, tmp_path) == {"device": "sda1", "read_ahead_kb": 128}


def test_engines_that_are_not_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_opened", lambda: (None, "it was not compiled"))
    monkeypatch.setattr(facts, "installed", lambda: False)
    monkeypatch.setattr(facts, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert facts.native()["why"] == "it was not compiled"
    assert facts.torch() == {
        "available": False,
        "why": "not installed: pip install torch",
        "version": None,
        "devices": [],
    }
    assert facts.ort()["why"] == "not installed: pip install onnxruntime"
    assert facts.vector()
    assert facts.cpu_facts()["kernels"] == []


def test_torch_computes_on_a_gpu_if_it_was_built_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        origin = str(tmp_path / "torch" / "__init__.py")

    monkeypatch.setattr(facts, "find_spec", lambda name: Spec)
    monkeypatch.setattr(facts, "has_gpu", lambda: True)
    monkeypatch.setattr(facts.sys, "platform", "linux")
    assert facts.torch()["devices"] == ["cpu"]
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert facts.torch()["devices"] == ["cpu", "cuda"]


def test_a_line_of_results_names_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts.brief()
    assert list(found) == ["cpu", "cores", "threads", "memory_bytes", "vector", "gpu", "system"]
    assert type(found["cores"]) is type(found["threads"]) is type(found["memory_bytes"]) is int
    monkeypatch.setattr(nvml, "gpus", lambda: [nvml.Gpu(0, "A\x1bGPU", "1", 8, 1)])
    monkeypatch.setattr(facts, "has_gpu", lambda: True)
    assert facts.brief()["gpu"] == "A\\x1bGPU"
    monkeypatch.setattr(facts, "has_gpu", lambda: False)
    assert facts.brief()["gpu"] is None


def test_the_commit_is_edges_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts.versions()
    assert list(found) == ["edge", "commit", "python", "numpy", "onnxruntime", "torch"]
    monkeypatch.setattr(facts.edge, "__file__", str(tmp_path / "edge" / "__init__.py"))
    assert facts.commit() is None
    (tmp_path / ".git").mkdir()
    assert facts.commit() is None
    monkeypatch.setenv("PATH", "")
    assert facts.commit() is None


# Quotas


Group = Callable[..., tuple[str, str]]


@pytest.fixture(name="group")
def group_fixture(tmp_path: Path) -> Group:
    """A fake /proc and /sys/fs/cgroup: folder -> lines of its files."""

    def group(own: str, mount: str, files: dict[str, str]) -> tuple[str, str]:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(own)
        (tmp_path / "proc" / "self" / "mountinfo").write_text(mount)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "proc"), str(tmp_path / "cgroup")

    return group


V2 = "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "1 0 0:1 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def test_the_smallest_quota_rules(group: Group, tmp_path: Path) -> None:
    files = {"cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "a/b/cpu.max": "400000 100000\n"}
    found = cpu_quota(*group("0::/a/b\n", V2, files))
    assert found == Quota(1.5, f"cgroup v2, {tmp_path}/cgroup/a/cpu.max")


def test_quotas_of_the_first_version_have_files_of_their_own(group: Group, tmp_path: Path) -> None:
    folder = "cpu,cpuacct"
    files = {
        f"{folder}/cpu.cfs_quota_us": "-1\n",
        f"{folder}/job/cpu.cfs_quota_us": "50000\n",
        f"{folder}/job/cpu.cfs_period_us": "100000\n",
    }
    found = cpu_quota(*group("5:cpu,cpuacct:/job\n4:memory:/other\n0::/\n", V1, files))
    assert found == Quota(0.5, f"cgroup v1, {tmp_path}/cgroup/{folder}/job/cpu.cfs_quota_us")


def test_without_a_quota_there_is_none(group: Group, tmp_path: Path) -> None:
    assert cpu_quota(str(tmp_path), str(tmp_path)) is None
    assert cpu_quota(*group("0::/gone\n", V2 + V1 + "x - y\n", {"cpu.max": "max 100000\n"})) is None


@given(st.text(max_size=20), st.sampled_from(["cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"]))
def test_nonsense_is_no_quota(text: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge.budget.quota.text", lambda path: text if path.name == name else "100000 100000")
        from edge.budget import quota

        for found in (quota.of_v1(Path("x")), quota.of_v2(Path("x"))):
            assert found is None or found.cores > 0


@pytest.mark.parametrize(
    ("cores", "count"), [(None, 4), (64.0, 4), (4.0, 4), (2.5, 2), (1.95, 2), (1.5, 1), (1.0, 1), (0.2, 1), (1e-9, 1)]
)
def test_threads_are_as_many_as_a_quota_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, cores: float | None, count: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "usable_cpus", lambda: {0, 1, 2, 3, 4})
    monkeypatch.setattr(threads, "siblings", lambda number: str(number // 2 * 2) if number < 2 else str(number))
    monkeypatch.setattr(threads, "quota", lambda: None if cores is None else Quota(cores, "x"))
    assert threads.thread_count() == count
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.thread_count() == 3, "what somebody says goes"


def test_facts_are_plain_data(usual: dict[str, Any]) -> None:
    assert json.loads(json.dumps(usual, allow_nan=False)) == copy.deepcopy(usual)
