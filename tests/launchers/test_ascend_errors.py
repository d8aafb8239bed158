"""What went wrong on Ascend chips: the first error of all ranks, its meaning and one thing to do.

The lines have the forms that CANN and torch_npu print; times, numbers and addresses are made up.
"""

import json
import os

import pytest

from lab_utils.launchers._ascend_errors import SIGNATURES, first_error
from lab_utils.launchers._failure import diagnose

LINES = {
    "EI0006": [
        "[ERROR] HCCL(4242,python3):2026-11-24-03:49:57.177.194 [hccl_socket.cc:778] [5001][Wait][LinkEstablish]"
        "wait socket establish timeout, role[1] rank[12] timeout[1800]",
        "EI0006: [PID: 4242] 2026-11-24-03:49:57.444.436 Getting socket times out. Reason: Remote Rank did not send",
    ],
    "EI0002": [
        "EI0002: 2026-11-24-03:49:57.444.436 The wait execution of the Notify register times out.",
        "[ERROR] RUNTIME(4242,python3):2026-11-24-03:49:57.177.194 [stream.cc:1032]5001 stream sync, error code 507048",
    ],
    "EI0004": [
        "EI0004: 2026-11-24-03:49:57.444.436 The ranktable is invalid, Reason: rank 3 is there twice."
    ],
    "EI0013": ["EI0013: 2026-11-24-03:49:57.444.436 The execution of the RoCE task is abnormal."],
    "EJ0001": ["EJ0001: 2026-11-24-03:49:57.444.436 Failed to initialize the HCCP process."],
    "HBM memory error": [
        "RuntimeError: NPU function error: UCE ERROR, error code is 507053",
        "[ERROR] RUNTIME(4242,python3):2026-11-24-03:49:57.177.194 [device.cc:88]5001 HBM MULTI BIT ECC on device 3",
        "[ERROR] DRV(4242,python3):2026-11-24-03:49:57.177.194 [x.c:1]fault event_id=0x80E01801",
    ],
    "HBM wear": ["[ERROR] DRV(4242,python3):2026-11-24-03:49:57.177.194 [x.c:1]fault event_id=0x80E18402"],
    "temperature": ["[ERROR] DRV(4242,python3):2026-11-24-03:49:57.177.194 [x.c:1]fault event_id=0x80E0020B"],
    "link down": [
        "[ERROR] HCCL(4242,python3):2026-11-24-03:49:57.177.194 [x.cc:7]link_status: 0 on device 5"
    ],
    "out of memory": [
        "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB (NPU 3; 60.96 GiB total capacity)",
        "EL0004: [PID: 4242] 2026-11-24-03:49:57.444.436 Failed to allocate memory.",
    ],
    "107001": [
        "RuntimeError: Initialize:NPUGuard.cpp:23 NPU function error: SetDevice, error code is 107001"
    ],
    "507011": [
        "[ERROR] RUNTIME(4242,python3):2026-11-24-03:49:57.177.194 [a.cc:1]5001 kernel failed, retCode=507011"
    ],
    "507046": ["EE1002: [PID: 4242] 2026-11-24-03:49:57.444.436 Stream synchronize timeout."],
    "ERR02200": [
        "[ERROR] 2026-11-24-03:49:57 (PID:4242, Device:1, RankID:1) ERR02200 DIST call hccl api failed."
    ],
}
HARMLESS = [
    "[INFO] HCCL(507048,python3):2026-11-24-03:49:57.177.194 [x.cc:1] [107001]linked, EI0006 is for failures",
    "[ERROR] HCCL(507048,python3):2026-11-24-03:49:57.177.194 [x.cc:1] [107001]something that nobody knows",
    "[EVENT] RUNTIME(4242,python3):2026-11-24-03:49:57.177.194 [x.cc:1]507011 opened the device",
    "step 507046: loss 2.107001",
]


def test_every_signature_has_a_recorded_line():
    assert {signature.name for signature in SIGNATURES} == set(LINES)


@pytest.mark.parametrize("name, line", [(name, line) for name, lines in LINES.items() for line in lines])
def test_a_line_is_known_by_its_signature(tmp_path, name, line):
    (tmp_path / "rank-1.log").write_text(f"--- rank 1, process 4242 on node7, 2026-11-24\n{line}\n")
    found = first_error(tmp_path, 0.0)
    assert found is not None and found.signature.name == name and (found.rank, found.host) == (1, "node7")
    sentence = found.sentence("run-1")
    assert sentence.startswith(f"Rank 1 on node7 met {name}: ") and sentence.endswith(
        "lab runs resume run-1."
    )
    assert "\n" not in sentence and len(sentence) < 420


def test_numbers_that_are_no_error_codes_are_passed_over(tmp_path):
    (tmp_path / "rank-0.log").write_text("\n".join(HARMLESS))
    assert first_error(tmp_path, 0.0) is None


@pytest.fixture
def logs(run_dir):
    """Rank logs and plogs of four ranks on two nodes; rank 2 met the cause, the others its consequences."""

    def rank(number, pid, host, *lines):
        head = f"--- rank {number}, process {pid} on {host}, 2026-11-24 03:00:00"
        (run_dir.logs / f"rank-{number}.log").write_text("\n".join([head, *lines]) + "\n")

    def plog(pid, *lines):
        folder = run_dir.logs / "ascend" / "run" / "plog"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"plog-{pid}_20261124030000.log").write_text("\n".join(lines) + "\n")

    wrapper = "[ERROR] 2026-11-24-03:00:01 (PID:1, Device:1, RankID:1) ERR02200 DIST call hccl api failed."
    rank(0, 100, "a", wrapper)
    rank(
        1,
        101,
        "a",
        "EI0002: 2026-11-24-03:30:37.000.000 The wait execution of the Notify register times out.",
    )
    rank(2, 200, "b")
    rank(
        3,
        201,
        "b",
        "EI0002: 2026-11-24-03:30:36.000.000 The wait execution of the Notify register times out.",
    )
    plog(
        200,
        "[INFO] HCCL(200,python3):2026-11-24-02:00:00.000.000 [x.cc:1] EI0006",
        "[ERROR] RUNTIME(200,python3):2026-11-24-03:00:02.000.000 [device.cc:88]5001 HBM MULTI BIT ECC on device 0",
    )
    return run_dir.logs


def test_the_first_error_of_all_ranks_counts_and_wrappers_last(logs):
    found = first_error(logs, 0.0)
    assert (found.signature.name, found.rank, found.host) == ("HBM memory error", 2, "b")
    assert "logs/ascend/…/plog-200_20261124030000.log" in found.sentence("x")


def test_files_of_an_earlier_attempt_say_nothing_of_this_one(logs):
    for path in logs.rglob("*.log"):
        os.utime(path, (1000.0, 1000.0))
    assert first_error(logs, since=2000.0) is None


def test_lines_of_an_earlier_attempt_in_the_same_log_are_passed_over(tmp_path):
    attempts = [
        "--- rank 0, process 1 on a, 03:00",
        LINES["EI0006"][1],
        "--- rank 0, process 2 on b, 04:00",
        "fine",
    ]
    (tmp_path / "rank-0.log").write_text("\n".join(attempts))
    assert first_error(tmp_path, 0.0) is None


def report(run_dir, rank, error):
    (run_dir.logs / f"rank-{rank}.error.json").write_text(
        json.dumps({"rank": rank, "time": 1.0, "error": error})
    )


@pytest.mark.parametrize(
    "heard",
    [
        None,
        "Rank 0 lost its connection to another rank, which died or was killed.",
        "Rank 0, after step 3: RuntimeError: HcclAllreduce, error code is 6 ERR02200 (traceback in the rank's log).",
    ],
)
def test_the_chips_error_explains_what_ranks_only_repeat(run_dir, logs, heard):
    if heard:
        report(run_dir, 0, heard)
    text, rank = diagnose(run_dir, since=0.0, launcher_text="", code=1)
    assert rank == 2 and text.startswith(
        "Rank 2 on b met HBM memory error: the chip's memory is faulty; leave its node"
    )


def test_an_error_of_the_users_stands_before_those_of_the_chips(run_dir, logs):
    report(run_dir, 0, "train.jsonl, line 7: no messages.")
    assert diagnose(run_dir, since=0.0, launcher_text="", code=1)[0] == "train.jsonl, line 7: no messages."
