"""Checkpoints under kills, failing calls and full disks: the last good one is always found."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import seqba
from checkpoints import names, save
from seqba.checkpoint import files as checkpoint_files
from seqba.checkpoint import find_checkpoint

KILLS = """
import os, random, signal, sys, time
from pathlib import Path

import torch
from torch import nn

from seqba.checkpoint import find_checkpoint, load_checkpoint, rng_state, save_checkpoint

os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written

def save(folder, update, value, width=50):
    model = nn.Linear(width, width)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counters = {"value": value}
    save_checkpoint(folder, update, model=model, optimizer=optimizer, counters=counters, rng=[rng_state()], keep=1)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child

def found(folder, width=50):
    # the newest intact checkpoint; that it loads and that its files are of one save
    path, faults = find_checkpoint(folder)
    assert not faults, faults
    model = nn.Linear(width, width)
    value = load_checkpoint(path, model=model).counters["value"]
    assert (model.weight == value).all()
    return value

def die_at(event, folder, update):
    # count the calls that touch the disk's order; die at that one
    left = [event]
    def counted(call):
        def wrapper(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*args, **options)
        return wrapper
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    save(folder, update, 2.0)
    os._exit(0)

def every_step(root, update):
    values = []
    for event in range(200):
        folder = root / str(event)
        save(folder, 7, 1.0)
        _, status = os.waitpid(in_child(lambda: die_at(event, folder, update)), 0)
        values.append(found(folder))
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
        save(folder, 9, 3.0)  # the next save clears up
        assert [path.name for path in folder.iterdir()] == ["update-000009"]
    assert values == sorted(values) and set(values) == {1.0, 2.0} and len(values) > 12, values
    return len(values)

def at_random_moments(folder, kills):
    generator = random.Random(3)
    last, width = 1, 300
    save(folder, last, float(last), width)
    def forever():
        update = last
        while True:
            update += 1
            save(folder, update, float(update), width)
    for _ in range(kills):
        child = in_child(forever)
        while max((int(path.name[7:]) for path in folder.glob("update-??????")), default=0) <= last:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = int(found(folder, width))
        assert now > last
        last = now

root = Path(sys.argv[1])
print(every_step(root / "next", 8), every_step(root / "same", 7))
at_random_moments(root / "random", 6)
"""


def test_a_kill_at_any_step_or_moment_leaves_a_good_checkpoint(tmp_path):
    """At every call that orders writes, for a new update and for one saved again; and by SIGKILL at random."""
    importable = os.pathsep.join([str(Path(seqba.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": importable}
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("name", "calls"), [("fsync", 8), ("replace", 1)])
def test_an_error_at_any_step_leaves_the_previous_checkpoint(tmp_path, monkeypatch, name, calls):
    """Eight flushes: the folder's parent, four files, the manifest, the temporary folder, and the folder."""
    call = getattr(os, name)
    for failing in range(calls + 1):
        folder = tmp_path / str(failing)
        save(folder, 1)
        count = iter(range(100))

        def fail(*args, failing=failing, count=count, **options):
            if next(count) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files.os, name, fail)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)) if failing < calls else nullcontext():
                save(folder, 2, keep=3)
        path, faults = find_checkpoint(folder)
        assert path is not None
        assert not faults
        assert not list(folder.glob(".tmp-*"))


def test_a_full_disk_is_named_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_files, "_crc32", full)
    text = r"checkpoint .*/update-000002 was not written \(No space left on device\); [\d,]+ bytes are free there"
    with pytest.raises(OSError, match=text) as error:
        save(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmp_path) == ["update-000001"]


@pytest.mark.parametrize(("limit", "writer"), [(2_000, "safetensors"), (12_000, "torch")])
def test_a_writer_that_finds_no_room_is_reported_with_the_path(tmp_path, limit, writer):
    """The real writers, under a limit on the size of a file: each hides the system's error in one of its own."""
    model = nn.Linear(50, 50)  # 10 kB, and Adam's state 20 kB
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 50)).sum().backward()
    optimizer.step()
    save(tmp_path, 1, model, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OSError, match=r"update-000002 was not written \(File too large\)") as error:
            save(tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.__cause__ is None) == (errno.EFBIG, False)
    assert names(tmp_path) == ["update-000001"]
    assert find_checkpoint(tmp_path) == (tmp_path / "update-000001", [])
