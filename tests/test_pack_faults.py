"""Packing on a disk that fails, killed, short of space or of rights; and packs that are not what was written.

After every fault the same four things hold, see ``Stage`` in ``faulty.py``: only packs that verify are listed, the
others still serve, a packing without the fault gives what a clean one does, and the source is untouched.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.store import cache as store
from edge.store import packs
from edge.store.text import text_folder
from loaders import packing
from loaders.checkpoint import Checkpoint
from loaders.errors import EdgeError, MissingFile, NotPermitted, ReadFailed
from loaders.formats import atomic
from loaders.formats import manifest as manifests
from loaders.formats.pack import BASE, PLE, WEIGHTS, Pack, parts_for
from loaders.formats.window import Window
from loaders.packing import write_pack
from tests import small
from tests.faulty import CHANGES, CLEANING, CLOSE, OPEN, ROOT, Faults, Stage, command, leftovers, raising, tree

SEED = int.from_bytes(os.urandom(2), "little")


@pytest.fixture(scope="module", autouse=True)
def cache_kept() -> Any:
    """Stages set EDGE_CACHE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_CACHE", os.environ["EDGE_CACHE"])
        yield


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Made once: every test leaves it as it found it."""
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def stage(shared_stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The source is not packed yet, and nothing is left of earlier faults."""
    monkeypatch.setenv("EDGE_CACHE", str(shared_stage.root / "cache"))
    shared_stage.again()
    shared_stage.forget()
    return shared_stage


def refused(found: tuple[int, str, str], code: int, *words: str) -> None:
    """One line on standard error, of that class, that says these things."""
    assert (found[0], found[1]) == (code, ""), found
    assert found[2].count("\n") == 1
    assert found[2].startswith("edge: error: ")
    for word in words:
        assert word in found[2]


# F1, F2, F3, F10: a call that fails


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("pwrite", (errno.ENOSPC, errno.EIO)),
        ("fsync", (errno.EIO, errno.ENOSPC)),
        ("rename", (errno.EXDEV, errno.EACCES)),
        ("replace", (errno.EIO, errno.EACCES)),
        ("mkdir", (errno.ENOSPC, errno.EDQUOT)),
        (OPEN, (errno.ENOSPC, errno.EIO)),
        (CLOSE, (errno.ENOSPC, errno.EIO)),
    ],
)
def test_any_call_that_fails_once(stage: Stage, name: str, numbers: tuple[int, int]) -> None:
    """At every n until packing gets by. But for the sync of a folder, which not every file system can do."""
    n, failed = 0, 0
    while True:
        n += 1 if n < 24 else 3
        stage.forget()
        with Faults((name,), n, raising(numbers[n % 2])).here() as faults:
            found = command("pack", stage.source, "-q")
        stage.holds()
        assert leftovers() == []
        if faults.calls < n:
            break
        if found[0] == 0 and (name == "fsync" or (name, n) == ("mkdir", 1)):  # the cache itself, which is there
            assert tree(stage.pack) == stage.clean
        else:
            refused(found, 74, os.strerror(numbers[n % 2]))
            failed += 1
            if n % 4 == 1:
                stage.again()
    assert found[0] == 0
    assert tree(stage.pack) == stage.clean
    # Of root and three parts: files that matter are synced at least once each.
    assert failed >= {"pwrite": 20, "fsync": 10, "rename": 4, "replace": 3, "mkdir": 4, OPEN: 6, CLOSE: 6}[name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_gone_for_good(stage: Stage, number: int) -> None:
    """From the nth change on everything fails, cleaning up too: what is left looks like nothing, and is collected."""
    n, left = 1, 0
    while True:
        with Faults((*CHANGES, *CLEANING), n, raising(number), on=True).here() as faults:
            found = command("pack", stage.source, "-q")
        if faults.calls < n:
            break
        if found[0]:
            refused(found, 74, os.strerror(number))
        else:
            assert set(faults.seen[n - 1 :]) == {"fsync"}, "only the last folder's"
        left += len(leftovers())
        stage.holds()
        stage.again()
        stage.forget()
        n += 7
    assert n > 60
    assert left > 3


def test_access_that_is_refused(stage: Stage) -> None:
    with Faults(("mkdir",), 2, raising(errno.EACCES)).here():
        refused(command("pack", stage.source), 77, "Permission denied")
    stage.holds()


def test_a_failed_sync_is_not_tried_again(stage: Stage) -> None:
    """A page that failed to reach the disk may be marked clean: a second sync would report success."""
    with Faults(("fsync",), 1, raising(errno.EIO)).here() as faults:
        refused(command("pack", stage.source), 74, "Input/output error")
    assert faults.calls == 1


def test_a_full_device_shows_when_the_file_is_closed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> Any:
        return open("/dev/full", "wb")

    monkeypatch.setattr(packing, "open", full, raising=False)
    refused(command("pack", stage.source), 74, "No space left on device")
    monkeypatch.delattr(packing, "open")
    stage.holds()
    assert leftovers() == []


# F4, F5, F6: the end of the process


def test_killed_at_every_change_and_at_random(tmp_path: Path) -> None:
    """See ``faulty.py``."""
    command_line = [sys.executable, "-m", "tests.faulty", str(SEED), "60", str(tmp_path)]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert found["calls"] > 70, found
    assert found["killed"] == 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("target", ["cache", "folder"])
def test_signals_end_it_cleanly(stage: Stage, number: signal.Signals, code: int, target: str, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    to = ("-o", tmp_path / "out") if target == "folder" else ()
    for n in (1, 9, 15):
        with Faults(("pwrite",), n, lambda: signal.raise_signal(number)).here() as faults:
            assert command("pack", stage.source, *to) == (code, "", "")
        assert faults.calls == n
        assert leftovers() == []
        assert os.listdir(tmp_path) == []
        stage.holds()
    assert signal.getsignal(number) == before
    stage.again()


# F8, F9: less room than is needed


def test_a_disk_without_room_is_known_before_anything_is_written(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(stage.root)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with Faults(("pwrite",), 1, raising(errno.EIO)).here():
        refused(command("pack", stage.source), 74, "disk full: needs ", "has 5000 bytes free")
    stage.holds()
    assert leftovers() == []


@pytest.mark.parametrize("most", [100, 2000, 9000])
def test_a_limit_on_the_size_of_files(stage: Stage, most: int) -> None:
    """The kernel writes what it may and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        found = command("pack", stage.source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(found, 74, "File too large")
    stage.holds()
    assert leftovers() == []


def test_writes_that_stop_halfway_go_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 2)], at))
    stage.again()


# F11, F12, F18: others


def test_a_lock_whose_file_was_removed_is_no_lock(stage: Stage) -> None:
    """Two may wait for a pack that a third removes, lock and all. Then they must not both have it."""
    inside, most, entered = [0], [0], threading.Barrier(3)

    def work() -> None:
        entered.wait()
        with packs.locked(stage.pack, lambda *_: None):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.15)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    with packs.locked(stage.pack, lambda *_: None):
        for thread in threads:
            thread.start()
        entered.wait()
        time.sleep(0.05)
        os.unlink(packs.lock_path(stage.pack))
    # Here a newcomer would make a lock of its own.
    with packs.locked(stage.pack, lambda *_: None):
        most[0] = max(most[0], inside[0] + 1)
    for thread in threads:
        thread.join()
    assert most == [1]


def test_where_there_are_no_locks_it_works_without(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda fd, how: raising(errno.ENOLCK)())
    stage.again()


def test_a_removed_pack_still_serves_who_has_it_open(stage: Stage) -> None:
    stage.again()
    pack = Pack.open(stage.pack)
    packs.remove(stage.pack)
    assert not stage.pack.exists()
    for shards in pack.parts.values():
        for tensor in shards.tensors.values():
            out = np.empty(tensor.shape, f"u{tensor.itemsize}")
            shards.read_window(tensor, Window.full(tensor.shape), out)
            if len(tensor.shape) == 2 and tensor.shape[1] > 1:
                shards.read_window(tensor, Window.of([(0, 1)], [(1, 2)]), np.empty((1, 1), out.dtype))
    pack.close()


def test_packing_opening_and_removing_at_once(stage: Stage) -> None:
    """Whoever asks for a pack gets a whole one, whatever others do to it."""
    checkpoints = [Checkpoint.open(stage.source) for _ in range(2)]
    parts, failed, got = parts_for(checkpoints[0].model), [], [0]
    stop = time.monotonic() + 3

    def use(checkpoint: Checkpoint) -> None:
        try:
            while time.monotonic() < stop:
                with packs.pack_closed(packs.ensure(checkpoint, parts, notify=lambda *_: None)) as pack:
                    for shards in pack.parts.values():
                        tensor = next(iter(shards.tensors.values()))
                        shards.read_into(tensor, bytearray(tensor.nbytes))
                got[0] += 1
        except BaseException:  # noqa: BLE001 - shown by the assertion below
            failed.append(traceback.format_exc())

    def remove() -> None:
        try:
            while time.monotonic() < stop:
                try:
                    packs.remove(stage.pack)
                except MissingFile:
                    time.sleep(0.002)
        except BaseException:  # noqa: BLE001 - shown by the assertion below
            failed.append(traceback.format_exc())

    threads = [threading.Thread(target=use, args=(c,)) for c in checkpoints] + [threading.Thread(target=remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert got[0] > 3
    for checkpoint in checkpoints:
        checkpoint.close()
    stage.again()


def test_parts_that_another_process_removed_meanwhile_are_made_too(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there when it was looked for may be gone when the lock is ours."""
    checkpoint = Checkpoint.open(stage.source)
    packs.ensure(checkpoint, (BASE,), notify=lambda *_: None).close()
    real = packs.locked

    def removed_first(folder: Path, notify: Any) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        return real(folder, notify)

    monkeypatch.setattr(packs, "locked", removed_first)
    with packs.pack_closed(packs.ensure(checkpoint, (BASE, "int8"), notify=lambda *_: None)) as pack:
        assert set(pack.parts) == {BASE, "int8"}
    checkpoint.close()


def test_a_thousand_leftovers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not looked for where nothing is packed; few go at a time, and none of a pack that is another's."""
    folder, name = packs.packs_folder(), atomic.temporary(stage.pack.name)
    stage.again()
    made = [folder / f"{name if i % 4 == 0 else '.of.another.'}{i:06d}.tmp" for i in range(1000)]
    for path in made:
        path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(packs, "sweep", None)
        assert command("pack", stage.source, "-q")[0] == 0
    for left in (150, 50, 0):
        stage.forget()
        assert len(packs.listing()) == 1
        assert command("pack", stage.source, "-q")[0] == 0
        assert sum(Path(path).name.startswith(name) for path in leftovers()) == left
        assert tree(stage.pack) == stage.clean
    assert len(leftovers()) == 750
    for path in leftovers():
        os.rmdir(path)


def test_leftovers_of_a_source_that_has_changed_go_too(stage: Stage) -> None:
    """Nobody will ask for that pack again: whoever packs next cleans up, unless it is being made right now."""
    folder = packs.packs_folder()
    stale, busy = (folder / f"{'long name ' * 4}-{digit * 16}" for digit in "ab")
    for gone in (stale, busy):
        packs.lock_path(gone).touch()
        (folder / f"{atomic.temporary(gone.name)}xyz.tmp" / "base").mkdir(parents=True)
    with packs.locked(busy, lambda *_: None):
        assert command("pack", stage.source, "-q")[0] == 0
    assert [Path(p).name for p in leftovers()] == [f"{atomic.temporary(busy.name)}xyz.tmp"]
    assert not packs.lock_path(stale).exists()
    stage.forget()
    assert command("pack", stage.source, "-q")[0] == 0
    assert leftovers() == []


# F15, F16: where the cache lies


def test_a_cache_in_memory_is_pointed_out(tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    device = os.stat(tmp_path).st_dev
    for kind, said in (("tmpfs", True), ("ramfs", True), ("ext4", False)):
        mounts = tmp_path / "mounts"
        line = f"36 35 {os.major(device)}:{os.minor(device)} / /x rw shared:1 - {kind} none rw\n"
        mounts.write_text("1 2 0:1 / / rw - ext4 /dev/x rw\n" + line)
        monkeypatch.setattr(store, "MOUNTS", mounts)
        code, _, err = command("pack", stage.source)
        assert code == 0
        assert ("memory itself" in err) == said
    monkeypatch.setattr(store, "MOUNTS", tmp_path / "nothing")
    assert not store.in_memory(tmp_path)


def test_a_cache_that_cannot_be(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "file", tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "/".join(["x" * 200] * 25)):
        monkeypatch.setenv("EDGE_CACHE", str(place))
        refused(command("pack", stage.source), 73, "Set EDGE_CACHE")
        assert command("pack", "--list", "--json")[0] == 0
        # A run that packs nothing gets by without.
        source = Checkpoint.open(small.built("llama"))
        assert text_folder(source) is None
        source.close()
    assert (tmp_path / "file").read_text() == "x"


def test_a_cache_that_cannot_be_written(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *args, **options)

    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "open", read_only)
    refused(command("pack", stage.source), 77, ".lock: Permission denied", "Set EDGE_CACHE")
    source = Checkpoint.open(small.built("llama"))
    assert text_folder(source) is None
    source.close()
    assert list((tmp_path / "cache" / "packs").iterdir()) == []


def test_a_cache_elsewhere(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a link, in folders that are not there yet; nothing goes through the folder for temporary files."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "link" / "a" / "b"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert command("pack", stage.source, "-q")[0] == 0
    (made,) = (tmp_path / "real" / "a" / "b" / "packs").glob("model-*")
    assert tree(made) == stage.clean


def test_the_pack_of_another_user_is_not_taken(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.again()
    owner = os.stat(stage.pack).st_uid
    if owner == 0:  # whose packs are everybody's
        owner = 4321
        os.chown(stage.pack, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(command("pack", stage.source), 77, f"belongs to user {owner}")
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert command("pack", stage.source, "-q")[0] == 0
    stage.forget()


# F7, F13: a pack that is not what was written


@cache
def sound() -> Path:
    """A pack with every part, and text; read-only."""
    folder = Path(small._home().name, "faults.pack")
    checkpoint = Checkpoint.open(small.built("gemma3n-chat"))
    write_pack(checkpoint, folder)
    checkpoint.close()
    return folder


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound(), tmp_path / "pack"))


def damaged(pack: Path, code: int, *words: str, ways: tuple[tuple[object, ...], ...] = ()) -> None:
    """Refused by whoever opens it, with the same line, and nothing run."""
    before = tree(pack)
    say = ("hi", "-n", "1", "--budget", "4GB", "--quiet")
    said = set()
    for way in ways or (("run", pack, *say), ("plan", pack, "--budget", "4GB"), ("pack", pack, "--verify")):
        found = command(*way)
        refused(found, code, *words)
        said.add(found[2])
    assert len(said) == 1
    assert tree(pack) == before


FILES = sorted(name for name, sha in tree(sound()).items() if sha)


@pytest.mark.parametrize("name", FILES)
def test_any_file_cut_short(pack: Path, name: str) -> None:
    """What a power cut leaves of a file that was renamed before it was on disk: nothing, or some of it."""
    whole = (pack / name).read_bytes()
    rng = random.Random(name)
    for size in (0, 1, len(whole) - 2, *(rng.randrange(2, len(whole) - 2) for _ in range(3))):
        (pack / name).write_bytes(whole[:size])
        found = command("pack", pack, "--verify")
        refused(found, 65, Path(name).name)
    damaged(pack, 65, Path(name).name)
    (pack / name).write_bytes(whole + b"\0" * 5)
    damaged(pack, 65, Path(name).name)
    os.unlink(pack / name)
    if name != manifests.NAME:
        damaged(pack, 66, Path(name).name)


@pytest.mark.parametrize("name", FILES)
def test_any_bit_that_fell_over(pack: Path, name: str) -> None:
    """Verifying finds it. Small files and headers are not even opened."""
    whole = (pack / name).read_bytes()
    rng = random.Random(name)
    for _ in range(4):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (pack / name).write_bytes(flipped)
        code, out, err = command("pack", pack, "--verify")
        assert code in ((65, 66, 78, 2) if name == manifests.NAME else (65,)), (err, flipped)
        assert (out, err.count("\n")) == ("", 1)
        if not name.endswith(WEIGHTS) or name.startswith(PLE):
            continue
        with pytest.raises(EdgeError, match=WEIGHTS):
            Pack.open(pack).verify()


def test_a_file_of_another_time(pack: Path) -> None:
    """Of the same name and size, as an older pack would have it."""
    path = pack / "int4" / WEIGHTS
    stale = bytearray(path.read_bytes())
    stale[-5000:] = bytes(5000)
    path.write_bytes(stale)
    damaged(pack, 65, WEIGHTS, "sha256", "remove it and pack again", ways=(("pack", pack, "--verify"),))


@pytest.mark.parametrize("part", [BASE, "int4", PLE])
def test_a_bit_of_a_header_is_refused_before_weights_are_read(pack: Path, part: str) -> None:
    path = pack / part / WEIGHTS
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    free = range(whole.index(b"format"), whole.index(b'"pt"') + 4)  # its metadata: read by nobody
    rng = random.Random(part)
    for at in (*range(8), *(rng.randrange(8, end) for _ in range(40))):
        if at in free:
            continue
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(7)
        if flipped[at : at + 1].isspace() and whole[at : at + 1].isspace():
            continue
        path.write_bytes(flipped)
        with pytest.raises(EdgeError) as caught:
            Pack.open(pack).close()
        assert caught.value.exit_code in (65, 78)
        assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("place", ["", BASE, "int8", PLE])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "extra", "vocab.bin.old"])
def test_a_file_too_many(pack: Path, place: str, name: str) -> None:
    """``model.safetensors`` would be read in the place of what was written."""
    shutil.copy(pack / BASE / WEIGHTS, pack / place / name)
    damaged(pack, 65, f"{name}: not a file of this pack")


def test_hidden_files_are_not_looked_at(pack: Path) -> None:
    for place in ("", BASE):
        (pack / place / ".DS_Store").write_text("x")
        (pack / place / ".int4.abc.tmp").mkdir()
    with packs.pack_closed(Pack.open(pack)) as found:
        assert found.verify()


def edited(pack: Path, part: str, change: Callable[[dict[str, Any]], object], sealed: bool) -> None:
    """The manifest of a part, changed; ``sealed``: by somebody who knows how it is done."""
    path = pack / part / manifests.NAME
    data = json.loads(path.read_bytes())
    change(data)
    if sealed:
        data["seal"] = manifests.seal(data)
    path.write_text(json.dumps(data))


def test_an_edited_manifest(pack: Path) -> None:
    edited(pack, "int4", lambda m: m["files"][WEIGHTS].update(sha256="0" * 64), False)
    damaged(pack, 65, "manifest.json: seal")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
@pytest.mark.parametrize("part", ["", BASE])
def test_another_version(pack: Path, version: object, part: str) -> None:
    edited(pack, part, lambda m: m.update(version=version), True)
    damaged(pack, 78, "manifest.json: version: pack version ", "Pack the checkpoint again")


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    """The weights under another name."""
    return lambda m: m["files"].update({name: m["files"].pop(WEIGHTS)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((renamed(n), "file name") for n in ("../x", "/etc/passwd", "a/b", ".x", "..", "", "manifest.json", "x\0y")),
        *((renamed(n), "file name") for n in ("x" * 300, "a\nb", "\x1b[2J", "..\\x", "C:x")),
        (lambda m: m.update(files={}), "files"),
        (lambda m: m.update(files=[WEIGHTS]), "files"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["files"].update({WEIGHTS: 5}), f"files.{WEIGHTS}"),
        (lambda m: m["files"][WEIGHTS].update(bytes=-1), f"files.{WEIGHTS}.bytes"),
        (lambda m: m["files"][WEIGHTS].update(bytes=True), f"files.{WEIGHTS}.bytes"),
        (lambda m: m["files"][WEIGHTS].update(bytes=2**70), WEIGHTS),
        (lambda m: m["files"][WEIGHTS].update(sha256="x" * 64), f"files.{WEIGHTS}.sha256"),
        (lambda m: m["files"][WEIGHTS].update(sha256=None), f"files.{WEIGHTS}.sha256"),
        (lambda m: m["files"][WEIGHTS].update(more=1), f"files.{WEIGHTS}"),
        (lambda m: m.update(part="int4"), "part"),
        (lambda m: m.update(part=None), "part"),
        (lambda m: m.update(fingerprint="0" * 64), "fingerprint"),
        (lambda m: m.pop("fingerprint"), "fingerprint"),
        (lambda m: m.update(format="another"), "format"),
    ],
)
def test_a_hostile_manifest(pack: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edited(pack, BASE, change, True)
    damaged(pack, 65, words)


def test_a_hostile_manifest_of_the_whole(pack: Path, stage: Stage) -> None:
    """Sealed, so it is opened; nothing in it is taken for more than text."""
    edited(pack, "", lambda m: (m.pop("source"), m.pop("fingerprint")), True)
    damaged(pack, 65, "fingerprint")
    place = packs.packs_folder() / "hostile"
    shutil.copytree(pack, place)
    assert next(e.state for e in packs.listing() if e.key == "hostile").startswith(str(place))
    assert command("pack", "--remove", "hostile", "-q")[0] == 0


@pytest.mark.parametrize("kind", ["int16", None, "", ["int8"], "int4"])
def test_rows_in_a_format_that_is_none(pack: Path, kind: object) -> None:
    """int4 is one, but these rows are not."""
    edited(pack, PLE, lambda m: m.update(ple=kind), True)
    damaged(pack, 65, WEIGHTS if kind == "int4" else "ple")


def test_weights_of_another_shape(pack: Path) -> None:
    """Sound in themselves, and sealed."""
    shutil.copy(pack / "int8" / WEIGHTS, pack / "int4" / WEIGHTS)
    size, sha = os.stat(pack / "int4" / WEIGHTS).st_size, manifests.digest(pack / "int4" / WEIGHTS)
    edited(pack, "int4", lambda m: m["files"].update({WEIGHTS: {"bytes": size, "sha256": sha}}), True)
    damaged(pack, 65, f"{WEIGHTS}: ")


def test_a_part_of_another_pack(pack: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small.built("gemma3n-chat"), tmp_path / "model"))
    write_pack(Checkpoint.open(model), tmp_path / "other", ("int4",))
    shutil.rmtree(pack / "int4")
    shutil.move(tmp_path / "other" / "int4", pack / "int4")
    damaged(pack, 65, "fingerprint: of another checkpoint")


@pytest.mark.parametrize("target", ["nothing", "loop", "folder", "fifo", "other", "itself"])
def test_links(pack: Path, tmp_path: Path, target: str) -> None:
    """Followed: hubs keep files behind links. What counts is the content, and that it is a file."""
    path = pack / BASE / WEIGHTS
    shutil.move(path, tmp_path / "weights")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "other").write_bytes(b"x")
    path.symlink_to({"itself": tmp_path / "weights", "loop": path}.get(target, tmp_path / target))
    if target == "itself":
        with packs.pack_closed(Pack.open(pack)) as found:
            assert found.verify()
    else:
        damaged_link(pack, 65 if target == "other" else 66)


def damaged_link(pack: Path, code: int) -> None:
    """As :func:`damaged`, for folders that cannot be walked through."""
    for way in (("run", pack, "hi"), ("pack", pack, "--verify")):
        refused(command(*way), code, WEIGHTS)


@pytest.mark.parametrize("part", [BASE, "int8", "int4", PLE])
def test_a_part_that_is_missing(pack: Path, part: str) -> None:
    shutil.rmtree(pack / part)
    precision = "int8" if part == "int8" else "int4"
    held = {"int8": "int4", "int4": "int8"}.get(part, "no complete core")
    found = command("run", pack, "hi", "--precision", precision, "-n", "1")
    refused(found, 78, f"this pack holds {held}")
    with packs.pack_closed(Pack.open(pack)) as opened:
        assert opened.verify()
        with pytest.raises(MissingFile):
            opened.require(part)


def test_a_part_that_is_empty(pack: Path) -> None:
    shutil.rmtree(pack / "int4")
    (pack / "int4").mkdir()
    damaged(pack, 66, "manifest.json")


def test_a_damaged_pack_in_the_cache_is_not_made_anew_in_silence(stage: Stage) -> None:
    stage.again()
    path = stage.pack / "int8" / manifests.NAME
    path.write_bytes(path.read_bytes()[:-40])
    found = command("pack", stage.source)
    refused(found, 65, manifests.NAME)
    (entry,) = [e for e in packs.listing() if e.folder == stage.pack]
    assert entry.state in found[2]
    assert command("pack", "--remove", entry.key, "-q")[0] == 0
    assert command("pack", stage.source, "-q")[0] == 0
    assert tree(stage.pack) == stage.clean


def test_a_source_that_ends_early(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after it was opened: a short read, not an error by itself."""
    real = os.preadv

    def short(fd: int, buffers: Any, at: int) -> int:
        return (
            0
            if at > 30_000 and os.readlink(f"/proc/self/fd/{fd}").endswith("model.safetensors")
            else real(fd, buffers, at)
        )

    monkeypatch.setattr(os, "preadv", short)
    refused(command("pack", stage.source), 74, "model.safetensors", "wanted")
    monkeypatch.setattr(os, "preadv", real)
    stage.holds()
    assert leftovers() == []


def test_what_is_raised(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from the library."""
    checkpoint = Checkpoint.open(stage.source)
    with Faults(("pwrite",), 5, raising(errno.ENOSPC)).here(), pytest.raises(ReadFailed, match="No space left"):
        write_pack(checkpoint, tmp_path / "p")
    with Faults(("mkdir",), 1, raising(errno.EPERM)).here(), pytest.raises(NotPermitted):
        write_pack(checkpoint, tmp_path / "p")
    assert os.listdir(tmp_path) == []
    checkpoint.close()
