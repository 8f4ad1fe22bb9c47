"""What is fuzzed: a reader of files from strangers, in surroundings that stay the same, and what it must never do.

A target is called with the content of one file. It returns whether the content was accepted, and raises ``Finding``, or
any other exception, if something happened that must not: an exception that is not one of ours, an accepted file whose
promises do not hold. ``guarded`` adds what no reader may do with any file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import metagpt_fast as mf
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import BF16, F32
from metagpt_fast.recipe_plan import plan_recipe

from ..checkpoints import random_states, write_family

Target = Callable[[bytes], bool]

SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (4, 3) for layer in range(3)},
    "lm_head.weight": (6, 4),
}
MOST_CPU_SECONDS = 5
MOST_SECONDS = 120  # the machine may be busy
MOST_NBYTES = 1 << 29
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of CPython's audit hooks that no file may cause, and those that change what is at a path, by the argument.
_FORBIDDEN = (
    "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pickle.find_class", "pty.spawn",
    "shutil.unpack_archive", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "webbrowser.open",
)  # fmt: skip
_CHANGING = {
    "os.chmod": (0,), "os.link": (1,), "os.mkdir": (0,), "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,),
    "os.symlink": (1,), "os.truncate": (0,), "shutil.copyfile": (1,), "shutil.move": (0, 1), "shutil.rmtree": (0,),
}  # fmt: skip


class Finding(BaseException):
    """Something that a reader must never do; no ``except Exception`` of the package may swallow it."""


def header_target(folder: Path) -> Target:
    """A safetensors file, alone and as a model of a merge."""
    path = folder / "model.safetensors"

    def run(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
        except mf.CheckpointError as error:
            check_message(error)
            return False
        ends = sorted((t.data_offset, t.data_offset + t.nbytes) for t in checkpoint.tensors.values())
        if ends[-1][1] != len(content) or any(end != begin for (_, end), (begin, _) in itertools.pairwise(ends)):
            raise Finding("the tensors do not tile the file")
        for name, tensor in checkpoint.tensors.items():
            if name != tensor.name or not isinstance(name, str) or tensor.numel != math.prod(tensor.shape):
                raise Finding(f"contradiction in {tensor}")
        with contextlib.suppress(mf.MetagptFastError):
            mf.plan_merge(path, [path])
        return True

    return run


def index_target(folder: Path) -> Target:
    """An index, beside two shards and what lies around a checkpoint."""
    _, (model,) = write_family(folder / "family", random_states(1, [(BF16,)] * 2, SHAPES), num_shards=2)
    (folder / "secret.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    path = model / "model.safetensors.index.json"

    def run(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(model)
        except mf.CheckpointError as error:
            check_message(error)
            return False
        # An index may leave out a whole shard: then it is one of a smaller checkpoint.
        named = set(json.loads(content)["weight_map"])
        if set(checkpoint.tensors) != named or any(shard.path.parent != model for shard in checkpoint.shards):
            raise Finding(f"accepted with {sorted(checkpoint.tensors)} of {checkpoint.shards}")
        return True

    return run


def recipe_target(folder: Path) -> Target:
    """A recipe, in a folder with the checkpoints that it may name."""
    base, models = write_family(folder / "family", random_states(2, [(BF16,), (BF16,), (F32,)], SHAPES))
    for model in (base, *models):
        (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    path = folder / "family" / "recipe.yaml"

    def run(content: bytes) -> bool:
        path.write_bytes(content)
        os.chdir(path.parent)  # relative paths count from there
        try:
            plan = plan_recipe(path.name)
        except mf.MetagptFastError as error:
            check_message(error)
            return False
        if any(len({source.shape for source in tensor.sources}) != 1 for tensor in plan.merged):
            raise Finding("a plan of tensors of several shapes")
        return True

    return run


def measurement_target(folder: Path) -> Target:
    """A measurement, and all that is computed from one."""
    path = folder / "measurement.json"

    def run(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            measurement = mf.Measurement.load(path)
        except mf.MeasurementError as error:
            check_message(error)
            return False
        size = 1 + len(measurement.models)
        if measurement.gram.shape != (len(measurement.names), size, size) or not np.isfinite(measurement.gram).all():
            raise Finding(f"accepted with Gram matrices {measurement.gram.shape}")
        with contextlib.suppress(mf.MetagptFastError), np.errstate(all="ignore"):
            measurement.to_dict()
        for others in (measurement.fingerprints[1:], measurement.fingerprints[:0:-1]):
            with contextlib.suppress(mf.MetagptFastError):
                measurement.select(measurement.fingerprints[0], others, measurement.names[:3], where=path)
        return True

    return run


def record_target(folder: Path) -> Target:
    """The record in an output that is verified."""
    base, models = write_family(folder / "family", random_states(3, [(BF16,)] * 3, SHAPES))
    out = folder / "out"
    mf.merge(base, models, out)
    path = out / "metagpt_fast.json"
    whole = path.read_bytes()
    shapes = dict(open_checkpoint(out).tensors)

    def run(content: bytes) -> bool:
        path.write_bytes(content.replace(b"@FOLDER@", os.fsencode(folder)))
        try:
            report = mf.verify(out, threads=1)
        except mf.MetagptFastError as error:
            check_message(error)
            return False
        report.to_dict()
        if open_checkpoint(out).tensors != shapes:
            raise Finding("the output has changed")
        return report.ok

    run.seed = whole.replace(os.fsencode(folder), b"@FOLDER@")  # type: ignore[attr-defined]
    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    "header": header_target,
    "index": index_target,
    "recipe": recipe_target,
    "measurement": measurement_target,
    "record": record_target,
}


def check_message(error: mf.MetagptFastError) -> None:
    """One message for a person: of bounded length, and without what would control a terminal."""
    text = str(error)
    if len(text) > 4000:
        raise Finding(f"a message of {len(text)} characters: {text[:200]}")
    if not text.isprintable():
        bad = next(char for char in text if not char.isprintable())
        raise Finding(f"a message with {bad!r}: {text[:200]!r}")


def is_importing() -> bool:
    """Whether a module is being imported, whose own code may make functions of text, as named tuples do."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[Callable[[Target, bytes], bool]]:
    """Yield a function that calls a target and raises Finding if it hangs, grows, executes, or writes elsewhere.

    Memory is bounded for the process: what is allocated when this is entered, and half a GiB more.
    """
    is_running = False
    places = (os.fsencode(folder), os.fsencode(folder.resolve()))

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if not is_running:
            return
        if event in _FORBIDDEN:
            raise Finding(f"{event} {arguments!r:.200}")
        if event == "compile" and not is_importing():
            raise Finding(f"compiles {arguments!r:.200}")
        changed = _CHANGING.get(event, ())
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            changed = (0,)
        for target in (arguments[position] for position in changed):
            if not isinstance(target, (str, bytes, os.PathLike)):
                continue  # a descriptor that is open already
            path = os.path.abspath(os.fsencode(target))  # noqa: PTH100
            if not path.startswith(places):
                raise Finding(f"{event} {arguments!r:.200}")

    def too_slow(number: int, frame: types.FrameType | None) -> None:
        raise Finding(f"takes more than {MOST_CPU_SECONDS} s of CPU, or {MOST_SECONDS} s")

    def call(target: Target, content: bytes) -> bool:
        nonlocal is_running
        signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        is_running = True
        try:
            return target(content)
        finally:
            is_running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    sys.addaudithook(watch)  # there is no way to remove it
    signal.signal(signal.SIGPROF, too_slow)
    signal.signal(signal.SIGALRM, too_slow)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST_NBYTES, limits[1]))
    try:
        yield call
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        shutil.rmtree(folder, ignore_errors=True)
