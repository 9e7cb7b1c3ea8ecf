"""What the kernel says about memory, read from the real one and from fake trees; the ledger; glibc's allocator."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.budget import memory
from edge.budget.cgroup import cgroup_levels
from edge.budget.memory import Ledger, Limit, ProcessMemory, cgroup_limit, read_process
from loaders.errors import OverBudget

MIB = 2**20
REPO = Path(__file__).parents[1]
V1_UNLIMITED = 9223372036854771712


def child(code, *args):
    """Runs ``code`` in a fresh interpreter; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", "import json, os, sys\nfrom edge.budget.memory import *\n" + code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_adds_up():
    own = read_process()
    assert abs(own.rss - read_process(os.getpid()).rss) < 4 * MIB
    assert own.rss == own.anonymous + own.file_backed + own.shared
    assert 0 < own.rss <= own.peak_rss
    assert abs(own.rss - psutil.Process().memory_info().rss) < 4 * MIB


def test_peak_is_the_childs_own():
    ballast = bytearray(b"x") * (256 * MIB)
    code = """
before = read_process()
block = bytearray(b"x") * (64 << 20)
held = read_process()
del block
after = read_process()
print(json.dumps([[m.rss, m.peak_rss, m.anonymous] for m in (before, held, after)]))
"""
    before, held, after = child(code)
    assert len(ballast) == 256 * MIB
    assert 60 * MIB < held[1] - before[1] < 72 * MIB
    assert 60 * MIB < held[2] - before[2] < 72 * MIB
    assert after[1] > held[1] - 2 * MIB, "the peak stays when the memory goes, but the kernel's counter is not exact"
    assert after[0] < held[0] - 60 * MIB
    assert after[1] < 200 * MIB, "nothing of the parent's 256 MiB"


def test_a_mapped_file_counts_as_file_backed(tmp_path):
    file = tmp_path / "table"
    file.write_bytes(b"x" * (16 * MIB))
    code = """
import mmap
before = read_process()
with open(sys.argv[1], "rb") as f:
    pages = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
total = sum(pages[i] for i in range(0, len(pages), 4096))
after = read_process()
kinds = [after.file_backed - before.file_backed, after.shared - before.shared, after.anonymous - before.anonymous]
print(json.dumps(kinds))
"""
    file_backed, shared, anonymous = child(code, file)
    # A temporary folder in RAM (tmpfs) shows as shared.
    assert 15 * MIB < file_backed + shared < 20 * MIB
    assert anonymous < 4 * MIB


def test_reset_peak_forgets_what_is_gone():
    code = """
block = bytearray(b"x") * (64 << 20)
del block
high = read_process().peak_rss
done = reset_peak()
print(json.dumps([done, high, read_process().peak_rss]))
"""
    done, high, low = child(code)
    assert done is True
    assert low < high - 56 * MIB


def test_pss_counts_private_memory_in_full():
    code = """
before = read_pss()
block = bytearray(b"x") * (32 << 20)
print(json.dumps([before, read_pss(), read_process().rss]))
"""
    before, after, rss = child(code)
    assert 30 * MIB < after - before < 36 * MIB
    assert after <= rss + 2 * MIB
    assert memory.read_pss(os.getpid()) > 0


def test_tree_peak_adds_the_living_children():
    code = """
import subprocess
alone = tree_peak()
work = "b = bytearray(b'x') * (48 << 20); print(1, flush=True); input()"
both = [subprocess.Popen([sys.executable, "-c", work], stdin=-1, stdout=-1) for _ in range(2)]
for one in both:
    one.stdout.readline()
together = tree_peak()
of_one = tree_peak(both[0].pid)
for one in both:
    one.communicate(b"\\n")
print(json.dumps([alone, together, of_one, tree_peak()]))
"""
    alone, together, of_one, afterwards = child(code)
    assert together - alone > 96 * MIB
    assert 48 * MIB < of_one < together - 48 * MIB
    assert afterwards < alone + 8 * MIB


def test_a_process_that_is_not_there():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for reader in (read_process, memory.tree_peak):
        with pytest.raises(ProcessLookupError, match=str(gone.pid)):
            reader(gone.pid)
    assert memory.read_pss(gone.pid) is None


def test_a_zombie_has_no_memory():
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert read_process(zombie.pid) == ProcessMemory(0, 0, 0, 0, 0, 0)
    finally:
        zombie.wait()


def test_without_proc_psutil_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", str(tmp_path))
    found = read_process()
    assert found.peak_rss == found.rss == found.anonymous
    assert abs(found.rss - psutil.Process().memory_info().rss) < 4 * MIB
    assert memory.read_pss() is None
    assert memory.reset_peak() is False
    assert memory.tree_peak() >= found.rss - 4 * MIB
    with pytest.raises(ProcessLookupError):
        read_process(2**22 + 1)


# --- control groups --------------------------------------------------------------------------------------------------


class Tree:
    """A fake /proc and /sys/fs/cgroup."""

    def __init__(self, root):
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        (self.proc / "self" / "mountinfo").write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw\n")
        (self.proc / "self" / "cgroup").write_text("")

    @property
    def roots(self):
        return str(self.proc), str(self.cgroups)

    def mount_v1(self, path, *, root="/", at="/sys/fs/cgroup/memory"):
        self._mount(f"35 31 0:32 {root} {at} rw,nosuid shared:9 master:3 - cgroup cgroup rw,memory", f"4:memory:{path}")
        return self

    def mount_v2(self, path, *, root="/", at="/sys/fs/cgroup"):
        self._mount(f"30 23 0:26 {root} {at} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate", f"0::{path}")
        return self

    def _mount(self, info, own):
        for name, line in (("mountinfo", info), ("cgroup", own)):
            with (self.proc / "self" / name).open("a") as f:
                f.write(line + "\n")

    def v1(self, folder, limit, usage, **stat):
        return self._files(f"memory{folder}", {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage}, stat)

    def v2(self, folder, limit, usage, high="max", **stat):
        files = {"memory.max": limit, "memory.current": usage, "memory.high": high}
        return self._files(folder.strip("/"), files, stat)

    def _files(self, folder, files, stat):
        where = self.cgroups / folder
        where.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (where / name).write_text(f"{value}\n")
        (where / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))
        return self

    def found(self):
        limit = cgroup_limit(*self.roots)
        return limit and (limit.limit_bytes, limit.used_bytes)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_v1(tree):
    tree.mount_v1("/job").v1("", V1_UNLIMITED, 900).v1("/job", 500, 300, total_active_file=20, total_inactive_file=50)
    assert cgroup_limit(*tree.roots) == Limit(
        500, 230, f"cgroup v1, {tree.cgroups / 'memory' / 'job' / 'memory.limit_in_bytes'}"
    )


def test_v1_sentinels_are_no_limit(tree):
    tree.mount_v1("/job").v1("", 2**63 - 65536, 900).v1("/job", V1_UNLIMITED, 300)
    assert tree.found() == (None, 300)
    assert memory.available_memory(*tree.roots)[1] == "that are free"


def test_v2(tree):
    tree.mount_v2("/job").v2("/job", 500, 300, active_file=20, inactive_file=50)
    assert cgroup_limit(*tree.roots) == Limit(500, 230, f"cgroup v2, {tree.cgroups / 'job' / 'memory.max'}")


def test_v2_max_is_no_limit(tree):
    tree.mount_v2("/job").v2("/job", "max", 300)
    assert tree.found() == (None, 300)


def test_v2_root_has_no_memory_files(tree):
    tree.mount_v2("/")
    assert tree.found() is None


def test_v2_high_rules_where_it_is_lower(tree):
    tree.mount_v2("/job").v2("/job", 500, 300, high=400)
    limit = cgroup_limit(*tree.roots)
    assert (limit.limit_bytes, Path(limit.source).name) == (400, "memory.high")
    tree.v2("/job", 500, 300, high=600)
    assert tree.found() == (500, 300)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("limits", "found"), [((900, 500, 700), 500), ((400, 500, 700), 400), ((900, 500, 300), 300)])
def test_nested_the_smallest_limit_rules(tree, version, limits, found):
    (tree.mount_v1 if version == 1 else tree.mount_v2)("/a/b/c")
    write = tree.v1 if version == 1 else tree.v2
    for folder, limit in zip(("/a", "/a/b", "/a/b/c"), limits, strict=True):
        write(folder, limit, 100)
    assert tree.found() == (found, 100)
    assert len(cgroup_levels(*tree.roots)) == 3


def test_of_equal_limits_the_outer_one_rules(tree):
    tree.mount_v1("/a/b").v1("/a", 500, 450).v1("/a/b", V1_UNLIMITED, 10, hierarchical_memory_limit=500)
    assert tree.found() == (500, 450)


def test_v1_limit_of_a_parent_that_is_not_visible(tree):
    tree.mount_v1("/pod/c", root="/pod/c").v1("", V1_UNLIMITED, 40, hierarchical_memory_limit=500)
    assert tree.found() == (500, 40)


def test_a_neighbour_that_fills_the_parent_leaves_less(tree):
    tree.mount_v2("/a/b").v2("/a", 10 * MIB, 9 * MIB).v2("/a/b", 4 * MIB, MIB)
    assert tree.found() == (4 * MIB, MIB)
    free, phrase = memory.available_memory(*tree.roots)
    assert free == MIB
    assert phrase.startswith("that the limit of 10.5 MB leaves (cgroup v2, ")


def test_hybrid_the_memory_controller_is_in_v1(tree):
    (tree.cgroups / "unified" / "job").mkdir(parents=True)
    tree.mount_v1("/job").mount_v2("/other", at="/sys/fs/cgroup/unified").v1("/job", 500, 300)
    assert tree.found() == (500, 300)


def test_hybrid_the_memory_controller_is_in_v2(tree):
    (tree.proc / "self" / "mountinfo").write_text("36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n")
    tree.mount_v2("/job", at="/sys/fs/cgroup/unified").v2("/unified/job", 500, 300)
    assert tree.found() == (500, 300)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere", "/", "/gone (deleted)"])
def test_container_that_does_not_see_its_own_path(tree, path):
    tree.mount_v1(path).v1("", 500, 300)
    tree._files("", {"memory.limit_in_bytes": 100}, {})  # beside the mount: nothing above it may be read
    assert tree.found() == (500, 300)


def test_container_whose_mount_shows_its_own_group(tree):
    tree.mount_v1("/docker/0123/job", root="/docker/0123").v1("", 500, 300).v1("/job", 400, 200)
    assert tree.found() == (400, 200)


def test_container_in_a_group_unrelated_to_the_mount(tree):
    tree.mount_v2("/system/ssh", root="/docker/0123").v2("/", 500, 300)
    assert tree.found() == (500, 300)


def test_mount_elsewhere_with_a_space_in_its_name(tree, tmp_path):
    tree.mount_v1("/", at=str(tmp_path / "my groups").replace(" ", r"\040"))
    tree._files("../my groups", {"memory.limit_in_bytes": 500, "memory.usage_in_bytes": 300}, {})
    assert tree.found() == (500, 300)


@pytest.mark.parametrize("text", ["", "\n", "a b c\n", "1 2 3 / /x rw -\n", "\0\0 - cgroup2 x y\n", "é\\777 - \n"])
def test_nonsense_is_no_limit(tree, text):
    (tree.proc / "self" / "mountinfo").write_text(text)
    (tree.proc / "self" / "cgroup").write_text(text)
    assert tree.found() is None


@pytest.mark.parametrize("value", ["", "lots", "-1", "1.5", "٣", "9" * 5000])
def test_nonsense_in_a_limit_is_no_limit(tree, value):
    tree.mount_v2("/job").v2("/job", value, 300)
    assert tree.found() == (None, 300)


def test_no_proc_no_limit(tmp_path):
    assert cgroup_limit(str(tmp_path / "none"), str(tmp_path)) is None


def test_file_pages_never_make_use_negative(tree):
    tree.mount_v2("/job").v2("/job", 500, 300, active_file=400)
    assert tree.found() == (500, 0)


def test_default_budget_says_what_it_takes(tree):
    tree.mount_v2("/job").v2("/job", 100 * 10**6, 20 * 10**6)
    budget, phrase = memory.default_budget(*tree.roots)
    assert budget == 64 * 10**6
    assert phrase.startswith("no --budget: 4/5 of the 80.0 MB that the limit of 100 MB leaves (cgroup v2, ")
    tree.v2("/job", "max", 300)
    budget, phrase = memory.default_budget(*tree.roots)
    assert phrase.endswith("B that are free")
    assert 0 < budget < psutil.virtual_memory().total


def test_an_exceeded_limit_leaves_nothing(tree):
    tree.mount_v2("/job").v2("/job", 500, 600)
    assert memory.available_memory(*tree.roots)[0] == 0


def test_this_machine():
    budget, phrase = memory.default_budget()
    assert 0 <= budget <= psutil.virtual_memory().total
    assert phrase.startswith("no --budget: 4/5 of the ")


@contextlib.contextmanager
def box(limit, tmp_path):
    """Arguments for ``IN_BOX``: a control group with a hard limit, or a fake one where none can be made."""
    fake = Tree(tmp_path)
    fake.mount_v1("/box").v1("/box", limit, MIB)
    own = [
        Path(level.source.split(", ")[1]).parent for level in cgroup_levels() if level.source.startswith("cgroup v1")
    ]
    made = own[0] / f"edge-test-{os.getpid()}" if own else None
    try:
        if made is not None:
            made.mkdir()
            (made / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        remove(made)
        made = None
    try:
        yield ["/proc", "/sys/fs/cgroup", made / "cgroup.procs"] if made else [*fake.roots, os.devnull]
    finally:
        remove(made)


def remove(group):
    for _ in range(100):
        if group is None or not group.is_dir():
            return
        with contextlib.suppress(OSError):  # busy until the kernel has let go of the last process
            group.rmdir()
        time.sleep(0.02)
    raise AssertionError(f"{group} is still there")


IN_BOX = """
with open(sys.argv[3], "w") as f:
    f.write(str(os.getpid()))
limit = cgroup_limit(*sys.argv[1:3])
block = bytearray(b"x") * (8 << 20)
print(json.dumps([limit.limit_bytes, limit.used_bytes, limit.source, *available_memory(*sys.argv[1:3])]))
"""


def test_a_process_in_a_real_group_sees_its_limit(tmp_path):
    with box(100 * 10**6, tmp_path) as roots:
        limit, used, source, free, phrase = child(IN_BOX, *roots)
    assert 100 * 10**6 - os.sysconf("SC_PAGE_SIZE") < limit <= 100 * 10**6, "the kernel rounds down to pages"
    assert 0 <= used < 20 * MIB
    assert 60 * 10**6 < free < 100 * 10**6
    assert "cgroup v1" in source
    assert phrase == f"that the limit of 100 MB leaves ({source})"


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_ledger_allows_the_plan_and_its_slack():
    ledger = Ledger(10**9, {"kv": 100 * MIB, "small": 10})
    ledger.take("kv", 105 * MIB)
    ledger.take("small", 10 + MIB)
    with pytest.raises(
        OverBudget, match=r"^kv: would hold 110 MB \(expected at most the planned 105 MB\)\. "
    ) as caught:
        ledger.take("kv", 1)
    assert caught.value.exit_code == 81
    with pytest.raises(OverBudget, match=r"^small: "):
        ledger.take("small", 1)
    assert ledger.held() == {"kv": 105 * MIB, "small": 10 + MIB}, "a refusal counts nothing"
    ledger.give("kv", 105 * MIB)
    ledger.take("kv", 1)
    assert ledger.report() == {
        "kv": {"planned": 100 * MIB, "peak": 105 * MIB},
        "small": {"planned": 10, "peak": 10 + MIB},
    }


def test_ledger_refuses_a_component_outside_the_plan():
    ledger = Ledger(10**9, {"kv": 1, "core": 1})
    with pytest.raises(OverBudget, match=r"^cache: 5 B asked for, .* \(expected one of core, kv\)"):
        ledger.take("cache", 5)
    with pytest.raises(OverBudget, match="none"):
        Ledger(1, {}).take("cache", 0)
    assert ledger.held() == {"kv": 0, "core": 0}


def test_ledger_without_a_budget_only_counts():
    ledger = Ledger(None, {"kv": 1})
    ledger.take("kv", 10**12)
    ledger.take("cache", 7)
    ledger.give("cache", 3)
    assert ledger.held() == {"kv": 10**12, "cache": 4}
    assert ledger.report()["cache"] == {"planned": 0, "peak": 7}


WRONG = [
    ("give", "kv", 6, ValueError),
    ("give", "no", 1, ValueError),
    ("give", "kv", -1, ValueError),
    ("take", "kv", -1, ValueError),
    ("take", "kv", 1.5, TypeError),
]


@pytest.mark.parametrize(("verb", "name", "size", "error"), WRONG)
def test_ledger_refuses_wrong_arithmetic(verb, name, size, error):
    ledger = Ledger(None, {"kv": 1})
    ledger.take("kv", 5)
    with pytest.raises(error):
        getattr(ledger, verb)(name, size)
    assert (ledger.held(), ledger.peak()) == ({"kv": 5}, {"kv": 5})


def test_ledger_keeps_its_own_copies():
    planned = {"kv": 5}
    ledger = Ledger(None, planned)
    planned["kv"] = 6
    ledger.held()["kv"] = 9
    ledger.peak()["kv"] = 9
    assert (ledger.held(), ledger.report()) == ({"kv": 0}, {"kv": {"planned": 5, "peak": 0}})


STEPS = st.tuples(st.sampled_from(["take", "give"]), st.sampled_from(["a", "b", "new"]), st.integers(0, 3 * MIB))


@given(st.lists(STEPS, max_size=40), st.none() | st.integers(1, 10**9))
def test_ledger_agrees_with_plain_sums(steps, budget):
    plan = {"a": MIB, "b": 40 * MIB}
    room = {name: size + max(MIB, size // 20) for name, size in plan.items()}
    ledger, held, peak = Ledger(budget, plan), dict.fromkeys(plan, 0), dict.fromkeys(plan, 0)
    for verb, name, size in steps:
        total = held.get(name, 0) + (size if verb == "take" else -size)
        if total < 0:
            with pytest.raises(ValueError, match="given back"):
                ledger.give(name, size)
        elif verb == "take" and budget is not None and total > room.get(name, -1):
            with pytest.raises(OverBudget):
                ledger.take(name, size)
        else:
            getattr(ledger, verb)(name, size)
            if verb == "take" or name in held:
                held[name], peak[name] = total, max(peak.get(name, 0), total)
        assert (ledger.held(), ledger.peak()) == (held, peak)
        assert all(0 <= held[name] <= peak[name] for name in held)


def test_ledger_with_threads():
    ledger, refused = Ledger(10**9, {"kv": MIB}), []

    def work():
        for _ in range(2000):
            try:
                ledger.take("kv", MIB // 2)
            except OverBudget:
                refused.append(1)
            else:
                assert ledger.held()["kv"] <= 2 * MIB
                ledger.give("kv", MIB // 2)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work) for _ in range(8)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert ledger.held() == {"kv": 0}
    assert 0 < ledger.peak()["kv"] <= 2 * MIB
    assert len(refused) < 8 * 2000


# --- the allocator ---------------------------------------------------------------------------------------------------

FREED_UNDER_A_PIN = """
bounded = bound_malloc() if sys.argv[1] == "bound" else None
raised = bytearray(b"x") * (24 << 20)
del raised
blocks = [bytearray(b"x") * (4 << 20) for _ in range(20)]
pin = blocks.pop()
before = read_process().rss
blocks.clear()
freed = before - read_process().rss
trimmed = trim()
print(json.dumps([bounded, freed, trimmed, before - read_process().rss]))
"""


def test_bounded_malloc_gives_large_blocks_back_at_once():
    bounded, freed, _, _ = child(FREED_UNDER_A_PIN, "bound")
    assert bounded is (platform.libc_ver()[0] == "glibc")
    assert freed > 70 * MIB or not bounded


def test_trim_gives_back_what_a_pin_holds():
    _, freed, trimmed, after = child(FREED_UNDER_A_PIN, "free")
    assert after > 70 * MIB or not trimmed
    assert trimmed is (freed < 70 * MIB) or platform.libc_ver()[0] != "glibc"


def test_allocator_calls_do_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.trim() is False
    assert memory.bound_malloc() is False
