"""Python programs in forks of one process that has imported what they need: an interpreter takes nine seconds for that.

``python forked.py NUMBER`` is that process, with the number of an open socket that listens; it ends when its standard
input does. ``python -I -S forked.py SOCKET RANKS PROGRAM [ARGUMENT …]`` runs a program there as if here, with these
streams, this folder and this environment, and ends as the program does. Of several ranks, each a process that is told
its rank as launchers do it, it ends when all have, as the first does that has failed. What libraries read from the
environment when they are imported, they have read before.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

EVERYTHING = [
    "lightning",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.byt5.tokenization_byt5",
    "datasets",
    "peft",
    "srd_lightning.command.commandline",
]


def serve(number):
    """Import everything, then fork for every client that connects to a socket."""
    with socket.socket(fileno=int(number)) as listener:
        import_everything()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return reap()
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                run_for(connection)
            connection.close()
            reap()


def import_everything():
    for module in EVERYTHING:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else threading.enumerate()
    assert len(threads) == 1, "a process with threads cannot be forked safely"
    gc.collect()
    gc.freeze()  # what is never looked at stays shared


def reap():
    """Wait for those who have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def run_for(connection):
    """Be the process that starts a client's program, tells how it ended, and ends with it if the client goes."""
    os.setsid()
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    for stream, given in enumerate(streams):
        os.dup2(given, stream)
        os.close(given)
    request = json.loads(connection.makefile().readline())
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    running = start(lambda: (connection.close(), run_program(*request["command"])), request["ranks"])
    codes = dict.fromkeys(running)
    while None in codes.values():
        if select.select([connection], [], [], 0.01)[0]:
            if not (number := connection.recv(1)):
                os.killpg(0, signal.SIGKILL)
            os.kill(next(process for process, code in codes.items() if code is None), number[0])
        for process in [process for process, code in codes.items() if code is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
    connection.sendall(f"{next(filter(None, codes.values()), 0)}\n".encode())
    os._exit(0)


def start(program, ranks=1):
    """Fork processes that run a function and end as an interpreter does after it; return their numbers."""
    port, running = free_port(), []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            if ranks > 1:
                be_rank(rank, ranks, port)
            run_and_end(program)
        running.append(process)
    return running


def free_port():
    """Return a port that is free, and that no connection is given by chance before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def be_rank(rank, ranks, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    know_rank(rank)


def know_rank(rank):
    """Tell what is read from the environment when it is imported."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    rank_zero_only.rank = rank


def run_and_end(program):
    """Run a function, and leave with the exit code that an interpreter would have."""
    code = 1
    try:
        random.seed()
        code = code_of(program)
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code < 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def code_of(program):
    try:
        program()
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    return 1


def run_program(program, *arguments):
    """Run a file as if an interpreter had been started with it."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    sys.executable = os.environ["SRD_TEST_PYTHON"]  # what launchers start are forks as well
    if program == "-u":
        program, *arguments = arguments
    if "LOCAL_RANK" in os.environ:
        know_rank(int(os.environ.get("RANK", os.environ["LOCAL_RANK"])))
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folder = os.getcwd() if program == "-m" else str(Path(program).parent)
    sys.path[:] = [folder, *known, *(path for path in sys.path if path not in known)]
    if program == "-m":
        program, *arguments = arguments
        sys.argv = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def ask(path, ranks, *command):
    """Be the client: let a program run, and end as it does."""
    request = {"command": command, "ranks": int(ranks), "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        try:
            connection.connect(path)
            socket.send_fds(connection, [b"3"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.makefile().readline()
        except OSError as error:
            sys.exit(f"{error}: {Path(path).with_suffix('.txt').read_text()}")
    if not answer:
        sys.exit("the process that started this program is gone")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if (code := int(answer)) < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    ask(*sys.argv[1:]) if sys.argv[2:] else serve(sys.argv[1])
