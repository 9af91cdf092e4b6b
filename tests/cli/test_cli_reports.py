"""Audits, differences, releases, the table and the matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpp_nemo.cli.matrix import _refusals, grouped
from megacpp_nemo.cli.table import FIXED, GROUPS, HOST, entries
from megacpp_nemo.contract import field_paths, recipe
from megacpp_nemo.lowering.audit import audit
from megacpp_nemo.lowering.matrix import matrix
from megacpp_nemo.lowering.releases import FOLDER, RELEASE_NAMES, load_release
from megacpp_nemo.lowering.table import TABLE

AUDIT = ("audit", "nam56r", "--from", "0.16.1", "--to", "0.19.0")


def test_an_audit_says_which_seams_graduate(megacpp):
    out = megacpp(*AUDIT).out
    assert "graduate    3      mla, dsa, mtp" in out
    assert "--hybrid-override-pattern  --hybrid-layer-pattern" in out
    found = audit(recipe("nam56r"), "0.16.1", "0.19.0")
    assert json.loads(megacpp(*AUDIT, "--format", "json").out) == found.to_dict()


def test_an_audit_in_markdown_quotes_its_symbols(megacpp):
    out = megacpp(*AUDIT, "--format", "md").out
    assert "`* multi-latent attention, mla`" in out


def test_a_difference_names_fields_flags_seams_and_layers(megacpp):
    words = ("diff", "nam56r", "nam56r:mode=author_dp", "mtp.num_layers=0")
    found = json.loads(megacpp(*words, "--format", "json").out)
    assert {item["field"] for item in found["fields"]} == {
        "features.mamba",
        "parallelism.sequence_parallel",
        "parallelism.tensor_model_parallel_size",
    }
    assert found["seams_new"] == ["author-mamba"]
    assert len(found["layers"]) == 13
    for form in ("text", "md"):
        out = megacpp(*words, "--format", form).out
        assert "--spec author_mamba.num_heads" in out
        assert "features.mamba" in out


def test_the_launch_of_each_is_shown(megacpp):
    for form in ("text", "md"):
        assert "pretrain_hybrid.py" in megacpp(*AUDIT, "--format", form).out
        two = megacpp("diff", "nam56r", "nam56r:num_nodes=2", "--format", form).out
        assert "num_nodes" in two.partition("Launch")[2].partition("Values")[0]


def test_a_recipe_does_not_differ_from_itself(megacpp):
    assert megacpp("diff", "nam52", "nam52").out.count("no difference") == 5


@pytest.mark.parametrize("name", RELEASE_NAMES)
def test_a_release_is_shown(megacpp, name):
    release = load_release(name)
    assert name in megacpp("releases").out
    assert release.entry_script in megacpp("releases", "show", name).out
    found = json.loads(megacpp("releases", "show", f"core_v{name}", "--format", "json").out)
    assert found["flags"] == len(release.canonical_flags())


def test_releases_are_listed_by_default(megacpp):
    found = json.loads(megacpp("releases", "list", "--format", "json").out)
    assert [release["name"] for release in found["releases"]] == list(RELEASE_NAMES)
    assert megacpp("releases") == megacpp("releases", "list")


def test_a_release_that_is_taken_is_added_only_with_replace(megacpp, tmp_path):
    for part in ("megatron/training/arguments.py", "megatron/core/package_info.py"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    result = megacpp("releases", "add", str(tmp_path))
    assert result.code == 3
    assert "--name mine, --out mine.json, or --replace" in result.err


def test_an_added_release_is_shown_and_can_be_lowered_to(megacpp, tmp_path, monkeypatch):
    def add(path, *, name, out, overwrite):
        assert (path, name, overwrite) == ("tree", "mine", True)
        text = (FOLDER / "0.19.0.json").read_text().replace('"name": "0.19.0"', '"name": "mine"')
        Path(out).write_text(text)
        return Path(out)

    monkeypatch.setattr("megacpp_nemo.lowering.tree.add_release", add)
    out = str(tmp_path / "mine.json")
    result = megacpp("releases", "add", "tree", "--name", "mine", "--out", out, "--replace")
    assert (result.code, result.err) == (0, f"Wrote {out}\n")
    assert result.out.startswith("Megatron-LM mine\n")
    assert megacpp("seams", "nam56r", "--release", out).out.startswith("nam56r on Megatron-LM mine")


def test_the_table_has_every_field_once_and_every_setting(megacpp):
    found = json.loads(megacpp("table", "--format", "json").out)["rows"]
    fields = [row["field"] for row in found if row["field"]]
    assert sorted(fields) == sorted(field_paths())
    flags = {flag["flag"] for row in found for flag in row["flags"]}
    assert flags == {spelling.flag for row in TABLE for spelling in row.flags}
    paths = {path.partition(" ")[0] for row in found for path in row["nemo"]}
    assert paths == {path for row in TABLE for path in (*row.nemo, *row.built)}


def test_the_table_is_in_the_order_of_its_parts():
    order = [*dict.fromkeys(title for _, title in GROUPS), FIXED, HOST]
    groups = list(dict.fromkeys(entry.group for entry in entries()))
    assert groups == order


def test_the_table_of_a_release_has_only_its_flags():
    for name in RELEASE_NAMES:
        release = load_release(name)
        flags = [flag for entry in entries(release) for flag, _, _ in entry.flags]
        assert [flag for flag in flags if flag not in release.flags] == []


def test_words_keep_the_settings_that_have_them(megacpp):
    out = megacpp("table", "rotary", "--format", "md").out
    assert "`model.rotary_base`" in out
    assert "`--lr`" not in out


def test_the_markdown_table_has_whole_rows(megacpp):
    out = megacpp("table", "--format", "md").out
    assert out.isascii()
    for part in out.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_every_cell_of_the_matrix_is_found_in_the_grouped_one():
    cells = matrix()
    refusals = _refusals(cells)
    lines, columns = grouped(cells, refusals)
    place = {release: i for i, column in enumerate(columns) for release in column}
    for cell in cells:
        case = cell.case
        sparse = "on" if case.sparse else "off"
        values = (case.family, case.mode, case.precision, sparse, str(case.mtp))
        own = [x for x in lines if all(v in axis for v, axis in zip(values, x.axes, strict=True))]
        assert len(own) == 1
        expected = refusals.get(cell.refusal) or ", ".join(cell.seams) or "all native"
        assert own[0].results[place[cell.release]] == expected


def test_the_matrix_is_printed_in_every_format(megacpp):
    found = json.loads(megacpp("matrix", "--format", "json").out)
    assert len(found["cells"]) == len(matrix())
    md = megacpp("matrix", "--format", "md").out
    assert "| `nam52` | `nemo_native` | `bf16` | off | 0 |" in md
    assert "refused 1: Megatron 0.15.3 has no layer for" in megacpp("matrix").out
