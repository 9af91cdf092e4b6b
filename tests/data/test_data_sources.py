from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.sources import (
    SourceSet,
    default_source_set,
    read_source,
    scan_sources,
)


def put(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def paths(root: Path, **settings) -> list[str]:
    return [file.path for file in scan_sources(SourceSet(root=root, **settings)).files]


def test_files_are_found_by_suffix_in_path_order(tmp_path):
    put(tmp_path, b_DOT_cpp="b", a__z_DOT_HPP="z", a_DOT_cuh="a", notes_DOT_md="no", c_DOT_py="no")
    assert paths(tmp_path) == ["a.cuh", "a/z.HPP", "b.cpp"]


def test_unusable_files_are_counted_and_do_not_stop_the_search(tmp_path):
    put(
        tmp_path,
        good_DOT_h="int x;",
        empty_DOT_h="",
        binary_DOT_h=b"int\0x;",
        latin_DOT_h="caf\u00e9".encode("latin-1"),
        copy_DOT_h="int x;",
    )
    (tmp_path / "dangling.h").symlink_to(tmp_path / "nowhere.h")
    os.mkfifo(tmp_path / "pipe.h")
    scan = scan_sources(SourceSet(root=tmp_path))
    assert [file.path for file in scan.files] == ["copy.h"]
    assert scan.skipped == {"duplicate": 1, "empty": 1, "not_text": 2, "unreadable": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_is_skipped(tmp_path):
    put(tmp_path, good_DOT_h="int x;", secret_DOT_h="int y;")
    (tmp_path / "secret.h").chmod(0)
    assert scan_sources(SourceSet(root=tmp_path)).skipped == {"unreadable": 1}


def test_folder_links_that_loop_do_not_hang(tmp_path):
    put(tmp_path, a__x_DOT_h="int x;")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to("self")
    assert paths(tmp_path) == ["a/x.h"]


def test_the_root_itself_may_be_a_link(tmp_path):
    put(tmp_path / "real", x_DOT_h="int x;")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert paths(tmp_path / "link") == ["x.h"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("gen", ["a/deep/y.h", "a/x.h", "top.h"]),
        ("a/*", ["gen/g.h", "top.h"]),
        ("a/*.h", ["a/deep/y.h", "a/gen/z.h", "gen/g.h", "top.h"]),
        ("/gen", ["a/deep/y.h", "a/gen/z.h", "a/x.h", "top.h"]),
        ("**/gen/**", ["a/deep/y.h", "a/x.h", "top.h"]),
        ("a/**/?.h", ["gen/g.h", "top.h"]),
        ("x.h", ["a/deep/y.h", "a/gen/z.h", "gen/g.h", "top.h"]),
        ("deep/", ["a/gen/z.h", "a/x.h", "gen/g.h", "top.h"]),
        ("t[op].h", ["a/deep/y.h", "a/gen/z.h", "a/x.h", "gen/g.h", "top.h"]),
    ],
)
def test_exclude_globs(tmp_path, pattern, left):
    put(tmp_path, a__x_DOT_h="x", a__deep__y_DOT_h="y", a__gen__z_DOT_h="z", gen__g_DOT_h="g")
    put(tmp_path, top_DOT_h="top")
    assert paths(tmp_path, exclude=(pattern,)) == left


def test_text_is_read_back_with_its_line_ends_and_mark(tmp_path):
    put(tmp_path, x_DOT_h=b"\xef\xbb\xbfint x;\r\n\tint \xc3\xa9;\r")
    scan = scan_sources(SourceSet(root=tmp_path))
    assert read_source(scan, scan.files[0]) == "\ufeffint x;\r\n\tint é;\r"


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path):
    put(tmp_path, x_DOT_h="int x;")
    scan = scan_sources(SourceSet(root=tmp_path))
    put(tmp_path, x_DOT_h="int y;")
    with pytest.raises(DataError, match=r"changed while.*\n.*x\.h"):
        read_source(scan, scan.files[0])


def test_a_missing_root_a_file_as_root_and_an_empty_root_are_told_apart(tmp_path):
    put(tmp_path, file_DOT_h="int x;")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        scan_sources(SourceSet(root=tmp_path / "gone"))
    with pytest.raises(DataError, match="is not a folder"):
        scan_sources(SourceSet(root=tmp_path / "file.h"))
    with pytest.raises(DataError, match=r"No usable C\+\+ source file(.|\n)*no file has such"):
        scan_sources(SourceSet(root=tmp_path / "void"))
    put(tmp_path / "void", x_DOT_h="")
    with pytest.raises(DataError, match="all were skipped: 1 empty"):
        scan_sources(SourceSet(root=tmp_path / "void"))


def test_a_suffix_without_its_dot_is_refused(tmp_path):
    with pytest.raises(DataError, match="needs its dot"):
        scan_sources(SourceSet(root=tmp_path, suffixes=("cpp",)))


def test_the_default_sources_are_torch_headers_without_generated_ones():
    source_set = default_source_set()
    found = paths(source_set.root, exclude=source_set.exclude)
    assert len(found) > 1000
    assert "c10/core/TensorImpl.h" in found
    assert "google/protobuf/generated_message_util.h" in found or "google" not in str(found)
    assert not [path for path in found if path.startswith("ATen/ops/")]
    assert not [path for path in found if "/generated/" in path or path.endswith(".pb.h")]
    assert "ATen/RedispatchFunctions.h" not in found


def test_finding_the_default_sources_imports_neither_torch_nor_megatron():
    code = (
        "import sys; from megacpp_nemo.data import corpus, sources;"
        "sources.default_source_set();"
        "print([m for m in ('torch', 'megatron', 'nemo', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_torch_headers_are_an_error_with_a_way_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"data\.root"):
        default_source_set()
