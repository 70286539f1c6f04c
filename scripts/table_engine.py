"""How a table's tasks run: by threads of this process or by a Ray cluster. Both start the scripts as processes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TextIO

import torch
from tqdm import tqdm

from helper.interrupt import EXIT, IN_USE, interrupt
from helper.util import RunError

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.2  # seconds
TRIES = 3  # of a task that fails
LAST = 5  # lines of its log that are shown
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
# Ray ends the children of a worker whose driver has died by SIGKILL: they could not save
WORKER = {"RAY_kill_child_processes_on_worker_exit": "0"}


class Cell(NamedTuple):
    """One run of the table."""

    pair: str  # a teacher's own run has its name here
    method: str
    trial: str
    folder: Path
    epochs: int
    file: str = "*_last.pth"  # what the run leaves

    def is_done(self) -> bool:
        if not any(self.folder.glob(self.file)):
            return False
        return not self.epochs or last_epoch(self.folder / "metrics.jsonl") >= self.epochs


def last_epoch(path: Path) -> int:
    try:
        return json.loads(path.read_bytes().splitlines()[-1]).get("epoch", 0)
    except (OSError, LookupError, ValueError, AttributeError):  # none yet, or cut off by a kill
        return 0


@dataclass(eq=False)
class Task:
    """Runs that are trained in one call of a script, once another task is done."""

    name: str
    cells: list[Cell]
    script: str
    argv: Callable[[list[str]], list[str]]  # its arguments, given the methods that are left
    after: Task | None = None
    tries: int = 0
    not_before: float = 0.0
    failed: str = ""  # why it was given up

    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.is_done()]

    def command(self) -> list[str]:
        return [self.script, *map(str, self.argv([cell.method for cell in self.left()]))]

    def log(self, folder: Path) -> Path:
        return folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.name)}.log"


def run_command(
    command: list[str], cwd: str, log: Path, env: dict[str, str], stop: threading.Event | None = None
) -> int:
    """Run a script of this repository -> its exit code. Its output is appended to log.

    When `stop` is set, when Ray cancels the task or when this process dies, the script gets SIGTERM: it saves and ends.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here, as little may be done after a fork
    term = int(signal.SIGTERM)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **env, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as out:
        out.write(f"$ {shlex.join(['python', *command])}\n".encode())
        out.flush()
        child = subprocess.Popen(
            [sys.executable, ROOT / command[0], *command[1:]],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ray gives a process group 0.25 s to end, too short to save
            preexec_fn=libc and (lambda: libc.prctl(PR_SET_PDEATHSIG, term)),
        )
    try:
        while child.poll() is None and not (stop and stop.is_set()):
            time.sleep(POLL)  # not wait(), which ray.cancel() cannot interrupt
    finally:
        if child.poll() is None:
            child.terminate()
        code = child.wait()
    return code


class Threads:
    """Up to `jobs` scripts at once on this machine, each with its share of the GPUs."""

    def __init__(self, jobs: int | None, gpus_per_job: float | None, use_gpus: bool):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        n = torch.cuda.device_count() if use_gpus else 0
        gpus = visible.split(",")[:n] if visible else [str(i) for i in range(n)]
        per_job = min(n, 1) if gpus_per_job is None else gpus_per_job
        if per_job > n:
            raise RunError(f"--gpus_per_job {per_job:g}: this machine has {n}")
        shares = gpus * int(1 / per_job + 1e-9) if 0 < per_job < 1 else gpus
        if per_job > 1:
            size = int(per_job)
            shares = [",".join(gpus[i : i + size]) for i in range(0, n - size + 1, size)]
        self.jobs = jobs or (len(shares) if per_job else 1)
        if per_job and self.jobs > len(shares):
            raise RunError(f"--jobs {self.jobs}: with {per_job:g} GPUs each, there are enough for {len(shares)}")
        self.threads = max(1, (os.cpu_count() or 1) // self.jobs)
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        self.shares: SimpleQueue[dict[str, str]] = SimpleQueue()
        for i in range(self.jobs):
            self.shares.put({**threads, **({"CUDA_VISIBLE_DEVICES": shares[i]} if per_job else {})})
        self.pool, self.stopped = ThreadPoolExecutor(self.jobs), threading.Event()

    def capacity(self) -> int:
        """Tasks that can run at once."""
        return self.jobs

    def lost(self, error: BaseException) -> bool:
        return False  # the workers are threads of this process

    def submit(self, command: list[str], log: Path) -> Future[int]:
        return self.pool.submit(self._run, command, log)

    def _run(self, command: list[str], log: Path) -> int:
        share = self.shares.get()
        try:
            return run_command(command, os.getcwd(), log, share, self.stopped)
        finally:
            self.shares.put(share)

    def stop(self) -> None:
        """End what runs, saved."""
        self.stopped.set()
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def quiet(log: Path) -> Iterator[TextIO]:
    """Send what Ray's Python and C++ print to a file -> the terminal, for what we print."""
    with open(log, "ab") as file, os.fdopen(os.dup(1), "w", buffering=1) as out, os.fdopen(os.dup(2), "w") as err:
        sys.stdout.flush()
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        try:
            yield out
        finally:
            sys.stdout.flush()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)


class Ray:
    """Tasks of a Ray cluster; address: 'local' starts one on this machine, 'auto' is the one that runs here."""

    threads = 1  # which Ray gives to a task of one core

    def __init__(self, address: str, jobs: int | None, gpus_per_job: float | None, use_gpus: bool, folder: Path):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdecimal():
            try:
                socket.create_connection((host, int(port)), timeout=5).close()  # Ray takes 20 s, and a traceback
            except OSError as error:
                raise RunError(f"--address {address}: no answer ({error})") from error
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            local = {"include_dashboard": False} if address == "local" else {}
            ray.init(address, log_to_driver=False, runtime_env={"env_vars": WORKER}, **local)
        except ImportError as error:
            raise RunError("--address: Ray is missing, pip install -r requirements-cluster.txt") from error
        except Exception as error:  # Ray raises a dozen kinds
            raise RunError(f"--address {address}: {' '.join(str(error).split())}") from error
        interrupt.listen()  # ray.init() has replaced the handler of SIGTERM
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers import nothing of ours
        self.ray, self.jobs, self.refs = ray, jobs, {}
        most = max((node["Resources"].get("GPU", 0) for node in self.nodes()), default=0) if use_gpus else 0
        self.per_job = min(most, 1) if gpus_per_job is None else gpus_per_job
        if self.per_job > most:
            raise RunError(f"--gpus_per_job {self.per_job:g}: no node has more than {most:g}")
        token = folder / f"token-{uuid.uuid4().hex}"
        token.touch()
        try:
            for node in self.nodes():
                where, name = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), node["NodeManagerAddress"]
                look = ray.remote(num_cpus=0, scheduling_strategy=where)(unseen)
                try:
                    missing = ray.get(look.remote([Path.cwd(), ROOT, token.absolute()]), timeout=60)
                except ray.exceptions.RayError as error:
                    raise RunError(f"node {name} does not answer ({type(error).__name__})") from error
                if missing:
                    raise RunError(f"node {name} does not see {missing}: all nodes must share --output and the code")
        finally:
            token.unlink()
        self.remote = ray.remote(num_cpus=1, num_gpus=self.per_job, max_retries=0)(run_command)

    def nodes(self) -> list[dict]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def capacity(self) -> int:
        """Tasks that can run at once, on the nodes that there are now."""
        key, share = ("GPU", self.per_job) if self.per_job else ("CPU", 1)
        there = sum(int(node["Resources"].get(key, 0) / share + 1e-9) for node in self.nodes())
        return min(self.jobs or there, there)

    def submit(self, command: list[str], log: Path) -> Future[int]:
        ref = self.remote.remote(command, os.getcwd(), log.absolute(), {})
        future = ref.future()
        self.refs[future] = ref
        return future

    def lost(self, error: BaseException) -> bool:
        """Whether an error means that the worker or its node has died, not that the task has failed."""
        errors = self.ray.exceptions
        return isinstance(error, errors.RayError) and not isinstance(error, errors.RayTaskError)

    def stop(self) -> None:
        """End what runs, saved."""
        running = {future: ref for future, ref in self.refs.items() if not future.done()}
        for ref in running.values():
            self.ray.cancel(ref)
        wait(running)
        self.ray.shutdown()


def unseen(paths: list[Path]) -> str:
    """The first of some paths that this node does not see; '' if it sees all."""
    return next((str(path) for path in paths if not path.exists()), "")


def work(tasks: list[Task], engine: Threads | Ray, folder: Path, out: TextIO) -> None:
    """Run all tasks that are not done. Raises Interrupted, with all runs saved, after a signal."""
    waiting, running = [task for task in tasks if task.left()], {}
    total, n_left = sum(len(task.cells) for task in tasks), sum(len(task.left()) for task in waiting)
    bar = tqdm(total=total, initial=total - n_left, unit="run", dynamic_ncols=True, file=out, disable=not out.isatty())
    with bar, interrupt.deferred():
        try:
            while waiting or running:
                interrupt.check()
                for task in [task for task in waiting if task.after and task.after.failed]:
                    waiting.remove(task)
                    give_up(task, "its teacher failed", folder, out)
                busy = {*waiting, *(task for task, _ in running.values())}
                ready = [t for t in waiting if t.after not in busy and time.monotonic() >= t.not_before]
                for task in ready[: max(0, engine.capacity() - len(running))]:
                    waiting.remove(task)
                    note(folder, "start", task)
                    running[engine.submit(task.command(), task.log(folder))] = task, len(task.left())
                ended, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in ended:
                    task, before = running.pop(future)
                    settle(task, future, engine, folder, out)
                    bar.update(before - len(task.left()))
                    if task.left() and not task.failed:
                        waiting.append(task)
                n_failed = sum(bool(task.failed) for task in tasks)
                bar.set_postfix_str(f"{len(running)} tasks run, {n_failed} failed", refresh=bool(ended))
        finally:
            bar.set_postfix_str("saving what runs")
            engine.stop()


def settle(task: Task, future: Future[int], engine: Threads | Ray, folder: Path, out: TextIO) -> None:
    """What the end of a process means: its runs' folders say what is done, its exit code what may be tried again."""
    error = future.exception()
    code, why = (None, f"{type(error).__name__}: {error}") if error else (future.result(), "")
    again = code in (EXIT, IN_USE) or (error and engine.lost(error))
    task.tries += not again
    task.not_before = time.monotonic() + (5 if code == IN_USE else 1)
    if not task.left():
        note(folder, "done", task)
        tqdm.write(f"done: {task.name}", file=out)
    elif again or (code != 2 and task.tries < TRIES):
        note(folder, "again", task, code=code, error=why)
    else:
        give_up(task, why or f"exit code {code}", folder, out)


def give_up(task: Task, why: str, folder: Path, out: TextIO) -> None:
    task.failed = why
    note(folder, "failed", task, error=why)
    log, names = task.log(folder), ", ".join(cell.method for cell in task.left())
    lines = log.read_bytes()[-4000:].decode(errors="replace").splitlines()[-LAST:] if log.exists() else []
    said = [f"failed: {task.name} ({names}): {why}; log {log}", *(f"    {line}" for line in lines)]
    tqdm.write("\n".join(said), file=out)


def note(folder: Path, event: str, task: Task, **about: object) -> None:
    """A line of events.jsonl. Nothing depends on it."""
    line = {"time": datetime.now().isoformat(timespec="seconds"), "event": event, "task": task.name, **about}
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
