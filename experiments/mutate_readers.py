"""Damaged and hostile files for every reader: each must be read, or be refused in one sentence.

    python -m experiments.mutate_readers --count 5000 --seed 0

Good files of each kind are made, and changed: bytes flipped, cut, repeated; values of their JSON replaced by others of
any type, with hashes made to fit again; tensors of other types and shapes; lengths made huge. A reader may succeed, or
raise one `RebasinError` of one sentence with at most 300 characters, within 20 seconds and 1 GB. Seconds in which the
process was ready to run and others had the processors are not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import random
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from torch import Tensor, nn

import rebasin
from rebasin.checkpoints.pickled import load_tensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import RebasinError
from rebasin.matching.activations.statistics import ActivationState
from rebasin.matching.many.methods import match_to_mean
from rebasin.matching.many.result import ManyState, load_permutations, save_permutations
from rebasin.matching.result import MatchState
from rebasin.matching.resume_state import digest_of_state
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.matching.straight_through.state import StraightThroughState
from rebasin.objectives import CrossEntropy
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tensors import load_safetensors, save_safetensors
from rebasin.types import State

from .common import told_as_usage

SECONDS, GIGABYTES, CHARACTERS = 20.0, 1.0, 300


@dataclass(frozen=True)
class Reader:
    """A kind of file: how a good one is made at a path, and what reads it, whole."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    name: str = "file.safetensors"


def values(state: State) -> list[Tensor]:
    return [state[name] for name in state]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def pair() -> tuple[PermutationSpec, Net, Net]:
    a, b = Net(1).eval(), Net(2).eval()
    return rebasin.trace(a, torch.randn(2, 6)), a, b


def kept(path: Path, search: Callable[[Callable[[Any], None]], object]) -> None:
    """Save the last state that a search tells its checkpoint."""
    search(lambda state: state.save(path))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(2)]


def match_state(path: Path) -> None:
    spec, a, b = pair()
    kept(path, lambda save: rebasin.weight_matching(spec, a.state_dict(), b.state_dict(), checkpoint=save))


def activation_state(path: Path) -> None:
    spec, a, b = pair()
    kept(path, lambda save: rebasin.activation_matching(spec, a, b, batches(), checkpoint=save))


def many_state(path: Path) -> None:
    spec, *_ = pair()
    states = [Net(seed).state_dict() for seed in range(3)]
    kept(path, lambda save: match_to_mean(spec, states, checkpoint=save))


def straight_through_state(path: Path) -> None:
    spec, a, b = pair()
    own = {"steps": 3, "refine": 1, "init": "weight_matching"}
    kept(path, lambda save: straight_through(spec, a, b, CrossEntropy(), batches(), checkpoint=save, **own))


def text_encoder(path: Path, save: Callable[[dict[str, Tensor], Path], object]) -> None:
    whole = random_checkpoint("sd1", 16, depth=1, vocabulary=64)
    save({name: whole[name].clone() for name in whole if name.startswith("cond_stage_model.")}, path)


def read_model(path: Path) -> None:
    checkpoint = rebasin.checkpoints.open_checkpoint(path)
    for name in checkpoint.components:
        values(checkpoint.component(name))


def lora(path: Path) -> None:
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": torch.randn(2, 8), f"{key}.lora_up.weight": torch.randn(3, 2)}
    save_safetensors(path, {**tensors, f"{key}.alpha": torch.tensor(1.0)})


def read_lora(path: Path) -> None:
    from rebasin.adapters import describe_adapter, is_adapter, move_adapter

    state = load_tensors(path)
    if is_adapter(state):
        describe_adapter(state)
        shapes = {"text_model.encoder.layers.0.mlp.fc1.weight": (3, 8)}
        move_adapter(PermutationSpec((), shapes).identity(), state)


def pickled(zipped: bool) -> Callable[[Path], object]:
    tensors = {
        "a": torch.randn(4, 3),
        "b": torch.randn(6, 2).t(),
        "n": torch.arange(4),
        "p": nn.Parameter(torch.ones(2)),
    }
    content = {"state_dict": tensors, "step": 3, "name": "x"}
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=zipped)


def report(path: Path) -> None:
    options = "model=mlp model.width=8 model.depth=1 model.recipe.epochs=1 evaluate.points=3 logger=none"
    job = [sys.executable, "-m", "rebasin.run", *options.split(), f"hydra.run.dir={path.parent}"]
    subprocess.run(job, check=True, capture_output=True)
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other) if other.is_dir() else other.unlink()


def read_report(path: Path) -> None:
    from rebasin.reporting.command import drawn

    drawn(path.parent)


def study(path: Path) -> None:
    from rebasin.search.study import open_study

    found = open_study(path.parent, [OBJECTIVE], 0.0)
    for number in range(3):
        trial = found.ask()
        trial.suggest_float("weight", 0, 1)
        trial.set_user_attr("candidate", {"method": "weighted_sum", "weight": 0.5, "options": {"k": 0.1}})
        trial.set_user_attr("start", f"s{number}")
        trial.report(0.1, 0)
        found.tell(trial, 0.5 - number)
    found.set_user_attr("baseline", {"average": [1.0]})
    found._storage._backend.engine.dispose()  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=DELETE")


NEWEST: list[str] = []
"""The last of Optuna's migrations, once it is known."""


@contextlib.contextmanager
def migrations_read_once() -> Iterator[None]:
    """Optuna executes all its migrations whenever it opens a study, to learn the newest of them: no matter of the file,
    and half of the time that reading takes.
    """
    from optuna.storages._rdb import storage

    manager, ask = storage._VersionManager, storage._VersionManager.get_head_version

    def newest(self: Any) -> str:
        if not NEWEST:
            NEWEST.append(ask(self))
        return NEWEST[0]

    manager.get_head_version = newest
    try:
        yield
    finally:
        manager.get_head_version = ask


def read_study(path: Path) -> None:
    from rebasin.search.study import finished, make_sampler, open_study, seconds_of
    from rebasin.search.verdict import best_trials

    found = open_study(path.parent, [OBJECTIVE], 0.0)
    seconds_of(finished(found))
    best_trials(found, 2)
    found.sampler = make_sampler("random", 0, 1)
    found.ask().suggest_float("weight", 0, 1)


class _Objective:
    name = "loss"


OBJECTIVE: Any = _Objective()

READERS = {
    "safetensors": Reader(
        lambda p: save_safetensors(
            p, {"a": torch.randn(4, 3), "b": torch.ones(2).half(), "n": torch.arange(3)}, {"k": "v"}
        ),
        lambda p: values(load_safetensors(p)),
    ),
    "checkpoint": Reader(lambda p: text_encoder(p, lambda t, to: save_safetensors(to, t)), read_model),
    "ckpt": Reader(pickled(True), lambda p: values(load_tensors(p)), "file.ckpt"),
    "old ckpt": Reader(pickled(False), lambda p: values(load_tensors(p)), "file.ckpt"),
    "lora": Reader(lora, read_lora),
    "permutation": Reader(lambda p: pair()[0].random(3).save(p), Permutation.load),
    "permutations": Reader(
        lambda p: save_permutations(p, [pair()[0].random(i) for i in range(2)]), load_permutations
    ),
    "spec": Reader(
        lambda p: p.write_text(pair()[0].to_json()),
        lambda p: PermutationSpec.from_json(p.read_text(errors="surrogateescape")).random(1),
        "spec.json",
    ),
    "match state": Reader(match_state, MatchState.load),
    "activation state": Reader(activation_state, ActivationState.load),
    "merge state": Reader(many_state, lambda p: ManyState.load(p)),
    "straight-through state": Reader(
        straight_through_state, lambda p: values(StraightThroughState.load(p).auxiliary)
    ),
    "report": Reader(report, read_report, "results.json"),
    "study": Reader(study, migrations_read_once()(read_study), "study.db"),
}


# ------------------------------------------------------------------------------------------------- mutations


DEEP = "@deep@"
"""Stands for a list in a list in a list ..."""


def odd(draw: random.Random) -> Any:
    """A value that a file was not meant to have."""
    numbers = [
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        10**400,
        1.5,
        1e308,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
    ]
    return draw.choice(
        [*numbers, "", "x", "x" * 5000, "\ud800", "a\nb", [], {}, [1, 2], [[]], {"a": 1}, DEEP]
    )


def mutated(data: Any, draw: random.Random) -> Any:
    """JSON data with one change somewhere."""
    spots: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        one = waiting.pop()
        inner = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, value in list(inner):
            spots.append((one, key))
            if isinstance(value, str) and value[:1] in "{[":
                with contextlib.suppress(ValueError):
                    one[key] = value = Packed(json.loads(value))
            waiting.append(value.data if isinstance(value, Packed) else value)
    if not spots:
        return odd(draw)
    where, key = draw.choice(spots)
    now = where[key]
    kind = draw.randrange(6)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[draw.choice(["", "x", str(key) + "x", "name"])] = where.pop(key)
    elif kind == 2 and isinstance(now, int | float):
        where[key] = draw.choice([now + 1, -now, now * 2, now * 1000])
    elif kind == 3 and isinstance(where, list):
        where.insert(key, draw.choice(where))
    elif kind == 4 and isinstance(now, str):
        where[key] = now[: draw.randrange(len(now) + 1)] + draw.choice(["", "?", "0"])
    else:
        where[key] = odd(draw)
    return data


class Packed:
    """JSON inside of a text of JSON."""

    def __init__(self, data: Any) -> None:
        self.data = data


def text_of(data: Any, fit: bool, tensors: State | None = None) -> str:
    """Data as JSON; with `fit` hashes in it are made to fit what they are of, and the `tensors` of the file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Packed):
            return text_of(value.data, fit)
        if isinstance(value, dict):
            done = {key: plain(inner) for key, inner in value.items()}
            if fit and {"hash", "groups", "format"} <= done.keys():
                known = ("groups", "shapes", "buffers", "aliases")
                text = json.dumps({k: done[k] for k in known if k in done}, sort_keys=True)
                done["hash"] = hashlib.sha256(text.encode()).hexdigest()
            if fit and isinstance(done.get("state"), str) and "digest" in done:
                with contextlib.suppress(UnicodeEncodeError):
                    done["digest"] = digest_of_state(done["state"], tensors or {})
            return done
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    deep = 100_000
    return json.dumps(plain(data)).replace(json.dumps(DEEP), "[" * deep + "]" * deep)


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut, repeated or put in."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(max(1, len(data)))
        kind = draw.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + 40]
        elif at < len(data):
            data[at] = draw.randrange(256) if kind == 4 else data[at] ^ 1 << draw.randrange(8)
    return bytes(data)


def safetensors_mutated(raw: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(5)
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if kind == 0:
        return flipped(raw, draw)
    if kind == 1:
        huge = draw.choice((0, 1, length - 1, len(raw), 10**8 - 1, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", huge) + raw[8:]
    if kind == 2:  # a tensor of another type or shape, and a file that is right
        names = [name for name in header if name != "__metadata__"]
        name = draw.choice(names)
        start, end = header[name]["data_offsets"]
        kinds = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
        code, item = draw.choice(list(kinds.items()))
        count = (end - start) // item
        if count * item != end - start:
            return flipped(raw, draw)
        shape = draw.choice(([count], [1, count], [count, 1], [2, count // 2] if count % 2 == 0 else [count]))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        if draw.random() < 0.5:
            body = flipped(body, draw)[: len(body)].ljust(len(body), b"\0")
    else:
        header = mutated(header, draw)
    text = text_of(header, draw.random() < 0.7, tensors_of(header, body)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def tensors_of(header: dict[str, Any], body: bytes) -> State:
    """The tensors of a file, as another reader than ours finds them; none where it finds the file wrong."""
    with contextlib.suppress(Exception):
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        text = json.dumps(entries).encode()
        return safetensors.torch.load(struct.pack("<Q", len(text)) + text + body)
    return {}


def pickle_mutated(raw: bytes, draw: random.Random) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(raw)) or draw.random() < 0.3:
        return flipped(raw, draw)
    out = io.BytesIO()
    way = draw.randrange(4)
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        if way == 3:
            new.writestr("first", b"x" * draw.randrange(5000))
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl") and way == 0:
                data = flipped(data, draw)
            elif entry.filename.endswith("data.pkl") and way == 1:
                spot = draw.randrange(len(data))  # a huge or odd number among the opcodes
                number = draw.choice(
                    [pickle.dumps(n, 2)[2:-1] for n in (2**31, 2**62, -1, 2**70, 1.5, None, "x", ())]
                )
                data = data[:spot] + number + data[spot + 2 :]
            elif way == 2 and draw.random() < 0.3:
                data = draw.choice([b"", data[: len(data) // 2], b"big", data * 2])
            if draw.random() < 0.97:
                new.writestr(entry.filename, data, draw.choice((0, 0, 0, 0, 0, 0, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


def study_mutated(path: Path, draw: random.Random) -> None:
    if draw.random() < 0.4:
        path.write_bytes(flipped(path.read_bytes(), draw))
        return
    places = (
        ("trial_user_attributes", "value_json"), ("study_user_attributes", "value_json"), ("trial_values", "value"),
        ("trial_params", "distribution_json"), ("trial_params", "param_value"), ("trials", "state"),
        ("trials", "datetime_start"), ("trial_intermediate_values", "intermediate_value"),
        ("study_directions", "direction"), ("studies", "study_name"), ("version_info", "schema_version"),
        ("trial_intermediate_values", "step"), ("trials", "number"),
    )  # fmt: skip
    table, column = draw.choice(places)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = database.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
        row, old = draw.choice(rows)
        new: Any = odd(draw)
        if column.endswith("json"):
            new = text_of(mutated({"": json.loads(old)}, draw).get("", None), False)
        elif isinstance(new, list | dict):
            new = text_of(new, False)
        with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))


def damage(path: Path, draw: random.Random) -> None:
    """Change the file."""
    raw = path.read_bytes()
    if path.suffix == ".db":
        study_mutated(path, draw)
    elif path.suffix == ".json":
        whole = draw.random() < 0.3
        text = (
            flipped(raw, draw)
            if whole
            else text_of(mutated(json.loads(raw), draw), draw.random() < 0.7).encode()
        )
        path.write_bytes(text)
    else:
        change = pickle_mutated if path.suffix == ".ckpt" else safetensors_mutated
        path.write_bytes(change(raw, draw))


@dataclass(frozen=True)
class Outcome:
    """What a reader did with a damaged file: `fault` says what it must not have done, "" if nothing."""

    reader: str
    number: int
    read: bool
    seconds: float
    fault: str = ""


def own_time() -> float:
    """Seconds on a clock that stands still while others have the processors; where that is not told, on any clock."""
    waited = 0.0
    with contextlib.suppress(OSError, IndexError, ValueError):
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - waited


def outcomes(name: str, count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """The outcomes of `count` damaged files of one reader; the same for the same seed."""
    reader = READERS[name]
    place = folder / "work"
    place.mkdir()
    path = place / reader.name
    reader.make(path)
    good = folder / f"good-{reader.name}"
    shutil.copy(path, good)
    reader.read(path)
    for number in range(count):
        for other in place.iterdir():
            other.unlink()
        shutil.copy(good, path)
        damage(path, random.Random(f"{seed} {name} {number}"))
        began, read, fault = own_time(), False, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(path)
            read = True
        except RebasinError as error:
            text = str(error)
            if "\n" in text or not text.endswith(".") or len(text) > CHARACTERS:
                fault = f"no sentence of {CHARACTERS} characters ({len(text)}): {text[:400]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        seconds = own_time() - began
        if not fault and seconds > SECONDS:
            fault = f"{seconds:.0f} seconds"
        yield Outcome(name, number, read, seconds, fault)


def main(
    count: Annotated[int, typer.Option(help="damaged files of each reader")] = 5000,
    seed: int = 0,
    only: Annotated[str | None, typer.Option(help="this reader alone")] = None,
) -> None:
    """Damage files of every kind and read them; exit 1 if one was not read or refused as it should be."""
    failed = 0
    for name in [only] if only else READERS:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: list[Outcome] = []
        with tempfile.TemporaryDirectory() as folder:
            for outcome in outcomes(name, count, seed, Path(folder)):
                found.append(outcome)
                if outcome.fault:
                    print(f"  {name} {outcome.number}: {outcome.fault}", flush=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        faults = sum(bool(outcome.fault) for outcome in found) + (grown > GIGABYTES)
        failed += faults
        read = sum(outcome.read for outcome in found)
        slowest = max(outcome.seconds for outcome in found)
        print(
            f"{name:24} {len(found):6} files, {read} read, {faults} faults, at most {slowest:.1f} s, {grown:.2f} GB",
            flush=True,
        )
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    with told_as_usage():
        typer.run(main)
