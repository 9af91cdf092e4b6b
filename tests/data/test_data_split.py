from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.sources import SourceFile
from megacpp_nemo.data.split import split_files


def files(count: int) -> list[SourceFile]:
    return [SourceFile(path=f"f{i}.h", size_bytes=1, sha256=str(i)) for i in range(count)]


@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**40))
def test_every_file_is_on_one_side_and_neither_side_is_empty(count, fraction, seed):
    training, validation = split_files(files(count), fraction, seed)
    assert training
    assert validation
    assert sorted(training + validation, key=lambda f: f.path) == sorted(
        files(count), key=lambda f: f.path
    )


def test_adding_files_moves_no_other():
    _, few = split_files(files(200), 0.2, seed=7)
    _, many = split_files(files(2000), 0.2, seed=7)
    assert [file for file in many if int(file.sha256) < 200] == few
    assert 300 < len(many) < 500


def test_the_seed_chooses_the_side():
    assert split_files(files(200), 0.2, seed=1) != split_files(files(200), 0.2, seed=2)
    assert split_files(files(200), 0.2, seed=1) == split_files(files(200), 0.2, seed=1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5, float("nan")])
def test_a_share_out_of_range_is_refused(fraction):
    with pytest.raises(DataError, match="validation share is out of range"):
        split_files(files(9), fraction, seed=0)


def test_a_single_file_cannot_be_divided():
    with pytest.raises(DataError, match=r"cannot be divided(.|\n)*f0\.h"):
        split_files(files(1), 0.5, seed=0)
