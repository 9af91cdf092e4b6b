"""Every recipe of the matrix lowers to what its release parses and reads, or says why not."""

from __future__ import annotations

import pytest

from megacpp_nemo.contract.errors import LoweringError, MegaCppError
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.matrix import Cell, cases, matrix
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release

REASONS = {
    "0.15.3": "Megatron 0.15.3 has no layer for multi-latent attention",
    "main-2026-08": "Megatron main-2026-08 builds this prediction depth and cannot train it",
}


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return matrix()


def test_the_matrix_has_every_recipe_on_every_release(cells):
    assert len(cases()) == 3 * 2 * 2 * 2 * 3
    assert len(cells) == len({(cell.case, cell.release) for cell in cells})
    assert len(cells) == len(cases()) * len(RELEASE_NAMES)


@pytest.mark.parametrize("name", RELEASE_NAMES)
def test_every_lowered_command_parses_without_a_dead_flag(cells, name):
    release = load_release(name)
    for cell in cells:
        if cell.release == name and not cell.refusal:
            lowering = lower(cell.case.recipe, release=release)
            arguments = parse(lowering.command, release)
            assert dead_flags(arguments, release) == ()
            assert cell.seams == tuple(seam.id for seam in lowering.seams)


def test_every_refusal_names_its_reason_and_what_to_try(cells):
    refused = [cell for cell in cells if cell.refusal]
    assert {cell.release for cell in refused} == set(REASONS)
    # One depth of AE has its E in the second place, which that router has no room for.
    main = [cell for cell in cells if cell.release == "main-2026-08"]
    one_depth = [cell for cell in main if cell.case.recipe.model.mtp.num_layers == 1]
    assert one_depth == [cell for cell in main if cell.refusal]
    for cell in refused:
        assert cell.seams == ()
        with pytest.raises(MegaCppError) as error:
            lower(cell.case.recipe, release=cell.release)
        assert str(error.value).startswith(cell.refusal)
        assert cell.refusal.startswith(REASONS[cell.release])
        assert None not in (error.value.given, error.value.allowed, error.value.hint)


def test_what_a_later_release_owns_is_no_seam_there(cells):
    later = RELEASE_NAMES.index("0.19.0")
    for cell in cells:
        if RELEASE_NAMES.index(cell.release) >= later:
            assert not {"mla", "dsa", "mtp"} & set(cell.seams)


def test_an_unknown_release_is_refused():
    with pytest.raises(LoweringError, match="No Megatron-LM release"):
        matrix(("0.1",))
