"""Runs Python programs in forks of a process that has imported the libraries: a start takes 0.1 s instead of 5 s.

The clients are named `python`, `rorchat`, `accelerate` and `trl`. A client passes its arguments, working directory,
environment and open streams to the server over a Unix socket, forwards signals, and exits with the exit code of the
fork. If it is killed, so is the fork. The programs are the real ones; `sys.executable` is the client, so that the
processes that a launcher starts are forks as well. Of the variables that libraries read on import, only those that
`read_environment` applies hold as in a new process. A test of imports, of memory or of a start needs a new process.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MODULES = (
    "accelerate.commands.launch",
    "datasets",
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
    "torch.distributed.run",
    "transformers.models.gpt2.tokenization_gpt2",  # imported when first used
    "transformers.pipelines",
    "trl.scripts.dpo",
    "trl.scripts.sft",
)
#: The variable that names the folder of the clients; pytest's workers inherit it.
FOLDER = "RORCHAT_TESTS_PRELOADED"
#: Modules that keep settings of the environment.
SETTINGS = ("huggingface_hub.constants", "datasets.config")
SCRIPTS = ("rorchat", "accelerate", "trl")  # beside the Python of the environment

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
job = {{"argv": {first!r} + sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
job = json.dumps(job | {{"executable": {executable!r}}}).encode()
socket.send_fds(link, [len(job).to_bytes(8, "big")], [0, 1, 2])
link.sendall(job)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: link.sendall(b"%d\\n" % number))
code = int(link.makefile().readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def client(name: str) -> str:
    """The path of a client."""
    return str(Path(os.environ[FOLDER]) / name)


@contextlib.contextmanager
def start_server(folder: Path):
    """Writes the clients into a folder; their server runs until the context ends, or until this process is killed."""
    address, executable = str(folder / "socket"), folder / "python"
    scripts = {name: [str(Path(sys.executable).with_name(name))] for name in SCRIPTS}
    for name, first in {executable.name: [], **scripts}.items():
        values = {"python": sys.executable, "address": address, "executable": str(executable), "first": first}
        (folder / name).write_text(CLIENT.format(**values), encoding="utf-8")
        (folder / name).chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, __file__, address]
    # in a session of its own, so that Ctrl+C reaches only the clients, which pass it on
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        os.environ[FOLDER] = str(folder)
        yield  # __exit__ closes stdin, which ends the server


def serve(address: str) -> None:
    """Accepts programs until stdin is closed. Imports the libraries when the first program arrives."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    print("ready", flush=True)  # noqa: T201
    ended = [sys.stdin.fileno()]
    if select.select([server, *ended], [], [])[0] == ended:
        return
    import_libraries()
    signal.signal(signal.SIGCHLD, reap_children)
    while select.select([server, *ended], [], [])[0] != ended:
        link, _ = server.accept()
        if not os.fork():
            server.close()
            run_job(link)
        link.close()


def import_libraries() -> None:
    from rorchat.console import configure_libraries

    configure_libraries()
    for name in MODULES:
        importlib.import_module(name)
    conversion_mapping = importlib.import_module("transformers.conversion_mapping")
    conversion_mapping.get_checkpoint_conversion_mapping("gpt2")  # builds the patterns of all models, takes 0.2 s
    gc.collect()
    gc.freeze()  # so that the garbage collector of a fork does not traverse all imported modules


def reap_children(*_) -> None:
    """Leaves no zombies, and adds the time of the programs to that of the server's parent, as `time` shows it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def run_job(link: socket.socket) -> NoReturn:
    """Runs a program in a child, passes signals of the client on to it, and answers with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(link, 8, 3)
    requests = link.makefile("rb")
    job = json.loads(requests.read(int.from_bytes(size, "big")))
    if not (pid := os.fork()):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        link.close()
        requests.close()
        run_program(job)
    for stream in (*streams, 0, 1):  # only the program keeps pipes open
        os.close(stream)

    def forward_signals() -> None:
        with contextlib.suppress(ProcessLookupError):
            for number in requests:
                os.kill(pid, int(number))
            os.kill(pid, signal.SIGKILL)  # the client was killed

    threading.Thread(target=forward_signals, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        link.sendall(f"{code}\n".encode())
    os._exit(0)


def run_program(job: dict) -> NoReturn:
    """Runs a program in this process and exits with its code."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.executable = job["executable"]
    read_environment()
    adopt_streams()
    code: object = 1
    try:
        interpret(job["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)  # noqa: T201
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # the program has closed it
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def read_environment() -> None:
    """Applies the settings that libraries read only on import: threads, and address, cache and network of the Hub."""
    import torch
    from huggingface_hub import hf_api

    constants, _ = [importlib.reload(sys.modules[name]) for name in SETTINGS]
    hf_api.api.endpoint = constants.ENDPOINT
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def adopt_streams() -> None:
    """Reads and writes in the encoding of the environment, and receives the Ctrl-C of a terminal.

    The streams are opened anew: those of the server remember whether its own files could be seeked.
    """
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdin = open(0, encoding=encoding, errors=errors or None, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, errors=errors or None, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)
    if os.isatty(0):
        with contextlib.suppress(OSError):  # it is the terminal of pytest
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def interpret(argv: list[str]) -> None:
    """Does what `python ARGV` does with a script, `-m MODULE`, `-c CODE`, or `-` for code on stdin."""
    option, *rest = argv[1:] if argv[0] == "-u" else argv
    if option == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option in ("-c", "-"):
        sys.path[0] = ""
        code = rest.pop(0) if option == "-c" else sys.stdin.read()
        sys.argv = [option, *rest]
        forget_rorchat()
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.path[0], sys.argv = str(Path(option).resolve().parent), [option, *rest]
        runpy.run_path(option, run_name="__main__")


def forget_rorchat() -> None:
    """So that code which needs only Transformers is seen not to import rorchat."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rorchat"]:
        del sys.modules[name]


if __name__ == "__main__":
    serve(sys.argv[1])
