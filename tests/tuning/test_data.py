"""Documents: every kind of source, what is left out, what is refused, what is held out."""

from __future__ import annotations

import json
import random

import pytest

from rosakit.errors import DataError, InvalidInputError, InvalidTypeError
from rosakit.tuning.data import DataConfig, Document, read_documents, split_documents


def read(*sources, **options):
    return read_documents(
        DataConfig(sources=tuple(map(str, sources)), **{"heldout_share": 0.0, **options})
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def test_folder_is_read_recursively_in_order_and_counts_what_it_skips(tmp_path):
    for name in ("b/two.py", "a/one.py", "zero.txt"):
        write(tmp_path / name, f"text of {name}")
    write(tmp_path / "a/binary.py", b"ab\0cd")
    write(tmp_path / "a/latin.txt", "é".encode("latin-1"))
    write(tmp_path / "b/__init__.py", " \n")
    write(tmp_path / "picture.png", b"not read at all")
    with pytest.warns(RuntimeWarning, match="2 files were left out"):
        found = read(tmp_path)
    assert [d.name for d in found.train] == ["a/one.py", "b/two.py", "zero.txt"]
    assert found.skipped == 3
    with pytest.warns(RuntimeWarning, match=r"1 file was left out.*latin\.txt"):
        assert [d.name for d in read(tmp_path, extensions="txt").train] == ["zero.txt"]
    with pytest.warns(RuntimeWarning, match="2 files were left out"):
        assert len(read(tmp_path, max_documents=2).train) == 2


def test_numbers_that_yaml_reads_as_text():
    assert DataConfig(heldout_share="5e-2").heldout_share == 0.05


def test_files_that_cannot_be_decoded_are_named(tmp_path):
    write(tmp_path / "good.txt", "text")
    write(tmp_path / "empty.txt", "")
    for name in "abcd":
        write(tmp_path / f"{name}.txt", "é".encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"4 files were left out.*a\.txt.*c\.txt, …") as caught:
        assert read(tmp_path).skipped == 5
    assert len(caught) == 1
    assert "d.txt" not in str(caught[0].message)


def test_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbfhello")
    assert read(path).train == [Document(str(path), "hello")]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"a\0b", "UTF-8"), (b"\xff\xfe\xfa", "iconv")],
)
def test_one_bad_file_is_named_with_the_remedy(tmp_path, content, said):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(DataError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_sources_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder: .*nothing.*datasets:"):
        read(tmp_path / "nothing")
    write(tmp_path / "only.py", b"\0")
    with pytest.raises(DataError, match="1 files were left out"):
        read(tmp_path)
    with pytest.raises(DataError, match="no data"):
        read()


def test_jsonl_and_its_errors(tmp_path):
    rows = [{"text": "one", "other": 1}, {"text": ""}, {"text": "two"}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    found = read(path)
    assert [d.text for d in found.train] == ["one", "two"]
    assert found.skipped == 1
    with pytest.raises(DataError, match=r"line 1 has no field 'body' .*text, other"):
        read(path, column="body")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(write(tmp_path / "y.jsonl", '{"text": "a"}\n{"text": \n'))
    with pytest.raises(DataError, match="'text' is int"):
        read(write(tmp_path / "z.jsonl", '{"text": 3}\n'))


def test_parquet_and_its_errors(tmp_path):
    table = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(table.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert [d.text for d in read(path, column="body").train] == ["one", "two"]
    with pytest.raises(DataError, match="no column 'text'; it has body, n"):
        read(path)
    with pytest.raises(DataError, match="no readable parquet file"):
        read(write(tmp_path / "bad.parquet", b"PAR1 nothing else"))


def test_datasets_name(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set/train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in read(f"datasets:{tmp_path / 'set'}").train] == ["one", "two"]
    with pytest.raises(DataError, match=r"cannot load datasets:.*give local files"):
        read(f"datasets:{tmp_path / 'missing'}")


def documents(count):
    generator = random.Random(0)
    return [Document(str(i), f"text {generator.random()}") for i in range(count)]


def test_split_follows_the_text_and_nothing_else():
    texts = documents(300)
    train, held = split_documents(texts, 0.1)
    assert 12 <= len(held) <= 50
    assert sorted([*train, *held]) == sorted(texts)
    copies = [Document(f"copy {d.name}", d.text) for d in reversed(texts)]
    _, again = split_documents([*copies, *texts], 0.1)
    assert {d.text for d in again} == {d.text for d in held}
    assert len(again) == 2 * len(held)
    wider = {d.text for d in split_documents(texts, 0.3)[1]}
    assert {d.text for d in held} <= wider


def test_split_leaves_neither_side_empty():
    for count, share in ((2, 0.001), (2, 0.999), (5, 0.001), (5, 0.999)):
        train, held = split_documents(documents(count), share)
        assert train
        assert held
    assert split_documents(documents(1), 0.0)[1] == []


def test_held_out_list_removes_its_copies_from_training(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"train/{name}.txt", f"text {name}")
    held = write(tmp_path / "held.txt", "text b")
    found = read(tmp_path / "train", heldout=str(held))
    assert [d.text for d in found.train] == ["text a", "text c"]
    assert [d.text for d in found.heldout] == ["text b"]
    with pytest.raises(DataError, match="held out"):
        read(held, heldout=str(held))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"repeat": 1.0}, InvalidInputError, "repeat must be below 1"),
        ({"heldout_share": "x"}, InvalidTypeError, "heldout_share must be a number"),
        ({"heldout_share": "5e-1x"}, InvalidTypeError, "heldout_share must be a number"),
        ({"repeat_length": "long"}, InvalidTypeError, "repeat_length must be an integer"),
        ({"max_documents": "many"}, InvalidTypeError, "max_documents must be an integer or none"),
        ({"column": 3}, InvalidTypeError, "column must be text"),
        ({"sources": 3}, InvalidTypeError, "sources must be a name"),
        ({"repeat_length": 1}, InvalidInputError, "repeat_length"),
        ({"max_documents": 0}, InvalidInputError, "max_documents"),
        ({"isolate": 1}, InvalidTypeError, "isolate"),
    ],
)
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        DataConfig(**options)
