"""Videos: the frames that a viewer sees at given times, or the reason why they cannot be read."""

import io
import os
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import decode, patches_from_image
from neo_megatron.data.prepare.media import load_media
from neo_megatron.data.prepare.records import Sample
from neo_megatron.data.tags import split_tags
from neo_megatron.data.verify import verify
from neo_megatron.data.video import OPTIONS, plan_clip, read_frames
from neo_megatron.errors import DataError, Reason, RejectedSample

av = pytest.importorskip("av")

FORMATS = [
    ("a.mp4", "libx264", 10),
    ("a.mov", "mjpeg", 10),
    ("a.mkv", "mpeg4", 10),
    ("a.webm", "libvpx-vp9", 10),
    ("b.webm", "libvpx", 10),
    ("a.avi", "mpeg4", 10),
    ("a.ts", "libx264", 10),
    ("a.mpg", "mpeg2video", 25),
    ("a.gif", "gif", 10),
]


def brightness(number: int) -> int:
    """Brightness of frame ``number``, by which decoded frames are identified."""
    return 20 + 6 * number


def write_video(
    path: Path, codec: str = "libx264", rate: int = 10, frames: int = 35, size: tuple[int, int] = (64, 48), **stream
) -> Path:
    """A video of grey frames, each brighter than the last, with a red corner at the top left."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height = size
        video.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        for name, value in stream.items():
            setattr(video.codec_context, name, value)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), brightness(number), np.uint8)
            pixels[:16, :16] = (255, 0, 0)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(video.encode())
    return path


def seen(path: Path, fps: float = 1.0, most: int = 32) -> list[int]:
    """Brightness of the frames that are taken from a video."""
    return [int(np.asarray(image)[-8, -8, 1]) for image in read_frames(plan_clip(str(path), fps, most))]


def refusal(path: Path, fps: float = 1.0) -> tuple[Reason, str]:
    with pytest.raises(RejectedSample) as raised:
        seen(path, fps)
    assert str(path) in raised.value.sentence and "\n" not in raised.value.sentence
    return raised.value.reason, raised.value.sentence


@pytest.mark.parametrize(("name", "codec", "rate"), FORMATS)
def test_the_frames_shown_at_given_times_are_taken(tmp_path, name, codec, rate):
    """35 frames: at 10 a second 0 s, 1 s, 2 s, 3 s show the frames 0, 10, 20, 30; a GIF has few greys."""
    path = write_video(tmp_path / name, codec, rate)
    few_greys = {"gif": 40, "mpeg2video": 8}.get(codec, 4)  # MPEG's writer leaves out a time now and then
    expected = [brightness(number) for number in range(0, 35, rate)]
    assert seen(path) == pytest.approx(expected, abs=few_greys)
    evenly = [brightness(number) for number in (0, 11, 22, 34)]  # at 0, 34/3, 68/3 and 34 frames
    assert seen(path, fps=1000, most=4) == pytest.approx(evenly, abs=few_greys)


def test_times_between_frames_show_the_frame_before(tmp_path):
    path = write_video(tmp_path / "a.mp4", rate=2, frames=5)
    clip = plan_clip(str(path), 3.0, 32)
    assert clip.times == tuple(Fraction(number, 3) for number in range(8))  # to the end, at 2.5 seconds
    assert seen(path, fps=3.0) == pytest.approx([brightness(n) for n in (0, 0, 1, 2, 2, 3, 4, 4)], abs=4)
    assert seen(path, most=1) == pytest.approx([brightness(0)], abs=4)


def test_frame_rates_are_decimal_numbers(tmp_path):
    """0.1 a second is one frame in ten seconds, not in 9.99999."""
    path = write_video(tmp_path / "a.mp4", rate=1, frames=30)
    assert plan_clip(str(path), 0.1, 32).times == (0, 10, 20)


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The MP4 file with a display matrix (ISO 14496-12, ``tkhd``): (a, b, c, d) takes (x, y) to (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = matrix
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((1, 0, 0, 1), (64, 48), (0, 0)),
        ((0, 1, -1, 0), (48, 64), (0, -1)),
        ((-1, 0, 0, -1), (64, 48), (-1, -1)),
        ((0, -1, 1, 0), (48, 64), (-1, 0)),
    ],
)
def test_rotated_videos_become_upright(tmp_path, matrix, size, corner):
    path = with_matrix(write_video(tmp_path / "a.mp4"), matrix)
    frame = next(read_frames(plan_clip(str(path), 1.0, 32)))
    assert frame.size == size
    pixels = np.asarray(frame)
    for y in (0, -1):
        for x in (0, -1):
            assert (pixels[y, x, 0] > 200) == ((y, x) == corner)


def test_transparency_is_blended_with_white(tmp_path):
    frames = [Image.new("P", (40, 40), number) for number in (0, 1)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0])
        frame.paste(1, (0, 0, 20, 40))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0, duration=1000)
    first = np.asarray(next(read_frames(plan_clip(str(tmp_path / "a.gif"), 1.0, 32))))
    assert (first[:, :20] == (0, 200, 0)).all() and (first[:, 20:] == 255).all()


def test_pixels_are_made_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", sample_aspect_ratio=Fraction(2, 1))
    assert next(read_frames(plan_clip(str(path), 1.0, 32))).size == (128, 48)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.mpg"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_truncated_videos_are_rejected(tmp_path, name, share):
    codec, rate = next((codec, rate) for path, codec, rate in FORMATS if path == name)
    path = write_video(tmp_path / name, codec, rate)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert refusal(path)[0] == Reason.UNREADABLE_VIDEO


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_a_video_that_breaks_off_halfway_is_rejected(tmp_path, name):
    codec, rate = next((codec, rate) for path, codec, rate in FORMATS if path == name)
    path = write_video(tmp_path / name, codec, rate)
    data = bytearray(path.read_bytes())
    start = len(data) * 7 // 10
    data[start : start + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    assert refusal(path, fps=10)[0] == Reason.UNREADABLE_VIDEO


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_damage_is_detected(tmp_path, name):
    """FFmpeg conceals damage if it can, and marks the frame; it does not detect every changed byte."""
    path = write_video(tmp_path / name, next(codec for file, codec, _ in FORMATS if file == name))
    intact = path.read_bytes()
    refused = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        data = bytearray(intact)
        for place in random.integers(len(data) // 3, len(data), 10):
            data[place] ^= 0xFF
        path.write_bytes(data)
        try:
            seen(path, fps=10)
        except RejectedSample as rejected:
            refused += rejected.reason == Reason.UNREADABLE_VIDEO
    assert refused > 6


def test_a_header_with_a_wrong_length_is_rejected(tmp_path):
    """The duration in the movie header (``mvhd``) is set to 12 days."""
    path = write_video(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20), (b"elst", 12)):
        if box in data:
            start = data.index(box) + offset
            data[start : start + 4] = struct.pack(">I", 1 << 30)
    path.write_bytes(data)
    try:
        assert len(seen(path)) == 4
    except RejectedSample as rejected:
        assert "it ends after 3.5 of" in rejected.sentence


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXTINF:1,\n{secret}\n",
        "#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXTINF:1,\nconcat:{secret}|/etc/passwd\n",
        "ffconcat version 1.0\nfile {secret}\n",
        '<?xml version="1.0"?><MPD><BaseURL>{secret}</BaseURL></MPD>',
        "v=0\nm=video 1 RTP/AVP 96\n",
        "",
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.m3u8"])
def test_playlists_open_nothing(tmp_path, name, text):
    """A playlist under any name is not a video, and the good video that it names is not read."""
    secret = write_video(tmp_path / "secret.mp4")
    path = tmp_path / name
    path.write_text(text.format(secret=secret))
    reason, sentence = refusal(path)
    assert reason == Reason.UNREADABLE_VIDEO and "none of the formats MP4" in sentence


def test_ffmpeg_cannot_open_addresses(tmp_path):
    """A playlist after the first bytes of an allowed format."""
    for start in (b"\0\0\0\x18ftyp", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI ", b"G" + bytes(187) + b"G", b"GIF89a"):
        path = tmp_path / "a.mp4"
        path.write_bytes(start + b"\n#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
        assert refusal(path)[0] == Reason.UNREADABLE_VIDEO


def test_even_a_playlist_demuxer_opens_nothing(tmp_path):
    """The options prevent it, whatever demuxer is chosen."""
    secret = write_video(tmp_path / "secret.ts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    with av.open(io.BytesIO(playlist), format="hls") as container:
        assert len(list(container.decode(video=0))) == 35
    with pytest.raises(av.FFmpegError):
        av.open(io.BytesIO(playlist), format="hls", options=OPTIONS)


def test_files_that_are_not_regular_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("pipe.mp4", "folder.mp4", "missing.mp4"):
        assert refusal(tmp_path / name)[0] == Reason.MISSING_VIDEO
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no images" in refusal(sound)[1]


def test_frames_that_are_too_large_are_rejected(tmp_path):
    """JPEGs of 144 megapixels with a header that says 64 x 48."""
    file = io.BytesIO()
    Image.new("RGB", (12000, 12000)).save(file, "JPEG")
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        list(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        for number in range(3):
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1)
            container.mux(packet)
    assert refusal(path)[0] == Reason.UNREADABLE_VIDEO


def test_long_videos_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("neo_megatron.data.video.MAX_FRAMES", 30)
    assert "too long; cut it into clips" in refusal(write_video(tmp_path / "a.mp4"))[1]


def test_too_many_packets_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("neo_megatron.data.video.MAX_PACKETS", 30)
    assert "over 30 packets; cut it into clips" in refusal(write_video(tmp_path / "a.mkv", "mpeg4"))[1]


def test_endless_boxes_are_rejected(tmp_path, monkeypatch):
    """FFmpeg seeks to each of them."""
    monkeypatch.setattr("neo_megatron.data.video.MAX_ACCESSES", 10_000)
    path = write_video(tmp_path / "a.mp4")
    assert len(list(read_frames(plan_clip(str(path), 1.0, 8)))) == 4  # as often as a usual file needs
    with path.open("ab") as file:
        file.write((b"\0\0\0\x08free") * 50_000)
    assert "FFmpeg reads or seeks in it over 10000 times" in refusal(path)[1]


def sample(tmp_path: Path, *texts: str, images=(), videos=()) -> Sample:
    turns = tuple(Turn("user" if number % 2 == 0 else "assistant", text, False) for number, text in enumerate(texts))
    return Sample(turns, tuple(str(tmp_path / name) for name in images), tuple(str(tmp_path / n) for n in videos))


def test_frames_are_listed_in_the_text_and_share_the_pixel_limit(tmp_path, new_png):
    write_video(tmp_path / "a.mp4", size=(512, 512))
    write_video(tmp_path / "b.mp4", frames=15)
    (tmp_path / "a.png").write_bytes(new_png(512, 512))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=1 << 16)
    conversation = sample(tmp_path, "See <video>, <image>", "and <video>.", images=["a.png"], videos=["b.mp4", "a.mp4"])
    turns, images, grids = load_media(conversation, settings)
    assert [turn.text for turn in turns] == [
        "See Frame-1: <image>\nFrame-2: <image>, <image>",
        "and Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nFrame-4: <image>.",
    ]
    limit = 2 * (1 << 16) // 7
    assert len(images) == 7 and grids[:2] == [(4, 4)] * 2 and grids[2:] == [(8, 8)] * 5
    assert all(height * width * 256 <= limit for height, width in grids)
    assert len(load_media(conversation, PreprocessConfig(min_pixels=4096, video_fps=0.5, max_frames=1))[1]) == 3


def test_frames_with_limits_of_their_own_do_not_share_those_of_images(tmp_path, new_png):
    """NEO-ov's text and sizes; the time in front of each frame is that of the frame."""
    write_video(tmp_path / "a.mp4", frames=40, size=(512, 512))
    (tmp_path / "a.png").write_bytes(new_png(512, 512))
    settings = PreprocessConfig(
        min_pixels=4096, max_pixels=1 << 16, video_text="timestamps", video_min_pixels=1024, video_max_pixels=128 * 128
    )
    (turn,), images, grids = load_media(
        sample(tmp_path, "<image> <video>\nWhy?", images=["a.png"], videos=["a.mp4"]), settings
    )
    lines = turn.text.splitlines()
    assert lines[0].startswith(
        "<image> The time range of this video is [00:00-00:04], and the following is a series of 4 frames"
    )
    assert lines[1:] == ["[00:00.00]:<image>", "[00:01.00]:<image>", "[00:02.00]:<image>", "[00:03.00]:<image>", "Why?"]
    assert grids == [(16, 16), *[(8, 8)] * 4] and len(images) == 5
    with pytest.raises(DataError, match="--video-min-pixels is 65536: it must be at most --video-max-pixels 4096"):
        PreprocessConfig(video_max_pixels=4096)


def test_escaped_tags_stay_text_in_front_of_and_after_frames(tmp_path, new_png):
    write_video(tmp_path / "b.mp4", frames=15)
    (tmp_path / "a.png").write_bytes(new_png(64, 64))
    text = r"\<video> \\<video> \<image> <image> \\\<video>"
    turns, images, _ = load_media(sample(tmp_path, text, images=["a.png"], videos=["b.mp4"]), PreprocessConfig())
    assert split_tags(turns[0].text) == [
        "<video> \\Frame-1: ",
        "<image>",
        "\nFrame-2: ",
        "<image>",
        " <image> ",
        "<image>",
        " \\<video>",
    ]
    assert len(images) == 3


def test_both_stores_give_the_same_pixels(tmp_path):
    write_video(tmp_path / "a.mp4", size=(200, 120))
    conversation = sample(tmp_path, "<video>", videos=["a.mp4"])
    for check in ("decode", "header"):
        settings = PreprocessConfig(min_pixels=4096, max_pixels=1 << 16, check=check)
        _, encoded, grids = load_media(conversation, settings)
        _, patches, same = load_media(conversation, PreprocessConfig(4096, 1 << 16, image_store="patches"))
        assert grids == same
        for file, ready, grid in zip(encoded, patches, grids, strict=True):
            image = decode(file.tobytes(), "frame")
            assert image.size == (grid[1] * 16, grid[0] * 16)
            assert (patches_from_image(image, grid).reshape(-1) == ready).all()


@pytest.mark.parametrize("store", ["encoded", "patches"])
def test_images_and_frames_with_limits_of_their_own_are_verified(bench, new_sample, new_png, store):
    (bench.path / "images").mkdir()
    write_video(bench.path / "images" / "a.mp4", size=(320, 240))
    for name in ("a.png", "b.png"):
        (bench.path / "images" / name).write_bytes(new_png(320, 320))
    settings = replace(bench.settings, image_store=store, video_text="timestamps", video_max_pixels=16384)
    bench.preprocess(
        [new_sample("<image><image><video>", "x", image=["a.png", "b.png"], video="a.mp4")], settings=settings
    )
    assert not bench.rejects() and not verify(bench.path / "shards").damage


def test_the_tool_preprocesses_videos(bench, new_sample):
    (bench.path / "images").mkdir()
    write_video(bench.path / "images" / "a.mp4")
    (bench.path / "images" / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    videos = ["a.mp4", "broken.mp4", "missing.mp4", ["a.mp4", "a.mp4"]]
    shards = bench.preprocess([new_sample("What?", "That.", video=video) for video in videos])
    assert len(shards) == 1
    assert [reject["kind"] for reject in bench.rejects()] == [
        Reason.UNREADABLE_VIDEO,
        Reason.MISSING_VIDEO,
        Reason.VIDEO_COUNT,
    ]


def test_without_pyav_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match="pip install 'av>=19,<20'"):
        load_media(sample(tmp_path, "<video>", videos=["a.mp4"]), PreprocessConfig())


def test_pyav_is_not_loaded_for_images():
    code = "import sys, neo_megatron.data.prepare.media; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
