"""Stores on an object store: a real S3 server (moto's) on the loopback interface."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
import zarr
from pipeline import make_store, train

from fkdpipe.common.errors import StoreError, UsageError
from fkdpipe.inspect import report
from fkdpipe.storage import verify
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import open_store


@pytest.fixture(scope="module")
def server():
    """An S3 endpoint; the environment that points obstore at it."""
    pytest.importorskip("moto")
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="labels")
        yield environment
    running.stop()


@pytest.fixture
def url(server) -> str:
    return f"s3://labels/{uuid.uuid4().hex}"


def test_a_location_keeps_its_word(url):
    place = open_location(url)
    assert place.length("a/b") is None
    place.write("a/b", b"one")
    assert place.read("a/b") == b"one"
    assert not place.create("a/b", b"two")
    assert place.create("a/c", b"two")
    assert sorted(place.list("a")) == [("a/b", 3), ("a/c", 3)]
    assert place.age_seconds("a/b") is not None
    place.delete("a/b")
    place.delete("a/b")
    with pytest.raises(FileNotFoundError):
        place.read("a/b")


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_generate_train_report_and_verify_work_under_a_url(tmp_path, folder, teacher, server, kind):
    place = f"{'s3://labels' if kind == 's3' else 'memory://'}/{uuid.uuid4().hex}"
    local = make_store(tmp_path / "local", folder, [teacher], features=())
    store = make_store(place, folder, [teacher])
    for key, _ in local.location.list():
        assert store.location.read(key) == local.location.read(key), key
    assert not verify.verify(store, full=True)
    a, b = report.measure(local), report.measure(store)
    assert (a.stored_bytes, a.fields) == (b.stored_bytes, b.fields)
    results = [
        train(tmp_path / name / "run", folder, s, epochs=2)
        for name, s in (("a", local), ("b", store))
    ]
    assert results[0].student.read_bytes() == results[1].student.read_bytes()


def test_wide_labels_are_streamed_from_a_url(tmp_path, folder, teacher, url):
    store = make_store(url, folder, [teacher], form="full")
    local = make_store(tmp_path / "local", folder, [teacher], form="full")
    results = [
        train(tmp_path / name / "run", folder, s, epochs=2, target="full")
        for name, s in (("a", local), ("b", store))
    ]
    assert results[0].student.read_bytes() == results[1].student.read_bytes()


def test_plain_zarr_opens_it(folder, teacher, url):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    store = make_store(url, folder, [teacher])
    opened = ObjectStore(from_url(url), read_only=True)
    ids = zarr.open_array(store=opened, path="rounds/0/labels/t/ids", mode="r")
    assert ids.shape == (store.num_images, 4, 3)


def test_what_cannot_be_reached_is_said(server):
    place = open_location("s3://no-such-bucket/x")
    for use in (
        lambda: open_store("s3://no-such-bucket/x"),
        lambda: place.read("a"),
        lambda: place.write("a", b""),
        lambda: place.create("a", b""),
        lambda: list(place.list()),
    ):
        with pytest.raises(StoreError, match="s3://no-such-bucket/x: the bucket does not exist"):
            use()
    with pytest.raises(UsageError, match="obstore cannot open"):
        open_location("gopher://x/y")


@pytest.mark.slow
def test_killed_writers_leave_nothing_that_counts(tmp_path, folder, checkpoint, server, url):
    """kill -9 at random moments, then the same command: equal to an uninterrupted run."""
    command = [
        sys.executable, "-m", "fkdpipe", "generate", str(folder), url,
        "--teacher", f"test_resnet={checkpoint}", "--form", "topk:3", "--crops", "150",
        "--source", "t", "--set", "threads=1",
    ]  # fmt: skip
    small_units = "import fkdpipe.storage.schema as schema; schema.UNIT_IMAGES = 16; "
    command[1:3] = ["-c", small_units + "from fkdpipe.cli import main; main()"]
    environment = {**os.environ, **server}
    random = np.random.default_rng(0)
    place = open_location(url)
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(place.list("commits/rounds")):
            time.sleep(0.05)
        time.sleep(float(random.uniform(0, 0.5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = [*command]
    whole[whole.index(url)] = str(tmp_path / "whole")
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    a, b = open_store(url), open_store(tmp_path / "whole")
    assert not verify.verify(a, full=True)
    keys = {key for key, _ in b.location.list()}
    assert {key for key, _ in a.location.list()} == keys
    for key in keys:
        assert a.location.read(key) == b.location.read(key), key


def test_memory_stores_of_one_process_are_one_place():
    name = f"memory://{uuid.uuid4().hex}"
    open_location(name).write("x", b"1")
    assert open_location(name).read("x") == b"1"
