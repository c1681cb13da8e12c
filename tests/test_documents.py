"""Promises of flextron.documents: parts of a source are the whole, each read as it streams."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flextron.documents.reading import Part, Text, pieces, read_documents, read_part

LONGEST = 1 << 20


def parts(path, cuts, field=None):
    """What the parts of a file give, when it is cut at these places."""
    ends = zip([0, *cuts], [*cuts, None], strict=True)
    return [list(read_part(Part(str(path), field, start, stop), LONGEST)) for start, stop in ends]


def joined(path, cuts, field=None):
    return [document for part in parts(path, cuts, field) for document in part]


@pytest.mark.parametrize("field", [None, "body"])
def test_every_cut_of_a_file_of_lines_gives_every_line_once(tmp_path, field):
    path = tmp_path / "a.jsonl"
    rows = [{"body" if field else "story": f"größe {i}" * (i % 3 + 1), "n": i} for i in range(7)]
    content = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:5]) + "\n\n"
    content += "\n".join(json.dumps(row) for row in rows[5:])
    path.write_text(content, encoding="utf-8")
    whole = read_documents(Text(path, field))
    assert len(whole) == 7
    for place in range(1, path.stat().st_size + 2):
        assert joined(path, [place], field) == whole
        assert joined(path, [place, place + 3], field) == whole


def test_every_cut_of_a_text_gives_every_line_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "eins\n\nzwei ä\r\ndrei".encode())
    for place in range(1, path.stat().st_size + 2):
        assert "".join(joined(path, [place])).split() == ["eins", "zwei", "ä", "drei"]


def test_row_groups_are_parts(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i}" for i in range(10)], "n": list(range(10))})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    found = parts(path, [1, 2])
    assert [len(part) for part in found] == [3, 3, 4]
    assert joined(path, [1, 2]) == read_documents(path)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_documents(tmp_path / "a.parquet.gz") == read_documents(path)


def test_a_line_of_a_part_is_named_by_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"the line at byte 17 of .* must be a JSON object"):
        parts(path, [5])
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    for read in (lambda: parts(path, [5]), lambda: read_documents(path)):
        with pytest.raises(ValueError, match="must be UTF-8 text, got another byte at 27"):
            read()


def test_a_long_document_is_cut_at_a_paragraph_or_line_or_word():
    text = "aaaa bbbb\n\ncccc dddd\neeee ffff" + "g" * 40
    found = list(pieces([text[i : i + 3] for i in range(0, len(text), 3)], 16))
    assert "".join(found) == text
    assert found[:3] == ["aaaa bbbb\n\n", "cccc dddd\n", "eeee ffff" + "g" * 7]
    assert all(len(piece) <= 16 for piece in found)


def test_what_names_no_field_is_decided_by_the_first_records(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"body": None}] * 1200 + [{"body": "one"}] + [{"body": "two", "title": "T"}] * 2
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_documents(path) == ["one", "two", "two"]
    with path.open("a") as file:
        file.write('\n{"body": "three", "title": "T"}\n')
    assert (
        joined(path, [path.stat().st_size - 60])[-1] == "three"
    )  # as the head says, though this part could not
    (tmp_path / "b.csv").write_text("id,body\n" + "1,\n" * 1200 + "2,one\n")
    assert read_documents(tmp_path / "b.csv") == ["one"]


def test_a_compressed_file_streams_over_blocks_and_frames(tmp_path):
    lines = [json.dumps({"text": f"{i} " * 1000}) for i in range(900)]
    half = "\n".join(lines[:450]) + "\n", "\n".join(lines[450:])
    packed = b"".join(zstandard.ZstdCompressor().compress(part.encode()) for part in half)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert read_documents(tmp_path / "a.jsonl.zst") == read_documents(tmp_path / "b.jsonl")
    (tmp_path / "empty.txt.zst").write_bytes(b"")
    with pytest.raises(ValueError, match="must be readable, got a truncated file"):
        read_documents(tmp_path / "empty.txt.zst")
