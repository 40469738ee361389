"""Claims of running writers: one per share of the work, so that no unit has two writers.

A claim is created only if none exists (O_EXCL on disk, a create-only put on an object store) and
renewed every minute. It is taken over if its process has exited, or if it has not been renewed for
ten minutes. Writers check their claim before every commit and stop if they have lost it.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from types import TracebackType
from typing import Self

from fkdpipe.common.errors import ClaimedError, StoreError
from fkdpipe.storage import process
from fkdpipe.storage.location import PARTIAL, Location
from fkdpipe.storage.schema import Json, canonical

log = logging.getLogger(__name__)

FOLDER = "commits/claims"
RENEW_SECONDS = 60.0
STALE_SECONDS = 600.0


class Claim:
    """While it is held, units index, index + world, index + 2 world, ... belong to this process."""

    def __init__(self, location: Location, index: int, world: int) -> None:
        self._location = location
        self._index, self._world = index, world
        self._key = f"{FOLDER}/{index + 1}-of-{world}.json"
        self._body = {**process.facts(), "nonce": uuid.uuid4().hex}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        """Take the claim.

        Raises:
            ClaimedError: another live process holds it, or divides the work differently.
        """
        self._refuse_other_divisions()
        data = canonical(self._body)
        if not self._location.create(self._key, data):
            holder = self._read(self._key)
            if holder is not None and self._alive(holder, self._key):
                raise ClaimedError(self._message(holder, self._key), code="claimed")
            log.info("taking over the claim of a process that has exited (%s)", _name(holder))
            self._location.delete(self._key)
            if not self._location.create(self._key, data):
                raise ClaimedError(self._message(self._read(self._key), self._key), code="claimed")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._held():
            self._location.delete(self._key)

    def check(self) -> None:
        """Raises ClaimedError if another process has taken over the claim."""
        if not self._held():
            raise ClaimedError(
                f"{self._location.url}: another process has taken over part {self._index + 1} of "
                f"{self._world}, so this one stops. Everything it committed is kept.",
                code="claim-lost",
            )

    def _held(self) -> bool:
        holder = self._read(self._key)
        return holder is not None and holder.get("nonce") == self._body["nonce"]

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            try:
                if self._held():
                    self._location.write(self._key, canonical(self._body))
            except StoreError as error:  # a full disk or a lost connection may pass
                log.warning("cannot renew the claim, trying again: %s", error)

    def _refuse_other_divisions(self) -> None:
        for key, _ in list(self._location.list(FOLDER)):
            name = key.rsplit("/", 1)[-1].removesuffix(".json")
            if not name.endswith((f"-of-{self._world}", PARTIAL)):  # not claims yet
                holder = self._read(key)
                if holder is not None and self._alive(holder, key):
                    raise ClaimedError(
                        f"{self._message(holder, key)} It works on part {name.replace('-', ' ')}, "
                        f"this process on part {self._index + 1} of {self._world}: the same units "
                        "would be made twice. Use the same N in --part I/N for all processes.",
                        code="claimed",
                    )
                self._location.delete(key)

    def _alive(self, holder: Json, key: str) -> bool:
        ours = process.facts()
        if all(holder.get(word) == ours[word] for word in ("host", "boot", "space")):
            return process.started(int(holder.get("pid", 0))) == holder.get("started")
        age = self._location.age_seconds(key)
        return age is not None and age < STALE_SECONDS

    def _read(self, key: str) -> Json | None:
        try:
            return json.loads(self._location.read(key))
        except (FileNotFoundError, ValueError):
            return None  # deleted, or truncated while it was created: nobody holds it

    def _message(self, holder: Json | None, key: str) -> str:
        return (
            f"{self._location.url} is being written by {_name(holder)}. Wait for it to finish. If "
            "that process no longer exists, its claim can be taken over "
            f"{STALE_SECONDS / 60:.0f} minutes after its last renewal, or at once if you delete "
            f"{key}."
        )


def _name(holder: Json | None) -> str:
    return "another process" if not holder else f"process {holder.get('pid')} on {holder['host']}"
