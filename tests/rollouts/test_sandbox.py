"""Code that means no good: each attempt has its verdict, and leaves nothing behind."""

import os
import secrets
import socket
import tempfile
import time
from pathlib import Path

import pytest

from lab_utils.errors import DataError, RunError
from lab_utils.rollouts.sandbox import Isolation, Job, Limits, Sandbox

ADD = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(seconds=5.0, cpu_seconds=5.0, memory_mib=256, output_bytes=100_000), workers=2)


def verdict(sandbox, code, tests="assert True"):
    return sandbox.run([Job(code, tests)])[0]


def test_right_and_wrong_code(sandbox):
    jobs = [
        Job(ADD, ["assert f(1) == 2", "assert f(2) == 3"]),
        Job("def f(x):\n    return 2\n", ["assert f(1) == 2", "assert f(2) == 3"]),
        Job("def f(x:\n", ["assert f(1) == 2"]),
        Job(ADD + "if __name__ == '__main__':\n    raise SystemExit(3)", "assert f(1) == 2"),
    ]
    found = sandbox.run(jobs)
    assert [(v.status, v.passed, v.total) for v in found] == [
        ("passed", 2, 2),
        ("failed", 1, 2),
        ("failed", 0, 1),
        ("passed", 1, 1),
    ]
    assert "AssertionError" in found[1].stderr and "SyntaxError" in found[2].stderr


def test_input_and_output(sandbox):
    double = "print(int(input()) * 2)\nprint()"
    good = [{"input": "3\n", "output": "6"}, {"input": "4", "output": "8  \n\n"}]
    assert verdict(sandbox, double, good).status == "passed"
    bad = verdict(sandbox, double, [*good, {"input": "4", "output": "9"}, {"input": "x", "output": ""}])
    assert (bad.status, bad.passed, bad.total) == ("failed", 2, 4)
    big = verdict(
        sandbox, "import sys; print(len(sys.stdin.read()))", [{"input": "é" * 90_000, "output": "90000"}]
    )
    assert big.status == "passed"


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"]
)
def test_time_is_limited(code):
    quick = Sandbox(Limits(seconds=1.0, cpu_seconds=10.0))
    found = verdict(quick, code)
    assert found.status == "timeout" and found.seconds < 4


def test_cpu_time_is_limited():
    found = verdict(Sandbox(Limits(seconds=20.0, cpu_seconds=1.0)), "while True: pass")
    assert found.status == "timeout" and found.seconds < 10


def test_memory_is_limited(sandbox):
    assert verdict(sandbox, "x = 'a' * 10**9").status == "memory"
    assert verdict(sandbox, "", ["x = [bytes(10**6) for _ in range(10**6)]"]).status == "memory"


def test_output_is_limited(sandbox):
    for stream in ("stdout", "stderr"):
        found = verdict(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 1000)")
        assert found.status == "failed" and "bytes of output" in found.stderr and found.seconds < 4


def test_files_are_limited(sandbox):
    found = verdict(sandbox, "f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))")
    assert found.status in ("failed", "crashed") and found.seconds < 4


def test_an_early_end_is_no_pass(sandbox):
    for code in (
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os\ndef f(x): os._exit(0)",
        'import os, json\nfor d in range(3, 30):\n    try: os.write(d, b\'{"passed": [true], "nonce": ""}\\n\')\n'
        "    except OSError: pass\nos._exit(0)",
        "print('passed'); raise KeyboardInterrupt",
    ):
        assert verdict(sandbox, code, "assert f(1) == 2").status in ("failed", "crashed"), code


def test_a_crash_is_told(sandbox):
    assert verdict(sandbox, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").status == "crashed"


def test_secrets_of_the_parent_stay_there(sandbox, monkeypatch):
    secret = secrets.token_hex(8)
    monkeypatch.setenv("SANDBOX_SECRET", secret)
    look = (
        "import os, glob\n"
        "seen = [repr(os.environ).encode()]\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: seen.append(open(path, 'rb').read())\n"
        "    except OSError: pass\n"
    )
    assert os.getpid() in map(int, (p.name for p in Path("/proc").glob("[0-9]*")))
    found = verdict(
        sandbox,
        look,
        ["assert 'SANDBOX_SECRET' not in os.environ", f"assert b'{secret}' not in b''.join(seen)"],
    )
    assert found.passed >= 1
    if not any("environment" in sentence for sentence in sandbox.isolation.missing):
        assert found.status == "passed", found.stderr


def test_no_network(sandbox):
    if not sandbox.isolation.namespaces:
        assert any("network" in sentence for sentence in sandbox.isolation.missing)
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # from here it can be reached
        code = (
            "import socket\n"
            f"try: socket.create_connection(('127.0.0.1', {port}), timeout=5); reached = True\n"
            "except OSError as error: reached = False\n"
        )
        found = verdict(sandbox, code, "assert not reached")
    assert found.status == "passed", found.stderr


def test_a_fork_bomb_is_bounded_and_leaves_nothing(sandbox):
    mark = f"ascent-bomb-{secrets.token_hex(4)}"
    code = (
        "import os, time, ctypes\n"
        f"ctypes.CDLL(None).prctl(15, b'{mark[-12:]}')\n"
        "made = 0\n"
        "for _ in range(300):\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            time.sleep(60); os._exit(0)\n"
        "        made += 1\n"
        "    except OSError: break\n"
    )
    found = verdict(sandbox, code, ["assert made < 100"])
    if any("number of its processes" in sentence for sentence in sandbox.isolation.missing):
        assert found.status in ("passed", "failed")
    else:
        assert found.status == "passed", found.stderr
    time.sleep(0.2)
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            continue
    if sandbox.isolation.namespaces:
        assert mark[-12:] not in names


def test_what_is_missing_is_said():
    weak = Isolation(namespaces=False, other_user=False).missing
    assert any("network" in s for s in weak) and any("environment" in s for s in weak)
    assert (os.geteuid() == 0) == any("root" in s for s in weak)
    assert Isolation(namespaces=True, other_user=True).missing == []


@pytest.mark.parametrize("isolation", [Isolation(False, False), Isolation(True, False, True)])
def test_weaker_isolation_still_judges(isolation):
    weak = Sandbox(Limits(seconds=3.0))
    weak._isolation = isolation
    found = weak.run([Job(ADD, "assert f(1) == 2"), Job("while True: pass", "assert 1")])
    if isolation.namespaces and found[0].status == "crashed":
        assert "unshare" in found[0].stderr or "denied" in found[0].stderr  # not allowed on this machine
        return
    assert [v.status for v in found] == ["passed", "timeout"]


def test_bad_tests_and_a_bad_interpreter_are_said(sandbox):
    for tests in ([], [1], ["assert 1", {"input": "", "output": ""}], [{"input": ""}]):
        with pytest.raises(DataError, match="correct the column"):
            verdict(sandbox, "", tests)
    with pytest.raises(RunError, match="doesn't start"):
        verdict(Sandbox(python="/nowhere/python"), "")


def test_nothing_is_left_in_the_temporary_folder(sandbox):
    before = set(Path(tempfile.gettempdir()).glob("ascent-sandbox-*"))
    verdict(sandbox, "open('x', 'w').write('y'); import os; os.mkdir('d'); os.chmod('d', 0)")
    after = set(Path(tempfile.gettempdir()).glob("ascent-sandbox-*"))
    assert not after - before
