"""A decoder that takes far more memory than its file's structure shows costs one sample, not the machine."""

import io
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from neo_megatron.data import memory_limit
from neo_megatron.data.image import decode
from neo_megatron.data.memory_limit import MAX_DECODING_BYTES, limited_memory
from neo_megatron.demo import talk
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.inference.prompts import new_prompt

_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
_GREEDY = (64, 33)


@pytest.fixture
def greedy(monkeypatch, tmp_path) -> Path:
    """An image whose decoder asks for more memory than the limit (which it never touches)."""
    load = ImageFile.ImageFile.load

    def take(image: ImageFile.ImageFile) -> object:
        if image.size == _GREEDY:
            np.empty(MAX_DECODING_BYTES * 3 // 2, np.uint8)  # other memory may be freed meanwhile
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", take)
    Image.new("RGB", _GREEDY).save(tmp_path / "greedy.png")
    assert decode((tmp_path / "greedy.png").read_bytes(), "greedy").size == _GREEDY  # nothing else limits it
    return tmp_path / "greedy.png"


@pytest.fixture(autouse=True)
def restored():
    """The limit of the process is as before."""
    yield
    assert resource.getrlimit(resource.RLIMIT_DATA) == _UNLIMITED


def test_preprocessing_rejects_the_image_and_goes_on(bench, new_sample, greedy):
    name = greedy.name
    (bench.path / "images").mkdir(exist_ok=True)
    (bench.path / "images" / name).write_bytes(greedy.read_bytes())
    bench.preprocess([new_sample("<image>", "x", image=name), new_sample()])
    (reject,) = bench.rejects()
    assert reject["kind"] == Reason.DECOMPRESSION_BOMB
    assert name in str(reject) and "takes too much memory to decode" in str(reject)


def test_prompts_and_the_demo_reject_it(bench, greedy):
    for read in (lambda: new_prompt("What?", [greedy], bench.settings), lambda: talk._read(str(greedy))):
        with pytest.raises(RejectedSample) as caught:
            read()
        assert caught.value.reason == Reason.DECOMPRESSION_BOMB


def test_a_lower_limit_of_the_process_does_not_make_an_image_wrong(greedy):
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        before = resource.getrlimit(kind)
        held = int(Path("/proc/self/statm").read_text().split()[5 if kind == resource.RLIMIT_DATA else 0])
        resource.setrlimit(kind, (held * resource.getpagesize() + (1 << 30), before[1]))
        try:
            words = r"greedy takes too much memory .* may take only \d+ MiB .*ulimit"
            with pytest.raises(DataError, match=words), limited_memory():
                decode(greedy.read_bytes(), "greedy")
        finally:
            resource.setrlimit(kind, before)


def test_threads_share_the_limit_and_the_last_one_lifts_it():
    together = threading.Barrier(4)
    limits = []

    def enter(number: int) -> None:
        together.wait()
        with limited_memory():
            limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
            together.wait()
        together.wait()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(enter, range(4)))
    assert len(set(limits)) == 1 and limits[0] > MAX_DECODING_BYTES


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_largest_allowed_image_needs_a_third_of_the_limit():
    """The limit is not what decides about images that the limits of their structure allow."""
    file = io.BytesIO()
    Image.new("L", (11584, 11584), 128).save(file, "JPEG", quality=30)
    most = memory_limit.MAX_DECODING_BYTES // 3
    held = memory_limit._held()
    resource.setrlimit(resource.RLIMIT_DATA, (held + most, _UNLIMITED[1]))
    try:
        assert decode(file.getvalue(), "large").size == (11584, 11584)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, _UNLIMITED)
