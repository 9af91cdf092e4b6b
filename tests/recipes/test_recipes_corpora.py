"""Data parts in Python."""

from __future__ import annotations

import pytest

from megacpp_nemo.contract import DataError


def test_use_data_keeps_what_the_recipe_decides_and_what_the_data_says():
    from megacpp_nemo.recipes import cpp_folder, nam56r, use_data

    partial = nam56r()
    before = partial.data
    data = cpp_folder(root="/src")
    data.seed = 7
    use_data(partial, data)
    assert partial.data is data
    assert (data.root, data.seed) == ("/src", 7)
    assert data.seq_length == before.seq_length
    assert data.num_train_samples == before.num_train_samples


def test_a_data_module_without_such_arguments_is_taken_as_it_is():
    import nemo_run as run

    from megacpp_nemo.recipes import nam56r_tiny, use_data

    class Rows:
        def __init__(self, seq_length: int = 1, global_batch_size: int = 1) -> None: ...

    partial, data = nam56r_tiny(), run.Config(Rows, global_batch_size=4)
    use_data(partial, data)
    assert data.__arguments__ == {"seq_length": 256, "global_batch_size": 4}


def test_parts_leave_unset_what_is_not_given(build):
    from megacpp_nemo.recipes import corpus_folders, cpp_folder, cpp_headers, indexed_files

    assert cpp_headers().__arguments__ == {}
    assert cpp_headers(tokenizer_dir="/t").__arguments__ == {"tokenizer_dir": "/t"}
    assert indexed_files(paths="/d").__arguments__ == {"paths": "/d"}
    assert corpus_folders(folders=["1", "/c"]).__arguments__ == {"folders": ["1", "/c"]}
    with pytest.raises(DataError, match="cpp_headers needs none"):
        cpp_folder()
    with pytest.raises(DataError, match=r"data\.paths="):
        build(indexed_files())
    with pytest.raises(DataError, match=r"data\.folders="):
        build(corpus_folders())


@pytest.mark.parametrize("part", ["cpp_headers", "corpus_folders", "indexed_files"])
def test_other_data_serves_the_channels_that_the_recipe_has(part):
    from megacpp_nemo import recipes

    partial, data = recipes.nam56r_tiny(), getattr(recipes, part)()
    partial.data.structure = "core"
    recipes.use_data(partial, data)
    assert data.structure == "core"
