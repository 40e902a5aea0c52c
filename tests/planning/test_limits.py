"""What is free: made-up control groups, real limits of a fresh process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from lottery_tickets.errors import PlanError
from lottery_tickets.planning import FreeMemory, amount_of, free_memory, shown
from lottery_tickets.planning._limits import _of_groups, _of_process
from processes import run_python

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_a_group_of_version_2_and_the_one_above_it(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner",
            "sys/fs/cgroup/outer/inner/memory.max": "max",
            "sys/fs/cgroup/outer/inner/memory.current": "5",
            "sys/fs/cgroup/outer/memory.max": "1000",
            "sys/fs/cgroup/outer/memory.current": "700",
            "sys/fs/cgroup/outer/memory.stat": "anon 300\ninactive_file 350\nactive_file 9",
        },
    )
    assert _of_groups(tmp_path) == [FreeMemory(1000 - (700 - 350), "control group /outer")]


def test_a_container_sees_its_own_group_at_the_mount(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../elsewhere",
            "sys/fs/cgroup/memory.max": "1000",
            "sys/fs/cgroup/memory.current": "1200",
        },
    )
    assert _of_groups(tmp_path) == [FreeMemory(0, "control group /")]


def test_a_group_of_version_1(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "7:cpu,cpuacct:/a\n4:memory:/a/b\n0::/",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "5000",
            "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "2000",
            "sys/fs/cgroup/memory/a/b/memory.stat": "total_inactive_file 500",
        },
    )
    assert _of_groups(tmp_path) == [FreeMemory(3500, "control group /a/b")]


def test_no_groups_at_all(tmp_path):
    assert _of_groups(tmp_path) == []


def test_the_machine_s_own_is_never_exceeded():
    found = free_memory()
    assert found is not None
    assert 0 < found.bytes <= psutil.virtual_memory().total


def test_no_limit_of_the_process_unless_it_is_set():
    import resource

    unlimited = [
        name
        for name, kind in (("AS", resource.RLIMIT_AS), ("DATA", resource.RLIMIT_DATA))
        if resource.getrlimit(kind)[0] == resource.RLIM_INFINITY
    ]
    assert not any(name in one.limit for name in unlimited for one in _of_process())


@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_real_limit_of_a_process(kind):
    used = {"AS": "VmSize", "DATA": "VmData"}[kind]
    code = f"""
import resource
from lottery_tickets.planning import free_memory
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("{used}"))
resource.setrlimit(resource.RLIMIT_{kind}, (used + 300 * {MIB},) * 2)
found = free_memory()
print(found.bytes, found.limit, sep="|")
"""
    count, limit = run_python(code).strip().split("|")
    assert 200 * MIB < int(count) <= 300 * MIB
    assert limit == f"process limit (RLIMIT_{kind})"


def test_an_accelerator_that_is_not_there_says_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert free_memory("cuda") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("24 GiB", 24 << 30),
        ("1.5kb", 1500),
        ("7", 7),
        (12, 12),
        ("2tib", 2 << 40),
        ("3 b", 3),
    ],
)
def test_amounts(text, count):
    assert amount_of(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "80 GBs", 0, True, "0", "1e9", None])
def test_what_is_no_amount(text):
    with pytest.raises(PlanError, match="amount of memory"):
        amount_of(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (29_540_067_840, "29.5 GB")],
)
def test_bytes_for_a_reader(count, text):
    assert shown(count) == text
