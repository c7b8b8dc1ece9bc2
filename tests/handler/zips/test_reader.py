"""handler.zips.reader: what it reads, what it refuses; nothing else can come of any bytes."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import ArchiveError
from handler.zips.reader import ZipReader
from tests.support.archives import zip_bytes

FILES = {"a.txt": b"alpha" * 40, "folder/b.json": b"{}", "empty": b""}


def read_all(data: bytes) -> dict[str, bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = ZipReader(file, label="test.zip")
        return {name: reader.read(name) for name in reader.members}


def refusal(data: bytes) -> str:
    with pytest.raises(ArchiveError) as caught:
        read_all(data)
    return str(caught.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_zipfile_writes(compression: int) -> None:
    assert read_all(zip_bytes(FILES, compression)) == FILES


def test_reads_a_zip_inside_another_file(tmp_path: Path) -> None:
    data = zip_bytes(FILES)
    (tmp_path / "outer").write_bytes(b"before" + data + b"after")
    with (tmp_path / "outer").open("rb") as file:
        reader = ZipReader(file, start=6, size_bytes=len(data))
        assert {name: reader.read(name) for name in reader.members} == FILES
        assert reader.head("a.txt", 7) == b"alphaal"


def test_leaves_folders_out() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/b", b"x")
    assert read_all(buffer.getvalue()) == {"folder/b": b"x"}


def test_reads_data_descriptors_and_zip64() -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.data += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    stream = Unseekable()
    with (
        zipfile.ZipFile(stream, "w") as archive,  # type: ignore[call-overload]
        archive.open("a.txt", "w", force_zip64=True) as member,
    ):
        member.write(FILES["a.txt"])
    assert read_all(bytes(stream.data)) == {"a.txt": FILES["a.txt"]}


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "C:/a", "a\\b", "..\\a"),
        *("a\nb", "a\x00b", "..", "a/" + "b" * 256),
    ],
)
def test_refuses_names_that_are_no_plain_paths(name: str) -> None:
    data = zip_bytes({"x" * len(name): b"data"}).replace(b"x" * len(name), name.encode())
    assert "is no plain relative path" in refusal(data)


def _with_mode(mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system = 3
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666, 0o140777])
def test_refuses_links_and_special_files(mode: int) -> None:
    assert "is a link or a special file" in refusal(_with_mode(mode))


def _patched(offset_of: Callable[[bytes], int], layout: str, value: int) -> bytes:
    data = bytearray(zip_bytes(FILES, zipfile.ZIP_DEFLATED))
    struct.pack_into(layout, data, offset_of(bytes(data)), value)
    return bytes(data)


def _both(field: int, value: int, files: dict[str, bytes] = FILES) -> bytes:
    """A zip whose first member has `value` at `field` of both its headers."""
    data = bytearray(zip_bytes(files, zipfile.ZIP_DEFLATED))
    struct.pack_into("<L", data, data.index(b"PK\1\2") + field, value)
    struct.pack_into("<L", data, field - 2, value)
    return bytes(data)


def _central(field: int) -> Callable[[bytes], int]:
    return lambda data: data.index(b"PK\1\2") + field


def _end(field: int) -> Callable[[bytes], int]:
    return lambda data: data.rindex(b"PK\5\6") + field


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"aa"), "is there twice"),
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"AA"), "is there twice"),
        (zip_bytes({"a": b"1", "b/c": b"2"}).replace(b"b/c", b"a/c"), "both a file and the folder"),
        (zip_bytes(FILES)[:-1], "no zip archive, or it is cut off"),
        (zip_bytes(FILES)[100:], "its directory is not where"),
        (zip_bytes(FILES) + b"x", "bytes follow its end record"),
        (b"", "no zip archive"),
        (b"PK\5\6", "no zip archive"),
        (_patched(_central(8), "<H", 1), "is encrypted"),
        (_patched(_central(10), "<H", 12), "headers disagree"),
        (_both(24, 1 << 30), "impossible"),
        (_both(24, 100), "larger than the 100"),
        (_both(16, 7), "do not match its checksum"),
        (_patched(_central(42), "<L", 1 << 30), "belong to no member"),
        (_patched(_end(16), "<L", 1 << 30), "its directory is not where"),
        (_patched(_end(10), "<H", 2), "several parts"),
        (_patched(_end(4), "<H", 1), "several parts"),
    ],
)
def test_refuses_what_is_damaged_or_lies(data: bytes, words: str) -> None:
    message = refusal(data)
    assert words in message
    assert message.startswith("test.zip: ")


def test_refuses_members_that_share_bytes() -> None:
    data = bytearray(zip_bytes({"a": b"1" * 50, "b": b"2"}))
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    first_local = bytes(data[: 30 + 1])
    data[30 + 1 : 30 + 1 + len(first_local)] = first_local.replace(b"a", b"b")
    struct.pack_into("<L", data, second + 42, 31)
    struct.pack_into("<2L", data, second + 20, 1, 1)
    assert "overlaps what follows it" in refusal(bytes(data))


def _local(name: str, data: bytes) -> bytes:
    """A stored member as one who reads local headers only takes it."""
    numbers = (zlib.crc32(data), len(data), len(data), len(name), 0)
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, *numbers) + name.encode() + data


@pytest.mark.parametrize("before", ["first", "middle", "directory"])
def test_refuses_members_that_the_directory_does_not_list(before: str) -> None:
    """TorchServe reads local headers one after the other and would unpack it."""
    data = zip_bytes({"a": b"1", "b": b"2"})
    second = data.index(b"PK\3\4", 4)
    directory = data.index(b"PK\1\2")
    at = {"first": 0, "middle": second, "directory": directory}[before]
    evil = _local("entry.py", b"import os")
    moved = bytearray(data[:at] + evil + data[at:])
    struct.pack_into("<L", moved, moved.rindex(b"PK\5\6") + 16, directory + len(evil))
    entry = moved.index(b"PK\1\2")
    for offset in (0, second):
        if offset >= at:
            struct.pack_into("<L", moved, entry + 42, offset + len(evil))
        entry = moved.find(b"PK\1\2", entry + 4)
    with zipfile.ZipFile(io.BytesIO(moved)) as archive:
        assert archive.testzip() is None
    assert "belong to no member" in refusal(bytes(moved))


@pytest.mark.parametrize("field", [14, 18, 22])
def test_refuses_local_headers_that_say_something_else(field: int) -> None:
    data = bytearray(zip_bytes(FILES))
    data[field] ^= 1
    assert "a.txt: its two headers disagree" in refusal(bytes(data))


def _streamed(data: bytes, packed: bytes, *, name: str, size: int, descriptor: bytes) -> bytes:
    """A zip of one deflated member whose sizes stand behind it."""
    crc32 = zlib.crc32(data)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 8, 8, 0, 33, 0, 0, 0, len(name), 0)
    body = local + name.encode() + packed + descriptor
    numbers = (crc32, len(packed), size, len(name), 0, 0, 0, 0, 0, 0)
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 8, 8, 0, 33, *numbers)
    central += name.encode()
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(body), 0)
    return body + central + end


def _deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflate.compress(data) + deflate.flush()


@pytest.mark.parametrize("sign", [b"", b"PK\7\10"])
@pytest.mark.parametrize("layout", ["<3L", "<L2Q"])
def test_data_descriptors_are_compared(sign: bytes, layout: str) -> None:
    data = b"hello" * 9
    packed = _deflated(data)
    true = sign + struct.pack(layout, zlib.crc32(data), len(packed), len(data))
    assert read_all(_streamed(data, packed, name="a", size=45, descriptor=true)) == {"a": data}
    false = sign + struct.pack(layout, zlib.crc32(data), len(packed) - 1, len(data))
    for wrong in (false, b"", true + b"x", true[:-1]):
        zipped = _streamed(data, packed, name="a", size=45, descriptor=wrong)
        assert "belong to no member" in refusal(zipped)


@pytest.mark.parametrize(
    ("name", "data", "words"), [("a", b"hello", "ends before its packed"), ("a/", b"", "holds byt")]
)
def test_refuses_members_behind_the_end_of_a_deflated_one(
    name: str, data: bytes, words: str
) -> None:
    """One who inflates to the end of the stream would go on at a header of another's making."""
    packed = _deflated(data)
    packed += struct.pack("<4s3L", b"PK\7\10", zlib.crc32(data), len(packed), len(data))
    packed += _local("entry.py", b"import os")
    numbers = (zlib.crc32(data), len(packed), len(data))
    descriptor = struct.pack("<4s3L", b"PK\7\10", *numbers)
    zipped = _streamed(data, packed, name=name, size=len(data), descriptor=descriptor)
    assert words in refusal(zipped)


def test_refuses_a_deflated_member_that_is_cut_off() -> None:
    data = b"hello" * 9
    packed = _deflated(data)[:-1]
    numbers = struct.pack("<3L", zlib.crc32(data), len(packed), 45)
    assert "a is damaged" in refusal(_streamed(data, packed, name="a", size=45, descriptor=numbers))


def test_refuses_a_folder_that_others_take_for_a_file() -> None:
    assert "a folder and a file at once" in refusal(_with_mode(0o040755))


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_reads_what_info_zip_writes(tmp_path: Path, is_streamed: bool) -> None:
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    target = "-" if is_streamed else str(tmp_path / "out.zip")
    run = subprocess.run(
        ["zip", "-r", target, "."], cwd=tmp_path / "in", check=True, capture_output=True
    )
    assert read_all(run.stdout if is_streamed else (tmp_path / "out.zip").read_bytes()) == FILES


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_shutil_writes_and_zipfile_appends_to(tmp_path: Path, compression: int) -> None:
    (tmp_path / "in" / "folder" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "folder" / "b.json").write_bytes(b"{}")
    path = Path(shutil.make_archive(str(tmp_path / "out"), "zip", tmp_path / "in"))
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("folder2/", b"")
        with archive.open("wide", "w", force_zip64=True) as member:
            member.write(b"x" * 100)
    expected = {"folder/b.json": b"{}", "wide": b"x" * 100}
    assert read_all(path.read_bytes()) == expected


def test_a_bomb_stops_at_the_size_it_claims() -> None:
    data = _both(24, 1000, {"bomb": bytes(50 << 20)})
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = ZipReader(file)
        with pytest.raises(ArchiveError, match="larger than the 1000"):
            next(reader.chunks(reader.members["bomb"]))


GOOD = [zip_bytes(FILES), zip_bytes(FILES, zipfile.ZIP_DEFLATED)]


@given(
    data=st.sampled_from(GOOD),
    edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 20),
)
def test_any_edit_is_refused_or_harmless(
    data: bytes, edits: list[tuple[int, int]], cut: int
) -> None:
    """Whatever a few bytes are changed to: refused in our words, or files of the claimed sizes."""
    changed = bytearray(data)
    for at, value in edits:
        changed[at % len(changed)] = value
    try:
        found = read_all(bytes(changed[: len(changed) - cut]))
    except ArchiveError:
        return
    for name, content in found.items():
        assert len(content) < 10_000
        assert not os.path.isabs(name)
        assert ".." not in name.split("/")


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArchiveError):
        read_all(data + b"no end record here")


@given(
    fields=st.tuples(*[st.sampled_from([0, 1, 2, 0xFFFF, 0xFFFFFFFF, 40, 100])] * 4),
    tail=st.binary(max_size=30),
)
def test_end_records_that_lie(fields: tuple[int, int, int, int], tail: bytes) -> None:
    count, size, offset, comment = fields
    few = min(count, 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, size, offset, min(comment, 0xFFFF))
    body = zip_bytes(FILES)
    try:
        read_all(body[: body.rindex(b"PK\5\6")] + end + tail)
    except ArchiveError:
        return
    assert (count, comment, tail) in {(3, 0, b""), (0, 0, b"")}


def test_the_checksum_is_of_the_unpacked_bytes() -> None:
    data = zip_bytes({"a": b"hello"})
    stored = struct.unpack_from("<L", data, data.index(b"PK\1\2") + 16)[0]
    assert stored == zlib.crc32(b"hello")


@pytest.mark.parametrize("piece_bytes", [7, 100, 1 << 20])
def test_stored_members_are_checked_in_pieces(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("handler.zips.reader._PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("handler.zips.reader._CACHED_BYTES", 16)
    for at in (None, 0, 7, 199):
        data = bytearray(zip_bytes(FILES))
        if at is not None:
            data[data.index(FILES["a.txt"]) + at] ^= 4
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            reader = ZipReader(file)
            if at is None:
                reader.check_stored(list(reader.members.values()))
                continue
            with pytest.raises(ArchiveError, match=r"a\.txt is damaged"):
                reader.check_stored(list(reader.members.values()))
