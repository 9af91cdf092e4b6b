"""One description for every picture: what the cells are, whose, and what they cost."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from math import prod
from pathlib import Path

import pytest
from PIL import Image

from megacpp_nemo.contract import BlockFamily
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.planner.parameters import parameters
from megacpp_nemo.report.picture import Picture
from megacpp_nemo.report.png import png
from megacpp_nemo.report.svg import svg

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def nam56r(on):
    return on("0.16.1", "nam56r")


def letters(picture: Picture) -> str:
    return "".join(cell.letter for cell in picture.layers)


def drawn(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(svg(picture))


def titles(picture: Picture) -> list[str]:
    groups = [group for group in drawn(picture).iter(f"{SVG}g") if group.get("class") == "cell"]
    return [str(group.findtext(f"{SVG}title")) for group in groups]


def test_every_layer_has_its_letter_and_its_owner(nam56r):
    assert letters(nam56r.picture) == "AEMEDEMEDEMRDEMEAEMEDEMRDEMEDEMEAEMRDEMEDEMEDEMRAEME"
    owners = [layer.owner for layer in lower(nam56r.recipe).layers]
    assert [cell.owner for cell in nam56r.picture.layers] == owners
    assert letters(nam56r.picture).replace("D", "A") == str(nam56r.recipe.layers)


def test_dsa_ranks_are_those_of_the_recipe(nam56r):
    ranks = tuple(cell.a_rank for cell in nam56r.picture.layers if cell.letter == "D")
    assert ranks == nam56r.recipe.model.sparse_attention.a_ranks
    assert all((cell.a_rank is None) == (cell.letter not in "AD") for cell in nam56r.picture.layers)


def test_the_cells_hold_every_parameter_once(nam56r):
    whole = sum(prod(parameter.shape) for parameter in parameters(nam56r.recipe))
    assert sum(cell.cost.count.total for cell in nam56r.picture.cells) == whole
    assert sum(cell.weight_bytes for cell in nam56r.picture.cells) == 2 * whole


def test_a_line_holds_whole_tiles(on):
    assert on("0.16.1", "nam56r").picture.row == 24
    assert on("0.19.0", "nam56r", "pattern=AEM", "depth=7", "a_ranks=[]").picture.row == 24
    long = on("0.19.0", "nam56r", f"pattern={'AE' * 20}", "depth=40", "a_ranks=[]")
    assert [len(row) for row in long.picture.rows] == [26, 14]


def test_stages_and_chunks_are_told(on):
    words = ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2")
    picture = on("0.19.0", "nam56r", *words).picture
    assert [segment[0].stage for segment in picture.segments] == [
        "stage 1",
        "stage 2",
        "stage 1, chunk 2",
        "stage 2, chunk 2",
    ]
    assert [len(segment) for segment in picture.segments] == [13] * 4
    assert all(cell.piece.stage == 1 for cell in (*picture.after, *picture.depths[0]))


def test_prediction_depths_are_a_seam_where_the_release_has_none(on):
    for release, owner in (("0.16.1", "seam mtp, in a NeMo run only"), ("0.19.0", "native")):
        (depth,) = on(release, "nam56r").picture.depths
        assert {cell.owned for cell in depth} == {owner}
        assert [cell.letter for cell in depth] == ["+", "A", "E", "n"]


def test_a_refused_recipe_has_a_picture_without_owners(on):
    refused = on("0.15.3", "nam56r")
    assert refused.lowering is None
    assert len(refused.picture.layers) == 52
    assert {cell.owned for cell in refused.picture.cells} == {""}
    assert refused.picture.seams == {}


def test_a_cell_of_every_layer_is_drawn_with_its_title(nam56r):
    found = titles(nam56r.picture)
    assert len(found) == 52 + 3 + 4
    assert found[1].startswith("Layer 1: multi-latent attention, A-rank 0; seam mla; stage 1; ")
    assert found[12].startswith("Layer 12: M2RNN; seam m2rnn; stage 1; 15.7 MiB of weights, ")
    assert found[2].startswith("Layer 2: mixture of experts; native; ")


@pytest.mark.parametrize(
    ("release", "words"),
    [
        ("0.16.1", ("nam56r",)),
        ("0.19.0", ("nam56r_4096", "pipeline_model_parallel_size=4")),
        ("0.15.3", ("nam56r_tiny",)),
        ("0.19.0", ("nam52", "name=a<b>&\"c'")),
    ],
)
def test_an_svg_is_well_formed_and_holds_all_it_draws(on, release, words):
    picture = on(release, *words).picture
    root = drawn(picture)
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    assert root.tag == f"{SVG}svg"
    for shape in root.iter(f"{SVG}rect"):
        left, top = float(shape.get("x", 0)), float(shape.get("y", 0))
        assert 0 <= left <= left + float(str(shape.get("width"))) <= width
        assert 0 <= top <= top + float(str(shape.get("height"))) <= height
    assert picture.name in str(root.findtext(f"{SVG}title"))
    assert not [name for node in root.iter() for name in node.attrib if "href" in name]


def test_a_bar_is_as_tall_as_its_share(nam56r):
    bars = {}
    for group in drawn(nam56r.picture).iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title") or ""
        if title.startswith("Layer "):
            rects = group.findall(f"{SVG}rect")
            bars[title.partition(":")[0]] = float(str(rects[1].get("height")))
    cells = {cell.piece.number: cell.weight_bytes for cell in nam56r.picture.layers}
    for number in (3, 5):
        part = cells[number] / cells[2]
        assert bars[f"Layer {number}"] == pytest.approx(part * bars["Layer 2"], abs=0.06)


def test_a_png_is_the_svg_drawn_twice_as_large(on):
    picture = on("0.16.1", "nam56r_tiny").picture
    image = Image.open(io.BytesIO(png(picture))).convert("RGB")
    root = drawn(picture)
    assert image.size == (2 * int(str(root.get("width"))), 2 * int(str(root.get("height"))))
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xCC, 0x79, 0xA7)} <= colours
    # The letter of layer 1 is drawn: its font was found.
    cell = image.crop((272, 188, 328, 252))
    assert {colour for _, colour in cell.getcolors(1 << 16)} > {(0x00, 0x72, 0xB2), (255, 255, 255)}


def test_the_picture_of_the_documentation_is_up_to_date(nam56r):
    shown = Path(__file__).parents[2] / "docs" / "strip.svg"
    renew = "megacpp strip nam56r --out docs/strip.svg"
    assert shown.read_text(encoding="utf-8") == svg(nam56r.picture), renew


def test_families_of_a_picture_are_those_of_the_pattern(on):
    picture = on("0.19.0", "nam56r", "pattern=AEMG", "depth=8", "a_ranks=[]").picture
    assert {cell.piece.family for cell in picture.layers} == {
        BlockFamily.ATTENTION,
        BlockFamily.EXPERTS,
        BlockFamily.MAMBA,
        BlockFamily.GATED_DELTA_NET,
    }
