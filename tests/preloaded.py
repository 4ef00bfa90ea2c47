"""Runs `rorchat` commands in forks of a process that has imported everything: a start takes 0.1 s instead of 5 s.

`bin/rorchat` in the folder that the fixture `preloaded_rorchat` returns is a client: it passes its arguments, working
directory, environment and open streams to the server over a Unix socket and exits with the code of the command. The
command itself is the real one (`rorchat.cli.main`).
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback

#: What the commands import; libraries that read the environment on import must not depend on it in these tests.
MODULES = (
    "matplotlib.pyplot",
    "rorchat.evaluation.compare",
    "rorchat.evaluation.gate",
    "rorchat.hub",
    "rorchat.reporting",
    "rorchat.training.chat_stage",
    "rorchat.training.dpo",
    "rorchat.training.grpo",
    "rorchat.training.pretrain",
    "rorchat.training.sft",
    "rorchat.training.tokenizer",
)

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
job = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(link, [len(job).to_bytes(8, "big")], [0, 1, 2])
link.sendall(job)
code = int(link.makefile().readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def serve(address: str) -> None:
    """Accepts commands until it is killed. Each runs in a child of a child, whose exit code the child reports."""
    from rorchat.console import configure_libraries

    configure_libraries()
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # so that the garbage collector of a fork does not traverse all imported modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished children leave no zombies
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    print("ready", flush=True)  # noqa: T201
    while True:
        link, _ = server.accept()
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            size, streams, _, _ = socket.recv_fds(link, 8, 3)
            job = json.loads(link.makefile("rb").read(int.from_bytes(size, "big")))
            if not (pid := os.fork()):
                run(job, streams)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            link.sendall(f"{code}\n".encode())
            os._exit(0)
        link.close()


def run(job: dict, streams: list[int]) -> None:
    """Runs a command in this process and exits with its code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["rorchat", *job["argv"]]
    code = 1
    try:
        importlib.import_module("rorchat.cli").main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
