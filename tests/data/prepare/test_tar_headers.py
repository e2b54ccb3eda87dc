"""Headers of tars against Python's tarfile and GNU tar; damaged and hostile ones end with a reason."""

import io
import os
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neo_megatron.data.prepare.tar_headers import BrokenTar, Member, members
from neo_megatron.storage.open import open_source

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "d" * 90 + "/" + "n" * 90 + ".txt"


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **values) -> bytes:
    """A member as tarfile writes it, with its contents."""
    info = tarfile.TarInfo(name)
    info.size, info.type, format = len(data), kind, values.pop("format", tarfile.GNU_FORMAT)
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(format) + data + bytes(-len(data) % 512)


def read(path, content: bytes, start: int = 0) -> tuple[list[Member], str]:
    """(members, why the tar is broken)."""
    path.write_bytes(content)
    found = []
    with open_source(str(path)) as file:
        try:
            for member in members(file, start):
                found.append(member)
        except BrokenTar as error:
            return found, str(error)
    return found, ""


def checksummed(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def edited(header: bytes, offset: int, value: bytes) -> bytes:
    return checksummed(header[:offset] + value + header[offset + len(value) :])


@pytest.mark.parametrize("format", FORMATS)
def test_members_equal_those_of_tarfile(tmp_path, format):
    names = ["a.txt", "sub/b.c.json", "/etc/passwd", "../up.txt", "é 你好.png", LONG, "x" * 99, "." + "y" * 100 + "/z"]
    if format == "ustar":
        names = [name for name in names if name.isascii()]
    else:
        names.append("deep/" * 60 + "leaf.txt")
    content = b"".join(entry(name, name.encode() * 30, format=FORMATS[format]) for name in names) + bytes(1024)
    found, broken = read(tmp_path / "a.tar", content)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(it.name, it.offset_data, it.size) for it in tar] == [(it.name, it.offset, it.size) for it in found]
    assert not broken and [member.name for member in found] == names
    for member in found:
        assert content[member.offset : member.offset + member.size] == member.name.encode() * 30
        assert read(tmp_path / "a.tar", content, member.begin)[0] == found[found.index(member) :]


@pytest.mark.parametrize("format", ["oldgnu", "gnu", "ustar", "pax"])
def test_members_equal_those_of_gnu_tar(tmp_path, format):
    (tmp_path / "in" / ("d" * 60)).mkdir(parents=True)
    names = ["a.txt", f"{'d' * 60}/{'n' * 30}.json"]
    for name in names:
        (tmp_path / "in" / name).write_text(name * 100)
    os.symlink("a.txt", tmp_path / "in" / "link.txt")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    command = [
        "tar",
        f"--format={format}",
        "--sort=name",
        "-cf",
        str(tmp_path / "a.tar"),
        "-C",
        str(tmp_path / "in"),
        ".",
    ]
    subprocess.run(command, check=True)
    found, broken = read(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes())
    assert not broken
    assert {member.name.removeprefix("./"): member.size for member in found if not member.kind} == {
        name: len(name) * 100 for name in names
    }
    kinds = {member.kind for member in found}
    assert kinds == {"", "a directory", "a symbolic link", "a FIFO"}


def test_sparse_files_are_recognised_and_passed_over(tmp_path):
    with (tmp_path / "holes.bin").open("wb") as file:
        for place in range(0, 60 << 20, 1 << 20):
            file.seek(place)
            file.write(b"x" * 4096)
    (tmp_path / "z.txt").write_text("after")
    for format in ("gnu", "pax"):
        command = ["tar", f"--format={format}", "-S", "-cf", "a.tar", "holes.bin", "z.txt"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found, broken = read(tmp_path / "b.tar", (tmp_path / "a.tar").read_bytes())
        assert not broken and [member.kind for member in found] == ["a sparse file", ""]
        assert [member.name for member in found] == ["holes.bin", "z.txt"] and found[1].size == 5


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.DIRTYPE, "a directory"),
        (b"Q", "a member of the unknown kind 'Q'"),
        (tarfile.CONTTYPE, ""),
        (tarfile.AREGTYPE, ""),
    ],
)
def test_members_that_are_no_files_are_named(tmp_path, kind, said):
    content = entry("a.jpg", kind=kind, linkname="/etc/passwd") + entry("b.txt", b"b") + bytes(1024)
    found, broken = read(tmp_path / "a.tar", content)
    assert [(member.name.rstrip("/"), member.kind) for member in found] == [
        ("a.jpg", said),
        ("b.txt", ""),
    ] and not broken


PAX = entry("pax", b"17 path=abc.text\n", tarfile.XHDTYPE)
HOSTILE = {
    "checksum": (entry("b")[:-1] + b"\1", "its checksum differs"),
    "octal": (edited(entry("b"), 124, b"9" * 11 + b"\0"), "is not octal"),
    "negative size": (edited(entry("b"), 124, b"\xff" * 12), "is not octal"),
    "10 GB": (
        edited(entry("b"), 124, b"%011o\0" % (10 << 30)),
        "breaks off in the member 'b', which has 10,737,418,240",
    ),
    "2**88 bytes": (edited(entry("b"), 124, b"\x80" + b"\xff" * 11), "breaks off in the member 'b'"),
    "pax size": (
        entry("p", b"28 size=9999999999999999999\n", tarfile.XHDTYPE) + entry("b"),
        "breaks off in the member",
    ),
    "pax size text": (entry("p", b"12 size=-99\n", tarfile.XHDTYPE) + entry("b"), "its size is not a number"),
    "pax damage": (
        entry("p", b"99 path=a\n", tarfile.XHDTYPE) + entry("b"),
        "extended header of this member is damaged",
    ),
    "pax text": (entry("p", b"hello\n", tarfile.XHDTYPE) + entry("b"), "extended header of this member is damaged"),
    "pax of a gigabyte": (edited(entry("p", kind=tarfile.XHDTYPE), 124, b"%011o\0" % (1 << 30)), "1,073,741,824 bytes"),
    "long name of a gigabyte": (edited(entry("p", kind=b"L"), 124, b"%011o\0" % (1 << 30)), "1,073,741,824 bytes"),
    "pax alone": (PAX, "breaks off in the header"),
    "pax, then the end": (PAX + bytes(1024), "its checksum differs"),
    "pax cut off": (PAX[:520], "breaks off in an extended header"),
    "header cut off": (entry("b")[:100], "breaks off in the header"),
    "data cut off": (entry("b", b"x" * 1000)[:700], "breaks off in the member 'b'"),
    "global path": (entry("g", b"17 path=abc.text\n", tarfile.XGLTYPE), "a global header states a path"),
    "text after the end": (bytes(1024) + entry("c"), "the archive ends, but the file continues"),
    "sparse maps cut off": (edited(entry("s", kind=b"S"), 482, b"\1"), "breaks off in the header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damage_ends_with_a_reason_after_the_members_before_it(tmp_path, case):
    content, reason = HOSTILE[case]
    found, broken = read(tmp_path / "a.tar", entry("a.txt", b"a") + content)
    assert [member.name for member in found] == ["a.txt"] and reason in broken


def test_global_comments_and_extended_names_are_read(tmp_path):
    comment = entry("g", b"19 comment=abcdefg\n", tarfile.XGLTYPE)
    content = comment + entry("a.txt", b"a") + comment + PAX + entry("b.txt", b"b")
    found, broken = read(tmp_path / "a.tar", content)
    assert [member.name for member in found] == ["a.txt", "abc.text"] and not broken


def test_a_tar_that_becomes_shorter_is_broken(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(entry("a.txt", b"a") + entry("b.txt", b"b"))
    with open_source(str(path)) as file:
        found = members(file)
        assert next(found).name == "a.txt"
        os.truncate(path, 1024)
        with pytest.raises(BrokenTar, match="breaks off in the header"):
            next(found)


def test_names_that_are_not_unicode_are_escaped(tmp_path):
    found, _ = read(tmp_path / "a.tar", edited(entry("aa.txt"), 0, b"\xff\n"))
    assert found[0].name == "\\xff\n.txt"


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_change_of_a_byte_is_read_or_has_a_reason(tmp_path_factory, data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=data.draw(st.sampled_from(list(FORMATS.values())))) as tar:
        for name in ("a.txt", LONG):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    content = bytearray(file.getvalue()[:4096])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            block = place // 512 * 512
            content[block : block + 512] = checksummed(bytes(content[block : block + 512]))
    found, broken = read(tmp_path_factory.getbasetemp() / "fuzz.tar", bytes(content))
    assert all(0 <= member.offset <= member.offset + member.size <= len(content) for member in found)
    assert "\n" not in broken
