"""A source tree is read into a release, or refused with what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release
from megacpp_nemo.lowering.tree import add_release, read_tree

ARGUMENTS = """
import argparse, enum
import torch

class Kind(enum.Enum):
    flash = 1
    local = 2

def enum_type_handler(text):
    return Kind[text]

def own_type(text):
    return text

def add_megatron_arguments(parser):
    add = parser.add_argument
    add("--hybrid-layer-pattern", type=str)
    add("--hybrid-override-pattern", type=str)
    add("--num-experts", type=int, default=None)
    add("--persistent-save-interval", "--save-interval", type=int)
    add("--save", type=str)
    add("--no-rope-fusion", action="store_false", dest="apply_rope_fusion")
    add("--backend", type=enum_type_handler, choices=list(Kind), default=Kind.flash)
    add("--both", action=argparse.BooleanOptionalAction, default=True)
    add("--sizes", nargs=3, type=int, default=[1, 2, 3])
    add("--own", type=own_type, nargs="+")
    add("--maybe", nargs="?", const=5, type=int)
    add("--switch", action="store_const", const=9)
    return parser
"""
SYMBOLS = """
class Symbols:
    MAMBA = "M"
    ATTENTION = "*"
    MOE = 'E'
    WHALE = "W"
    PIPE = '|'
    VALID_LAYERS = {MAMBA, ATTENTION, MOE}
"""
VERSION = "MAJOR = 0\nMINOR = 17\nPATCH = 9\n"
FILES = {
    "torch.py": "",  # a tree comes first on the path of its process, and torch takes seconds
    "megatron/training/arguments.py": ARGUMENTS,
    "megatron/core/package_info.py": VERSION,
    "megatron/core/ssm/mamba_hybrid_layer_allocation.py": SYMBOLS,
    "megatron/core/models/mamba/mamba_layer_specs.py": "mamba_stack_spec = 1\n",
    "pretrain_mamba.py": "",
}


def planted(root: Path, **changes: str) -> Path:
    """Write a small tree; `changes` replaces the text of files by the stem of their name."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(path.stem, text))
    return root


@pytest.fixture
def tree(tmp_path):
    return planted(tmp_path / "tree")


def listed(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_a_tree_becomes_a_release(tree):
    before = listed(tree)
    release = read_tree(tree)
    assert listed(tree) == before
    assert (release.name, release.package_version, release.commit) == ("0.17.9", "0.17.9", "")
    assert release.symbols == {"MAMBA": "M", "ATTENTION": "*", "MOE": "E"}
    assert (release.stage_separator, release.mtp_separator) == ("|", None)
    assert release.pattern_flag == "--hybrid-layer-pattern"
    assert release.deprecated_pattern_flags == ("--hybrid-override-pattern",)
    assert release.num_layers_rule == "overridden"
    assert release.stock_spec == (
        "megatron.core.models.mamba.mamba_layer_specs",
        "mamba_stack_spec",
    )
    assert release.entry_script == "pretrain_mamba.py"
    assert release.carries_spec


def test_every_property_of_a_flag_is_read(tree):
    flags = read_tree(tree).flags
    assert flags["--persistent-save-interval"] is flags["--save-interval"]
    assert flags["--save-interval"].name == "--save-interval"
    assert flags["--save-interval"].dest == "persistent_save_interval"
    assert flags["--no-rope-fusion"].action == "store_false"
    assert flags["--no-rope-fusion"].dest == "apply_rope_fusion"
    assert (flags["--backend"].choices, flags["--backend"].default) == (("flash", "local"), "flash")
    assert flags["--both"].aliases == ("--no-both",)
    assert (flags["--sizes"].nargs, flags["--sizes"].default) == (3, [1, 2, 3])
    assert (flags["--maybe"].nargs, flags["--maybe"].const) == ("?", 5)
    assert (flags["--switch"].action, flags["--switch"].const) == ("store_const", 9)


def test_what_was_not_read_is_said(tree):
    notes = read_tree(tree).notes
    for expected in ("WHALE", "--own: any text", "rules for dead flags are those of 0.17.1"):
        assert any(expected in note for note in notes), expected


def test_rules_are_inherited_where_their_flags_exist(tree):
    release = read_tree(tree)
    argv = ["--hybrid-layer-pattern", "M*", "--num-experts", "4"]
    assert [flag.flag for flag in dead_flags(parse(argv, release), release)] == ["--num-experts"]
    assert release.replaced == {"--hybrid-override-pattern": "--hybrid-layer-pattern"}


def test_missing_packages_are_stubbed_and_newer_typing_is_supplied(tmp_path):
    more = "import absent_kernels.deep\nfrom typing import override\nfrom absent_two import thing\n"
    uses = "\n\nclass Layer(thing):\n    value = absent_kernels.deep.Kernel\n"
    notes = read_tree(planted(tmp_path, arguments=more + ARGUMENTS + uses)).notes
    assert "stubbed to build the parser: absent_kernels" in notes
    assert "stubbed to build the parser: absent_two" in notes


def test_a_tree_without_hybrid_models_says_so(tmp_path):
    (root := planted(tmp_path)).joinpath("pretrain_mamba.py").unlink()
    (root / "megatron/core/ssm/mamba_hybrid_layer_allocation.py").unlink()
    (root / "megatron/core/models/mamba/mamba_layer_specs.py").unlink()
    release = read_tree(root)
    assert release.symbols == {}
    assert any("no hybrid entry script" in note for note in release.notes)
    assert any("no hybrid stock spec" in note for note in release.notes)
    assert any("no layer symbols" in note for note in release.notes)


def test_a_written_release_is_loaded_by_its_path(tree, tmp_path):
    path = add_release(tree, name="mine", out=tmp_path / "mine.json")
    release = load_release(path)
    assert release.name == "mine"
    assert release == read_tree(tree, name="mine")
    assert listed(tmp_path) == {str(path), str(tree)} | listed(tree)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_nothing_is_overwritten_unless_told(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = add_release(tree)
    assert path == Path("0.17.9.json")
    with pytest.raises(LoweringError, match="would be overwritten"):
        add_release(tree)
    with pytest.raises(LoweringError, match=r"known release 0\.16\.1"):
        add_release(tree, name="0.16.1")
    assert add_release(tree, overwrite=True) == path


def refused(root: Path, **more: float) -> LoweringError:
    with pytest.raises(LoweringError) as error:
        read_tree(root, **more)
    assert None not in (error.value.given, error.value.allowed, error.value.hint)
    return error.value


def test_a_folder_that_is_no_tree_is_refused(tmp_path):
    assert "which lacks megatron/training/arguments.py" in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"arguments": ""}, "add_megatron_arguments"),
        ({"arguments": "raise RuntimeError('broken here')"}, "broken here"),
        ({"arguments": "import os; os._exit(0)"}, "could not be built"),
        ({"arguments": "def add_megatron_arguments(parser):\n    import megatron.gone"}, "gone"),
        ({"torch": "raise ModuleNotFoundError(\"No module named 'torch'\")"}, "install torch"),
        ({"package_info": "MAJOR = 0\n"}, "version"),
    ],
)
def test_a_tree_without_a_usable_parser_is_refused(tmp_path, changes, what):
    assert what in str(refused(planted(tmp_path, **changes)))


def test_a_parser_that_takes_too_long_is_stopped(tmp_path):
    root = planted(tmp_path, arguments="import time; time.sleep(60)")
    assert "no parser after 0.3 seconds" in str(refused(root, timeout_s=0.3))


def test_a_file_that_cannot_be_written_is_refused_and_leaves_nothing(tree, tmp_path):
    with pytest.raises(LoweringError, match="cannot be written"):
        add_release(tree, name="mine", out=tmp_path / "no" / "mine.json")
    (taken := tmp_path / "taken.json").mkdir()
    with pytest.raises(LoweringError, match="cannot be written"):
        add_release(tree, name="mine", out=taken, overwrite=True)
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.megatron_source
@pytest.mark.parametrize("name", RELEASE_NAMES)
def test_the_packaged_release_is_what_its_tree_says(name, request):
    folder = request.config.getoption("--megatron-sources")
    if folder is None or not (folder / name).is_dir():
        pytest.skip(f"needs the source of Megatron-LM {name}: --megatron-sources DIR")
    release, packaged = read_tree(folder / name, name=name), load_release(name)
    assert release.flags == packaged.flags
    same = ("package_version", "symbols", "stage_separator", "mtp_separator", "stock_spec")
    scripts = ("entry_script", "deprecated_entry_scripts", "pattern_flag", "num_layers_rule")
    for field in (*same, *scripts, "deprecated_pattern_flags", "carries_spec", "dead", "replaced"):
        assert getattr(release, field) == getattr(packaged, field), field


@pytest.mark.megatron_source
@pytest.mark.parametrize("name", RELEASE_NAMES)
def test_a_rule_names_files_that_its_tree_has(name, request):
    folder = request.config.getoption("--megatron-sources")
    if folder is None or not (folder / name).is_dir():
        pytest.skip(f"needs the source of Megatron-LM {name}: --megatron-sources DIR")
    for rule in load_release(name).dead:
        for part in re.findall(r"[\w/]+\.py|core/[\w/]+", rule.why):
            places = (folder / name / "megatron" / part, folder / name / part)
            assert any(place.exists() for place in places), (rule.why, part)
