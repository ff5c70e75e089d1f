"""`python -m …` and `dvc` in processes forked from one that has imported the libraries.

A stage of a tiny study takes a second, importing torch, transformers, lm-eval and MLflow takes several. The tests of
the whole pipeline put `folder()` first on PATH: its `python` and `dvc` hand their arguments, working directory,
environment and streams to a server, whose fork runs the module as Python would have. The server imports nothing of this
checkout: a fork does, from its working directory. Anything but `-m`, and whatever sets PYTHONPATH, starts an ordinary
Python.
"""

import gc
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

IMPORTED = (
    "datasets dvc.cli dvc.repo dvc.stage.cache lm_eval lm_eval.models.huggingface matplotlib.pyplot mlflow "
    "mlflow.store.tracking.sqlalchemy_store pandas peft ruamel.yaml scipy.stats torch transformers "
    "transformers.models.gptj.modeling_gptj transformers.models.llama.modeling_llama"
).split()

CLIENT = """
import json, os, signal, socket, sys
words = sys.argv[1:]
if words[:1] != ["-m"] or "PYTHONPATH" in os.environ:
    os.execv(sys.executable, [sys.executable, *words])
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(os.path.dirname(__file__), "server"))
request = json.dumps([words[1], words[2:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
sys.exit(int(answers.readline()))
"""


@contextmanager
def folder():
    """A folder with `python` and `dvc` in it, which work until the end of the block."""
    with tempfile.TemporaryDirectory() as where:  # pytest's folders can be too deep for the name of a socket
        address, client = Path(where, "server"), Path(where, "client.py")
        client.write_text(CLIENT)
        for name, module in (("python", ""), ("dvc", "-m dvc")):
            # -S, -E and -s: nothing of the environment is imported here, which would take most of the time
            words = f"{shlex.quote(sys.executable)} -SEs {shlex.quote(str(client))} {module}"
            Path(where, name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            Path(where, name).chmod(0o755)
        server = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.DEVNULL)
        try:
            while not address.exists():
                assert server.poll() is None, "the server of warm Pythons did not start"
                time.sleep(0.05)
            yield where
        finally:
            server.terminate()
            server.wait()


def serve(address: str) -> None:
    """Fork a process for each client, which forks the one that runs its module and waits for that."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # a fork that ends does not take apart what is shared, of which each page would be copied
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    while True:
        client, _ = listening.accept()
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return answer(client)
        client.close()


def answer(client: socket.socket) -> None:
    head, streams, *_ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += client.recv(1 << 16)
    module, words, directory, environment = json.loads(request)
    if process := os.fork():
        with suppress(OSError):  # the client may be gone
            client.sendall(f"{process}\n".encode())
            client.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n".encode())
        os._exit(0)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = directory
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1])
