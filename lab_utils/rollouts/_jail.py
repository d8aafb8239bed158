"""The inside of the sandbox: ``python -I -S _jail.py CONFIG``, started by ``sandbox.py``; imports nothing of ours.

Three processes: the *keeper* outside the namespaces holds the clock; the *first* is process 1 inside, so that all
others die with it, and says how the worker ended; the *worker* gives up its user and runs the untrusted code.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 6, 8, 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MEMORY, NOT_CONFINED = 77, 78  # exit codes


def main(config):
    """The keeper."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if config["namespaces"]:
            _enter_namespaces(libc, config["user_namespace"])
    except OSError as error:
        _say(config["status"], {"confined": False, "why": str(error)})
        os._exit(NOT_CONFINED)
    first = os.fork()
    if first == 0:
        _first(libc, config)
    for descriptor in (0, 1, 2, config["code"], config["tests"], config["result"]):
        os.close(descriptor)

    def late(*_):
        _say(config["status"], {"timeout": True})
        os.kill(first, signal.SIGKILL)
        if not config["namespaces"]:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, config["seconds"])
    os.waitpid(first, 0)
    os._exit(0)


def _enter_namespaces(libc, user_namespace):
    uid, gid = os.getuid(), os.getgid()
    flags = NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user_namespace else 0)
    if libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    if user_namespace:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _first(libc, config):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if config["namespaces"]:
        _mount(libc, config)
    worker = os.fork()
    if worker == 0:
        _worker(libc, config)
    for descriptor in (0, 1, 2, config["code"], config["tests"], config["result"]):
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == worker:
            break
    code = os.waitstatus_to_exitcode(status)
    _say(config["status"], {"code": code, "cpu": usage.ru_utime + usage.ru_stime})
    os._exit(0)


def _mount(libc, config):
    """What the worker sees besides the machine's files; where one isn't allowed, it goes on without."""
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    # A /proc of its own; without it, other processes' secrets are still kept by their user.
    libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID_NODEV | MS_NOEXEC, None)
    folder, python = os.getcwd(), sys.base_prefix
    if config["uid"] is None:
        return
    # The working folder is in memory and of limited size; the standard library may lie where only root may go.
    options = f"mode=755,size={config['file_bytes']}".encode()
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, options):
        return
    os.chdir(folder)
    os.mkdir("python")
    os.mkdir("work")
    os.chown("work", config["uid"], config["uid"])
    if libc.mount(python.encode(), b"python", None, MS_BIND, None) == 0:
        packages = [module.__path__ for module in sys.modules.values() if hasattr(module, "__path__")]
        for paths in (sys.path, *packages):
            paths[:] = [path.replace(python, f"{folder}/python", 1) for path in paths]
        sys.path_importer_cache.clear()
    os.chdir("work")


def _worker(libc, config):
    code = 1
    try:
        os.close(config["status"])
        _confine(libc, config)
        code = _run(config)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except MemoryError:
        code = MEMORY
    except BaseException:
        code = _report()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def _report():
    try:
        traceback.print_exc()
    except MemoryError:
        return MEMORY
    return 1


def _confine(libc, config):
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: config["processes"],
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_CPU: config["cpu_seconds"],
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(config):
    """The code, then its tests, which it has not seen until now; the nonce says that the tests were run."""
    program = config["program"]
    space = {"__name__": "__main__" if program else "solution"}
    exec(compile(_read(config["code"]), "answer.py", "exec"), space)
    if program:
        return 0
    told = json.loads(_read(config["tests"]))
    passed, memory = [], False
    for test in told["tests"]:
        try:
            exec(compile(test, "test.py", "exec"), space)
            passed.append(True)
        except BaseException as error:
            memory |= isinstance(error, MemoryError)
            passed.append(False)
            traceback.print_exc()
    _say(config["result"], {"nonce": told["nonce"], "passed": passed, "memory": memory})
    return 0


def _read(descriptor):
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode()


def _say(descriptor, told):
    os.write(descriptor, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
