"""Real processes for the tests, forked from one that has everything imported.

A fresh interpreter takes seven seconds to import transformers; a process that is forked from one that has done so
takes a tenth. `context()` is that: what `multiprocessing.get_context` returns, with a server of its own for each
process of pytest.

    run_together(context(), target, 2, folder)  # calls target(rank, processes, port, folder) in two of them
    printed = run_script("examples/quickstart.py", "--seeds", "1", folder=tmp_path).out
    run_script("-c", "print(1)", folder=tmp_path, environment=hub.environment(home))

A test needs a fresh interpreter only where the fact is about one: what an import loads, a launcher, a command line.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What the server imports before it forks; one that is not installed is passed over.
PRELOADED = ["tests.preloaded"]
# Where the values of HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE end up as these packages are imported.
HUB_PACKAGES = {"huggingface_hub", "transformers", "datasets", "evaluate", "accelerate", "hf_rrd"}
PORTS, PORTS_OF_A_WORKER = 12_000, 2_000  # below the ones that the kernel gives away


@functools.cache
def context() -> ForkServerContext:
    """The context whose processes are forked from one with everything imported.

    The server starts here, with the environment of this moment, in the folder of the repository: from another one it
    could not import what it should, and would say nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.getcwd()
    os.chdir(ROOT)
    forkserver.ensure_running()
    os.chdir(before)
    return context


def worker() -> int:
    """The number of this process among those of pytest-xdist."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


_next_port = os.getpid() % PORTS_OF_A_WORKER


def free_port() -> int:
    """A port that nobody listens on, and that no other worker of pytest-xdist is given."""
    global _next_port
    for _ in range(PORTS_OF_A_WORKER):
        _next_port = (_next_port + 1) % PORTS_OF_A_WORKER
        port = PORTS + PORTS_OF_A_WORKER * (worker() % 9) + _next_port
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def be_process(rank: int, processes: int, port: int) -> None:
    """Make this process one of several, as a launcher would."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def run_together(
    context: Any, target: Any, processes: int, *args: Any, seconds: float = 120, codes: tuple[int, ...] = (0,)
) -> None:
    """Run `target(rank, processes, port, *args)` as so many processes, and see that each ends as it should.

    None of them outlives this call: one that waits for another for ever is killed after some time, and that is a
    failure.
    """
    port = free_port()
    children = [context.Process(target=target, args=(rank, processes, port, *args)) for rank in range(processes)]
    for child in children:
        child.start()
    end = time.monotonic() + seconds
    for child in children:
        child.join(timeout=max(0, end - time.monotonic()))
    for child in children:
        child.kill()
        child.join()
    assert {child.exitcode for child in children} <= set(codes), [child.exitcode for child in children]


@dataclass
class Printed:
    """What a script wrote, and its exit status."""

    out: str
    err: str
    code: int


def run_script(
    path: str | Path,
    *arguments: str | Path,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
    seconds: float = 90,
    check: bool = True,
) -> Printed:
    """Run a script as `python path arguments` would, in processes that have everything imported.

    Args:
        path: The script, or `-c` and the code as the first argument.
        *arguments: `sys.argv[1:]`.
        folder: Where it runs; its data sets are cached below.
        environment: Variables to add. `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` count, too, though they are read
            as the libraries are imported.
        processes: How many, as `accelerate launch` starts them.
        seconds: How long it may take.
        check: Whether another exit status than 0 is a failure.

    Returns:
        What all of them wrote, the first one's first, and the greatest exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    files = [folder / f".{os.getpid()}-{port}-{rank}" for rank in range(processes)]
    words = [str(path), *map(str, arguments)]
    children = [
        context().Process(
            target=_be_script, args=(rank, processes, port, words, str(folder), dict(environment or {}), str(file))
        )
        for rank, file in enumerate(files)
    ]
    for child in children:
        child.start()
    end = time.monotonic() + seconds
    for child in children:
        child.join(timeout=max(0, end - time.monotonic()))
    late = [child.is_alive() for child in children]
    for child in children:
        child.kill()
        child.join()
    texts = {kind: "".join(Path(f"{file}.{kind}").read_text() for file in files) for kind in ("out", "err")}
    for file in files:
        for kind in texts:
            Path(f"{file}.{kind}").unlink()
    codes = [abs(child.exitcode or 0) for child in children]
    assert not any(late), f"{words} took more than {seconds} seconds: {texts['err'][-4000:]}"
    assert not check or not any(codes), f"{words} ended with {codes}: {texts['err'][-4000:]}"
    return Printed(texts["out"], texts["err"], max(codes))


def _be_script(
    rank: int, processes: int, port: int, words: list[str], folder: str, environment: dict[str, str], file: str
) -> None:
    """Become the process of a script: its folder, output, environment, arguments and `__main__`."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{file}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    be_process(rank, processes, port)
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    os.chdir(folder)
    use_environment({"HF_HOME": f"{folder}/home"} | environment)
    path, *arguments = words
    if path == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(path).resolve().parent))
        runpy.run_path(path, run_name="__main__")


def use_environment(environment: Mapping[str, str]) -> None:
    """Set variables of this process; those of the Hub's libraries also where their values were kept at the import."""
    from huggingface_hub import HfApi, constants

    before = constants.HF_HOME, constants.ENDPOINT
    os.environ.update(environment)
    after = os.environ.get("HF_HOME", constants.HF_HOME), os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in HUB_PACKAGES]:
        for name, value in list(vars(module).items()):
            if name.startswith("HF_") and name.endswith("_OFFLINE"):
                setattr(module, name, offline)
            elif isinstance(value, HfApi):
                value.endpoint = after[1]
            elif isinstance(value, str | Path):
                for old, new in zip(before, after, strict=True):
                    if str(value).startswith(old):
                        setattr(module, name, type(value)(new + str(value).removeprefix(old)))
