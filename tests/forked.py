"""The process that runs Python programs in forks of itself, having imported what they need: that takes nine seconds.

``python forked.py NUMBER`` is that process, with the number of an open socket that listens; it ends when its standard
input does. `ask.py` is its client. A program runs as if the client were it: with its streams, folder and environment,
signals passed on. Of several ranks, each a process that is told its rank as launchers do it, it ends when all have, as
the first does that has failed. What libraries read from the environment when they are imported, they have read before.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import multiprocessing.context
import os
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
import weakref
from pathlib import Path

EVERYTHING = [
    "attrs",  # which jsonargparse looks for
    "pytest",
    "lightning",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.byt5.tokenization_byt5",
    "datasets",
    "peft",
    "srd_lightning.command.commandline",
]


def serve(number):
    """Import everything, then fork for every client that connects to a socket, and tell it how its program ended."""
    running = {}
    with socket.socket(fileno=int(number)) as listener:
        import_everything()
        while True:
            ready, _, _ = select.select([listener, sys.stdin, *running], [], [], 0.01 if running else None)
            if sys.stdin in ready:
                return kill(process for processes in running.values() for process in processes)
            for client in [client for client in ready if client in running]:
                hear(client, running)
            if listener in ready:
                client, _ = listener.accept()
                if processes := start_for(client, [listener, *running]):
                    running[client] = processes
            for client, processes in list(running.items()):
                look_after(processes)
                if None not in processes.values():
                    with contextlib.suppress(OSError):
                        client.sendall(f"{next(filter(None, processes.values()), 0)}\n".encode())
                    client.close()
                    del running[client]


def start_for(client, others):
    """Start what a client asks for; return how its processes ended, each ``None`` so far."""
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    if not (line := client.makefile().readline()):
        return client.close()
    request = json.loads(line)

    def become():
        os.setpgid(0, 0)
        for connection in [client, *others]:
            connection.close()
        for stream, given in enumerate(streams):
            os.dup2(given, stream)
            os.close(given)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])

    processes = start(lambda: run_program(*request["command"]), request["ranks"], become)
    for stream in streams:
        os.close(stream)
    return dict.fromkeys(processes)


def hear(client, running):
    """Pass on a signal to the first process that still runs; kill them all if the client is gone."""
    left = [process for process, code in running[client].items() if code is None]
    try:
        number = client.recv(1)
    except OSError:
        number = b""
    if number:
        os.kill(left[0], number[0])
    else:
        kill(left)
        for process in left:
            os.waitpid(process, 0)
        del running[client]
        client.close()


def look_after(processes):
    """Note how those processes ended that have."""
    for process in [process for process, code in processes.items() if code is None]:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            processes[process] = os.waitstatus_to_exitcode(status)


def kill(processes):
    """Kill processes, and what they have started."""
    for process in processes:
        for all_of_them in (os.killpg, os.kill):  # it may not have come to its group yet
            with contextlib.suppress(ProcessLookupError):
                all_of_them(process, signal.SIGKILL)


def import_everything():
    for module in EVERYTHING:
        importlib.import_module(module)
    parse_once()
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else threading.enumerate()
    assert len(threads) == 1, "a process with threads cannot be forked safely"
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # what was imported here is not taken down at the end of every fork
    gc.collect()
    gc.freeze()  # what is never looked at stays shared


def parse_once():
    """Have jsonargparse look at the classes of a recipe: what it finds is kept for all command lines to come."""
    import yaml
    from faults.fault import RECIPE

    from srd_lightning.command.commandline import SRDCLI

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(yaml.safe_dump(RECIPE))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            SRDCLI(["fit", "--config", str(recipe), "--print_config"])


def start(program, ranks=1, become=lambda: None):
    """Fork processes that run a function and end as an interpreter does after it.

    Args:
        program: The function.
        ranks: Number of processes.
        become: Is called first in each of them.

    Returns:
        Their numbers.
    """
    port, running = free_port(), []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            run_and_end(lambda rank=rank: (become(), be_rank(rank, ranks, port), program()))
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
    if ranks == 1:
        return
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
    """Run a file as if an interpreter had been started with it, or the code of a worker of pytest-xdist."""
    import datasets

    if program == "-u":
        program, *arguments = arguments
    if program == "-c":
        exec(arguments[0], {"__name__": "__main__"})
        return

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    sys.executable = os.environ["SRD_TEST_PYTHON"]  # what launchers start are forks as well
    contexts = multiprocessing.context._concrete_contexts
    contexts["forkserver"] = contexts["fork"]  # of a process that has imported what such a server would
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


if __name__ == "__main__":
    serve(sys.argv[1])
