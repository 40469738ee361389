"""Two writers of the same part: one is refused; a dead one is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from fkdpipe.common.errors import ClaimedError, StoreError
from fkdpipe.storage import claims, process, writer
from fkdpipe.storage.claims import Claim
from fkdpipe.storage.location import open_location


@pytest.fixture(params=["disk", "memory"])
def location(request, tmp_path):
    place = tmp_path if request.param == "disk" else f"memory://{tmp_path.name}"
    return open_location(place)


def test_the_same_part_is_refused_while_it_is_held(location):
    with (
        Claim(location, 0, 2),
        Claim(location, 1, 2),
        pytest.raises(ClaimedError, match="is being written by process"),
        Claim(location, 0, 2),
    ):
        pass
    with Claim(location, 0, 2):
        pass
    assert list(location.list(claims.FOLDER)) == []


def test_another_division_of_the_work_is_refused(location):
    with Claim(location, 0, 2), pytest.raises(ClaimedError, match="Use the same N in --part"):
        Claim(location, 1, 3).__enter__()


def put(location, **changes) -> str:
    key = f"{claims.FOLDER}/1-of-1.json"
    body = {**process.facts(), "nonce": "theirs", **changes}
    location.write(key, json.dumps(body).encode())
    return key


def test_a_dead_process_of_this_machine_is_taken_over_at_once(location):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    put(location, pid=child.pid)
    with Claim(location, 0, 1) as claim:
        claim.check()


def test_a_process_number_that_was_given_again_is_not_the_holder(location):
    put(location, pid=os.getpid(), started="1")
    with Claim(location, 0, 1) as claim:
        claim.check()


def test_a_process_of_another_machine_is_believed_until_its_claim_is_old(location, monkeypatch):
    put(location, host="elsewhere", boot="other")
    with pytest.raises(ClaimedError, match="on elsewhere"):
        Claim(location, 0, 1).__enter__()
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.0)
    time.sleep(0.01)
    with Claim(location, 0, 1) as claim:
        claim.check()


def test_a_claim_cut_off_while_it_was_written_is_nobodys(location):
    location.write(f"{claims.FOLDER}/1-of-1.json", b'{"host": "h')
    with Claim(location, 0, 1) as claim:
        claim.check()


def test_a_writer_that_lost_its_claim_stops_before_it_commits(location):
    with Claim(location, 0, 1) as claim:
        claim.check()
        put(location, pid=1)
        with pytest.raises(ClaimedError, match="has taken over part 1 of 1"):
            claim.check()
    assert location.length(f"{claims.FOLDER}/1-of-1.json")  # theirs, and left alone


def test_a_held_claim_is_renewed(location, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.05)
    key = f"{claims.FOLDER}/1-of-1.json"
    with Claim(location, 0, 1):
        time.sleep(0.5)
        assert location.age_seconds(key) < 0.4


def test_a_renewal_that_failed_is_tried_again(location, monkeypatch, caplog):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.01)
    plain, tried = location.write, threading.Event()
    renewed = threading.Event()

    def write(key, data):
        if not tried.is_set():
            tried.set()
            raise StoreError("the disk is full")
        plain(key, data)
        renewed.set()

    monkeypatch.setattr(location, "write", write)
    with Claim(location, 0, 1) as claim:
        assert renewed.wait(30)
        claim.check()
    assert "cannot renew the claim, trying again: the disk is full" in caplog.text


def test_only_partial_files_of_writers_that_are_gone_are_swept(tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    here, other = process.machine(), "0" * 8
    left = {
        f"zarr.json.{here}-{os.getpid()}.partial": False,  # being written now
        f"zarr.json.{here}-{child.pid}.partial": True,
        f"commits/images/part.json.{other}-{child.pid}.partial": False,  # young, and elsewhere
        f"rounds/0/labels/t/ids/c/2/0/0.{other}-7.partial": True,  # of a unit whose claim we hold
        f"rounds/0/labels/t/ids/c/1/0/0.{other}-7.partial": False,  # of another part's unit
    }
    location = open_location(tmp_path / "store")
    for name in left:
        location.write(name, b"half")
    store = types.SimpleNamespace(location=location)
    assert writer.sweep(store, 0, 2) == 2
    assert {key for key, _ in location.list()} == {key for key, gone in left.items() if not gone}
    monkeypatch.setattr(writer, "STALE_SECONDS", -1.0)
    assert writer.sweep(store, 0, 2) == 1
    assert location.length(f"zarr.json.{here}-{os.getpid()}.partial")


def test_a_claim_that_is_being_written_is_not_taken_for_another_division(location):
    body = json.dumps(process.facts()).encode()
    location.write(f"{claims.FOLDER}/2-of-2.json.{process.machine()}-{os.getpid()}.partial", body)
    with Claim(location, 0, 2) as claim:
        claim.check()
