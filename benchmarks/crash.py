"""Kill -9, SIGTERM, a full disk and power cuts, then resume: are committed data lost or changed?

`fkdpipe generate --part 1/2` and `--part 2/2` run as two processes on one store and are stopped
repeatedly until the store is complete; then a new store is started.

    aimed       one process kills itself at a step of a write, the other is killed at the same time
    random      both are killed at a random time
    power cut   as aimed; then data not flushed to disk are torn, zeroed or lost
    SIGTERM     both receive SIGTERM
    full disk   a small tmpfs, enlarged after the failure
    hydration   a reader is killed while it fills the label cache; a second one waits for it

After every stop and at the end, each committed unit must exist with the same commit record and the
same bytes (`lost_units`, `changed_units`), and it must not be regenerated (`remade_units`). A
finished store must be identical to that of an uninterrupted run, byte for byte, and pass `fkdpipe
verify --full` (`stores_differing`). A kill counts as inside a write if it left a partial file or an
uncommitted shard of that process behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import common
import faults
import numpy as np
import small
from faults import Watch
from small import Bench

from fkdpipe.storage import cache, commits, labels, reader
from fkdpipe.storage.arrays import Arrays
from fkdpipe.storage.store import Store, open_store

DONE, STOPPED, WRONG = 0, 1, 3  # exit codes; WRONG: a reader received wrong data
PARTS = 2
LONGEST_STEPS = 120  # kills are aimed at the first LONGEST_STEPS steps of writing


@dataclass
class Trial:
    """One store and its history.

    Attributes:
        committed: key of a commit record to (its bytes, inodes of its files) when first seen.
    """

    store: Path
    counts: Counter[str] = field(default_factory=Counter)
    committed: dict[str, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)

    def note_committed(self, noted: list[faults.Event]) -> None:
        """Record new commit records, and check that the known ones are unchanged."""
        for event in noted:
            if event["what"] == "written" and _is_marker(event["key"]):
                self.committed.setdefault(event["key"], self._read(event["key"]))
        self.check()

    def check(self) -> None:
        for key, (data, inodes) in self.committed.items():
            there, now = self._read(key)
            if not there:
                self.counts["lost_units"] += 1
            elif there != data or not self._sound(there):
                self.counts["changed_units"] += 1
            elif now != inodes:
                self.counts["remade_units"] += 1

    def _read(self, key: str) -> tuple[bytes, tuple[int, ...]]:
        try:
            data = (self.store / key).read_bytes()
            files = commits.marker_from(data).files
            return data, tuple((self.store / name).stat().st_ino for name in files)
        except (FileNotFoundError, commits.BrokenRecordError):
            return b"", ()

    def _sound(self, data: bytes) -> bool:
        files = commits.marker_from(data).files
        return all(commits.entry((self.store / k).read_bytes()) == e for k, e in files.items())


@dataclass(frozen=True)
class Stage:
    """Setting of a scenario: bench, folder, expected store, and random generator.

    seconds: duration of an uninterrupted run, so that stops fall within it.
    """

    bench: Bench
    root: Path
    whole: dict[str, bytes]
    seconds: float
    chance: random.Random

    def watches(self, store: Path) -> list[Watch]:
        journal = self.root / "journal"
        shutil.rmtree(journal, ignore_errors=True)
        journal.mkdir()
        seed = self.chance.randrange(2**32)
        return [Watch(store, journal / f"{part}.log", seed=seed) for part in range(PARTS)]


def _is_marker(key: str) -> bool:
    return key.startswith("commits/") and key.rsplit("/", 1)[-1].removesuffix(".json").isdigit()


def contents(store: Path) -> dict[str, bytes]:
    """Every object of a store except the claims, which name the writers."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and "claims" not in path.parts
    }


def start(stage: Stage, store: Path, watches: list[Watch]) -> list[int]:
    children = []
    for part, watch in enumerate(watches, start=1):
        words = small.generate_words(stage.bench, store, "--part", f"{part}/{PARTS}")
        log = stage.root / f"part{part}.txt"
        log.write_text("")
        children.append(small.fork(small.command(words, watch.install), log))
    return children


def stop_aimed(stage: Stage, children: list[int]) -> list[int]:
    """Wait for the first process to end; if it was killed, kill the others at once."""
    first, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    others = [child for child in children if child != first]
    for child in others:
        if code < 0:
            small.kill(child)
    codes = {first: code, **{child: small.wait(child) for child in others}}
    return [codes[child] for child in children]


def stop_random(
    stage: Stage, children: list[int], number: int, within: tuple[float, float]
) -> list[int]:
    """within: range of the stop time, as shares of the duration of a run."""
    time.sleep(stage.chance.uniform(*within) * stage.seconds)
    for child in children:
        small.kill(child, number)
    return [small.wait(child) for child in children]


def attempt(stage: Stage, trial: Trial, how: str) -> bool:
    """Start both parts and stop them; True if both finished by themselves."""
    watches = stage.watches(trial.store)
    if how in ("aimed", "power cut"):
        aimed = stage.chance.randrange(PARTS)
        steps = stage.chance.randint(1, LONGEST_STEPS)
        watches[aimed] = Watch(trial.store, watches[aimed].journal, steps, watches[aimed].seed)
    before = faults.snapshot(trial.store)
    children = start(stage, trial.store, watches)
    if how == "random":
        codes = stop_random(stage, children, signal.SIGKILL, within=(0.1, 1.0))
    elif how == "SIGTERM":
        until = time.monotonic() + 60  # until then, the handler may be missing
        while not all(w.journal.exists() and w.journal.stat().st_size for w in watches):
            assert time.monotonic() < until, _logs(stage)
            time.sleep(0.01)
        codes = stop_random(stage, children, signal.SIGTERM, within=(0.0, 0.3))
    else:
        codes = stop_aimed(stage, children)
    trial.counts["attempts"] += 1
    left = inside_write(trial.store, before, children)
    for child, code, inside in zip(children, codes, left, strict=True):
        trial.counts["kills"] += code == -signal.SIGKILL
        trial.counts["kills_inside_write"] += code == -signal.SIGKILL and inside
        wanted = (DONE, -signal.SIGKILL) if how != "SIGTERM" else (DONE, STOPPED)
        if code not in wanted:
            trial.counts["other_ends"] += 1
            common.say(f"process {child} ended with {code}:\n{_logs(stage)}")
        trial.counts["terminated"] += how == "SIGTERM" and code == STOPPED
    noted = faults.events([watch.journal for watch in watches])
    if how == "power cut" and -signal.SIGKILL in codes:
        trial.counts["taken_away"] += faults.cut_power(trial.store, before, noted, stage.chance)
        trial.counts["power_cuts"] += 1
    trial.note_committed(noted)
    return codes == [DONE] * PARTS


def _logs(stage: Stage) -> str:
    return "\n".join((stage.root / f"part{k + 1}.txt").read_text()[-2000:] for k in range(PARTS))


def inside_write(store: Path, before: dict[str, int], children: list[int]) -> list[bool]:
    """Whether each process left a partial file, or a new shard that is in no commit record."""
    new = [name for name, inode in faults.snapshot(store).items() if before.get(name) != inode]
    known: set[str] = set()
    for path in (store / "commits").rglob("*.json"):
        with contextlib.suppress(commits.BrokenRecordError):
            known |= set(commits.marker_from(path.read_bytes()).files)
    found = [False] * len(children)
    for name in new:
        key = Path(name).relative_to(store).as_posix()
        words = key.split("/")
        if key.endswith(".partial"):
            pid = int(key.split(".")[-2].rpartition("-")[2])
            found[children.index(pid)] = True
        elif "c" in words and key not in known and words[0] == "rounds":
            found[int(words[words.index("c") + 1]) % PARTS] = True
    return found


def run(stage: Stage, how: str, kills: int) -> Counter[str]:
    """Stop runs until `kills` processes were stopped, or after `kills` attempts."""
    total: Counter[str] = Counter()
    number = 0
    counted = "terminated" if how == "SIGTERM" else "kills"
    while total[counted] < kills:
        number += 1
        trial = Trial(stage.root / f"store-{number}")
        while not attempt(stage, trial, how) and total[counted] + trial.counts[counted] < kills:
            pass
        total += finish(stage, trial)
        common.say(f"{how}: {total['kills']} kills, {total[counted]} of {kills}")
    return total


def finish(stage: Stage, trial: Trial) -> Counter[str]:
    """Run both parts to the end, compare with the uninterrupted run, and delete the store."""
    watches = stage.watches(trial.store)
    codes = [small.wait(child) for child in start(stage, trial.store, watches)]
    if codes != [DONE] * PARTS:
        common.say(_logs(stage))
    trial.check()
    log = stage.root / "verify.txt"
    words = ["verify", str(trial.store), "--full", "--cache", str(stage.root / "none")]
    sound = small.wait(small.fork(small.command(words), log)) == DONE
    same = contents(trial.store) == stage.whole
    trial.counts["stores"] += 1
    trial.counts["stores_differing"] += not (sound and same and codes == [DONE] * PARTS)
    trial.counts["committed_units"] += len(trial.committed)
    shutil.rmtree(trial.store)
    return trial.counts


@contextlib.contextmanager
def small_disk(mount_point: Path) -> Iterator[bool]:
    """A tmpfs of 300 kB; False if this process may not mount one."""
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount_point)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(mount_point)], check=True)


def full_disk(stage: Stage, times: int) -> Counter[str] | None:
    """Fill a small disk while generating, and enlarge it step by step; None if not possible."""
    total: Counter[str] = Counter()
    for number in range(times):
        mount_point = stage.root / f"disk-{number}"
        with small_disk(mount_point) as mounted:
            if not mounted:
                return None
            trial = Trial(mount_point / "store")
            for size in (stage.chance.randint(300, 500), stage.chance.randint(500, 700)):
                resize = ["mount", "-o", f"remount,size={size}k", str(mount_point)]
                subprocess.run(resize, check=True)
                watches = stage.watches(trial.store)
                codes = [small.wait(c) for c in start(stage, trial.store, watches)]
                said = [log.read_text() for log in sorted(stage.root.glob("part?.txt"))]
                clear = ["the disk is full" in text and "Traceback" not in text for text in said]
                trial.counts["attempts"] += 1
                for code, good in zip(codes, clear, strict=True):
                    trial.counts["full_disks"] += code == STOPPED and good
                    trial.counts["other_ends"] += not (code == DONE or (code == STOPPED and good))
                trial.note_committed(faults.events([w.journal for w in watches]))
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount_point)], check=True)
            total += finish(stage, trial)
    return total


def served(store: Store, cache_dir: Path) -> str:
    """Checksum of all boxes and labels as read by the trainer."""
    rows, crops_m = np.arange(store.num_images), np.arange(small.CROPS)
    found = reader.finished(store, [("labels", small.SOURCE, "")])
    boxes = reader.CropReader(store, found.crops, cache_dir).take(rows, crops_m)
    target = labels.Target("marginal-smoothing", 5)
    sparse = reader.SparseReader(store, found.labels[0], cache_dir).take(rows, crops_m, target)
    total = hashlib.sha256()
    for array in (boxes.box_NM4, boxes.flip_NM, sparse.ids_BK, sparse.prob_BK, sparse.rest_B):
        total.update(array.tobytes())
    return total.hexdigest()


def fill_cache(store: Path, cache_dir: Path, expected: str, die_at: int) -> None:
    """Read everything through the cache; die while filling it, or exit with WRONG."""
    count = 0

    def stepping(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*args: object, **options: object) -> object:
            nonlocal count
            for k in (0, 1):  # before and after
                result = plain(*args, **options) if k else None
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    for owner, name in ((os, "rename"), (cache, "_file_crc"), (Arrays, "decode")):
        stepping(owner, name)
    if served(open_store(store), cache_dir) != expected:
        raise SystemExit(WRONG)


def kill_hydrations(stage: Stage, store: Path, kills: int) -> Counter[str]:
    """Kill a reader that fills the cache; a second one that waits must receive correct data."""
    truth = stage.root / "truth.txt"
    truth.write_text("")
    small.wait(small.fork(lambda: print(served(open_store(store), stage.root / "sound")), truth))
    expected = truth.read_text().strip()
    steps = 2 * (2 * 2 * len(list((store / "commits/rounds/0/crops").glob("[0-9]*.json"))) + 10)
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        cache_dir = stage.root / f"cache-{counts['attempts']}"
        die_at = 0 if stage.chance.random() < 0.3 else stage.chance.randint(1, steps)
        log = stage.root / "cache.txt"
        first = small.fork(lambda d=die_at, c=cache_dir: fill_cache(store, c, expected, d), log)
        if not die_at:
            time.sleep(stage.chance.uniform(0.02, 0.6))
            small.kill(first)
        second = small.fork(lambda c=cache_dir: fill_cache(store, c, expected, 0), log)
        codes = [small.wait(first), small.wait(second)]
        counts["attempts"] += 1
        counts["kills"] += codes[0] == -signal.SIGKILL
        counts["half_caches_served"] += WRONG in codes
        counts["other_ends"] += codes[0] not in (DONE, -signal.SIGKILL) or codes[1] != DONE
        counts["partials_left"] += any(cache_dir.glob("*.partial"))
        shutil.rmtree(cache_dir)
    return counts


def main() -> None:
    options = common.arguments(__doc__)
    budget = {"aimed": 130, "random": 90, "power cut": 60, "SIGTERM": 12}
    hydrations, disks, images = 60, 4, 120
    if options.quick:
        budget = {"aimed": 12, "random": 4, "power cut": 4, "SIGTERM": 1}
        hydrations, disks, images = 3, 1, 24
    rows = []
    with tempfile.TemporaryDirectory(prefix="fkdpipe-crash-") as folder:
        root = Path(folder)
        bench = small.prepare(root, images=images)
        log = root / "whole.txt"
        words = small.generate_words(bench, root / "whole")
        began = time.monotonic()
        assert small.wait(small.fork(small.command(words), log)) == DONE, log.read_text()
        seconds = time.monotonic() - began
        stage = Stage(bench, root, contents(root / "whole"), seconds, random.Random(0))
        for how, kills in budget.items():
            rows.append({"what": how, **run(stage, how, kills)})
        filled = full_disk(stage, disks)
        rows.append({"what": "full disk", **(filled or {"skipped": "no right to mount"})})
        rows.append({"what": "hydration", **kill_hydrations(stage, root / "whole", hydrations)})
    generating = [row for row in rows if row["what"] != "hydration"]

    def total(name: str, among: list[dict] = rows) -> int:
        return sum(int(row.get(name, 0)) for row in among)

    figures = {
        "kills": total("kills", generating),
        "kills_inside_write": total("kills_inside_write", generating),
        "share_inside_write": round(
            total("kills_inside_write", generating) / total("kills", generating), 3
        ),
        **{name: total(name) for name in (
            "lost_units", "changed_units", "remade_units", "stores", "stores_differing",
            "committed_units", "power_cuts", "terminated", "full_disks", "other_ends",
            "half_caches_served", "partials_left",
        )},
        "hydration_kills": rows[-1]["kills"],
    }  # fmt: skip
    common.finish("crash", rows, figures, quick=options.quick)


if __name__ == "__main__":
    main()
