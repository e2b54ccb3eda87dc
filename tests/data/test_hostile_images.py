"""Images from Pillow's own tests: from many programs, from fuzzing, decompression bombs, and broken files."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
import requests

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.image import decode
from neo_megatron.errors import Reason

SDIST = "pillow-13.0.0.tar.gz"
SHA256 = "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"
FILES = 1060

# Decodes every file in a process of its own, and reports what it did besides.
PROBE = """
import json, sys
from neo_megatron.errors import RejectedSample
from neo_megatron.data.image import decode, grid_of_size, header_size, patches_from_image, read_image
done, watched = [], False

def watch(event, arguments):
    writes = event == "open" and arguments[1] is not None and set(arguments[1]) & set("wax+")
    if watched and (writes or event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system")):
        done.append([event, str(arguments[0])])

def look(how, name):
    try:
        return how(read_image(name), name)
    except RejectedSample as rejected:
        return rejected.reason.value

def by_pixels(data, name):
    image = decode(data, name)
    grid = grid_of_size(image.height, image.width, name, 65536, 1 << 20)
    patches_from_image(image, grid)
    return grid

sys.addaudithook(watch)
for name in sys.stdin.read().splitlines():
    watched = True
    found = look(by_pixels, name), look(lambda *file: grid_of_size(*header_size(*file), name, 65536, 1 << 20), name)
    watched = False
    print(json.dumps([name, *found]), flush=True)
# Not ru_maxrss, which a process inherits from the one that started it.
status = open("/proc/self/status").read()
print(json.dumps([done, int(status.split("VmHWM:")[1].split()[0])]))
"""


def indexes() -> list[str]:
    """The package indexes that pip is configured to use, and the default."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line for line in told.splitlines() if "index-url=" in line]
    return [*re.findall(r"https?://[^\s']+", "\n".join(lines)), "https://pypi.org/simple"]


def download(target: Path) -> None:
    """The source distribution from the first index that has it; pip itself would prepare to build it."""
    failures = []
    for index in indexes():
        page = f"{index.rstrip('/')}/pillow/"
        try:
            links = requests.get(page, timeout=60)
            links.raise_for_status()
            link = re.search(rf'href="([^"#]*{re.escape(SDIST)})[#"]', links.text)
            if link:
                file = requests.get(urljoin(links.url, link[1]), timeout=300)
                file.raise_for_status()
                target.write_bytes(file.content)
                return
            failures.append(f"{index} does not list {SDIST}")
        except requests.RequestException as error:
            failures.append(f"{index}: {error}")
    pytest.skip(f"{SDIST} cannot be downloaded ({'; '.join(failures)})")


@pytest.fixture(scope="session")
def images(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the images."""
    archive = pytestconfig.cache.mkdir("pillow") / SDIST
    if not archive.exists():
        download(archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        archive.unlink()
        pytest.fail(f"{SDIST} is not the file it should be")
    directory = tmp_path_factory.mktemp("pillow")
    with tarfile.open(archive) as files:
        wanted = [file for file in files if "/Tests/images/" in file.name]
        files.extractall(directory, wanted, filter="data")
    return directory / SDIST.removesuffix(".tar.gz") / "Tests" / "images"


@pytest.fixture(scope="session")
def names(images: Path) -> list[str]:
    return sorted(str(file.relative_to(images)) for file in images.rglob("*") if file.is_file())


def shown(images: Path, name: str) -> np.ndarray:
    """An image as `decode` returns it, uint8 [height, width, 3]."""
    return np.asarray(decode((images / name).read_bytes(), name))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.int16) - other).mean())


def netpbm(file: Path) -> np.ndarray:
    """A binary PGM or PPM file, by the definition of the format."""
    data = file.read_bytes()
    kind, width, height, most, start = re.match(rb"(P[56])(?:\s+#.*)?\s+(\d+)\s+(\d+)\s+(\d+)\s", data).groups() + (0,)
    start = re.match(rb"P[56](?:\s+#.*)?\s+\d+\s+\d+\s+\d+\s", data).end()
    values = np.frombuffer(data, ">u2" if int(most) > 255 else "u1", offset=start)
    return values.reshape(int(height), int(width), 3 if kind == b"P6" else 1)


def test_decoding_never_crashes_or_takes_much_memory(images, names, tmp_path):
    """And the header gives the grid of every image that can be decoded."""
    assert len(names) == FILES
    process = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(str(images / name) for name in names),
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0
    *found, (events, peak) = map(json.loads, process.stdout.splitlines())
    assert len(found) == FILES
    assert events == [] and list(tmp_path.iterdir()) == []
    assert peak * 1024 < 1.5e9
    readable = [(name, pixels, header) for name, pixels, header in found if isinstance(pixels, list)]
    assert len(readable) > 700
    assert [name for name, pixels, header in readable if pixels != header] == []


def test_every_image_is_kept_or_rejected(bench, images, names, new_sample):
    (bench.path / "images").symlink_to(images)
    records = [new_sample("What?", f"It is {name}.", image=name) for name in names]
    shards = bench.preprocess(records, settings=PreprocessConfig(min_pixels=1024, max_pixels=65536))
    rejects = bench.rejects()
    assert len(shards) + len(rejects) == FILES
    assert len({reject["record"] for reject in rejects}) == len(rejects)
    reasons = {names[reject["record"]]: reject for reject in rejects}
    for name, reject in reasons.items():
        assert name in reject["reason"] and reject["kind"] in set(Reason)
        assert not re.search(r"\b0x[0-9a-f]{6}", reject["reason"])  # an address: another one in every run
    for name in ("decompression_bomb.gif", "l2rgb_read.bmp", "bmp/b/reallybig.bmp"):
        assert reasons[name]["kind"] == Reason.DECOMPRESSION_BOMB
    for name in ("truncated_jpeg.jpg", "broken_data_stream.png", "hopper.pfm", "16bit.s.tif"):
        assert reasons[name]["kind"] == Reason.UNREADABLE_IMAGE
    assert "png_decompression_dos.png" not in reasons  # its bomb is a text, which is not looked at
    assert reasons["hopper.tar"]["kind"] == Reason.ARCHIVE_PATH
    for name in ("hopper.ico", "hopper.psd", "hopper.dds", "eps/1.eps", "avif/hopper.heif"):
        assert "none of the formats AVIF, BMP, GIF, JPEG" in reasons[name]["reason"]


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_rotated_images_become_upright(images, kind):
    upright = netpbm(images / "hopper.ppm")
    for orientation in range(2, 9):
        assert distance(shown(images, f"hopper_orientation_{orientation}.{kind}"), upright) < 12


def test_other_rotated_images_become_upright(images):
    page = shown(images, "g4_orientation_1.tif")
    for orientation in range(2, 9):
        assert distance(shown(images, f"g4_orientation_{orientation}.tif"), page) < 1
    # A landscape with "top" and "bottom" written on it, and how it was turned.
    views = [shown(images, f"avif/rot{turn}mir{mirror}.avif") for turn in range(4) for mirror in range(2)]
    assert all(distance(view, views[0]) < 15 for view in views)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *[(f"hopper.{kind}", 2) for kind in ("bmp", "png", "tif", "pnm")],
        *[(f"hopper.{kind}", 12) for kind in ("jpg", "webp", "gif", "Lab.tif")],
        ("hopper_jpg.tif", 12),
        ("avif/hopper.avif", 12),
    ],
)
def test_one_image_in_many_forms(images, name, most):
    assert distance(shown(images, name), netpbm(images / "hopper.ppm")) < most


def test_sixteen_and_twelve_bits_are_scaled(images):
    assert (shown(images, "hopper_16bit.pgm") == netpbm(images / "hopper_16bit.pgm") >> 8).all()
    for name in ("16bit.cropped.tif", "16bit.MM.cropped.tif", "16bit.deflate.tif", "16bit.cropped.jp2"):
        assert (shown(images, name) <= 2).all()  # their values are 291 to 694
    for kind in ("tiff_16bit_RGB", "tiff_tiled_planar_16bit_RGB"):
        assert distance(shown(images, f"{kind}.tiff"), shown(images, "tiff_16bit_RGB_target.png")) < 1


# Files that are broken, and shown by every program in its own way; and what FFmpeg does not turn upright.
DIFFERENT = re.compile(r"orientation|bmp/b/|hopper_bad_exif|broken_exif_dpi|mmap_error|fakealpha")
READERS = {
    b"\x89PNG": "png_pipe",
    b"\xff\xd8\xff": "jpeg_pipe",
    b"BM": "bmp_pipe",
    b"GIF8": "gif",
    b"RIFF": "webp_pipe",
    b"P5": "pgm_pipe",
    b"P6": "ppm_pipe",
    b"\0\0\0\x0cjP": "j2k_pipe",
    b"\xff\x4f\xff\x51": "j2k_pipe",
}


def by_ffmpeg(file: Path) -> np.ndarray | None:
    """The first image of a file as FFmpeg decodes it, over white; ``None`` if it cannot."""
    av = pytest.importorskip("av")
    with open(file, "rb") as stream:
        head = stream.read(8)
    reader = next((reader for mark, reader in READERS.items() if head.startswith(mark)), None)
    if reader is None:
        return None
    try:
        with av.open(str(file), format=reader) as container:
            container.streams.video[0].codec_context.thread_count = 1
            pixels = next(container.decode(video=0)).to_ndarray(format="rgba")
    except (av.FFmpegError, StopIteration):
        return None
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    return colours if alpha.min() == 255 else (colours * (alpha / 255) + 255 - alpha).round().astype(np.uint8)


def test_another_decoder_gives_the_same_pixels(images, names):
    """Palettes, 16 bits, CMYK, transparency of all kinds, first frames of animations, multi-image files."""
    compared, different = 0, []
    for name in names:
        theirs = None if DIFFERENT.search(name) else by_ffmpeg(images / name)
        if theirs is None:
            continue
        try:
            ours = shown(images, name)
        except Exception:
            continue
        compared += 1
        if ours.shape != theirs.shape or distance(ours, theirs) > 3:
            different.append(name)
    assert different == []
    assert compared > 500
