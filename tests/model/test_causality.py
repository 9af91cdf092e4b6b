"""What an output may depend on: nothing later, and nothing in another document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.model.building import (
    VOCABULARY,
    assert_near,
    boundaries_of,
    build_model,
    random_tokens,
    run_model,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

SEQ = 16
# Tokens are permuted into experts, so their sums round differently; a real dependence is 1e-3
# and more.
ROUNDING = 1e-5
PATTERNS = ["A", "E", "M", "R", "AEMR", "AEMEAEMEAEMR"]


def changed(tokens: Tensor, at: int) -> Tensor:
    """Return the tokens with another one at `at` in every row."""
    other = tokens.clone()
    other[:, at] = (other[:, at] + 1) % VOCABULARY
    return other


def effect(model: nn.Module, at: int, boundaries=None) -> Tensor:
    """Return `[seq]`: how much each output changes when the token at `at` does."""
    tokens = random_tokens(2, SEQ)
    with torch.no_grad():
        before = run_model(model, tokens, boundaries)
        after = run_model(model, changed(tokens, at), boundaries)
    return (after - before).abs().amax(dim=(0, 2)) / before.abs().max()


@pytest.mark.parametrize(
    ("pattern", "latent"), [*((p, True) for p in PATTERNS), ("A", False), ("AEMR", False)]
)
def test_a_token_changes_no_output_before_it(pattern, latent):
    changes = {"multi_latent_attention": latent, "num_query_groups": 2}
    model = build_model(small_config(pattern, **changes))
    for at in (0, 7, SEQ - 1):
        change = effect(model, at)
        assert change[:at].le(ROUNDING).all()
        assert change[at] > 1e-3


@pytest.mark.parametrize("pattern", ["A", "M", "R"])
def test_layers_that_mix_tokens_carry_a_change_to_later_outputs(pattern):
    change = effect(build_model(small_config(pattern)), at=3)
    assert change[4:7].gt(1e-4).all()


@pytest.mark.parametrize("pattern", ["M", "R", "E", "EMR"])
def test_a_later_document_does_not_depend_on_an_earlier_one(pattern):
    model = build_model(small_config(pattern))
    change = effect(model, at=4, boundaries=boundaries_of([6, 1, 9], [6, 10]))
    assert change[6:].le(ROUNDING).all()
    assert change[4] > 1e-3


@pytest.mark.parametrize("attention", ["latent", "plain"])
@pytest.mark.parametrize("reset", [False, True])
def test_attention_crosses_documents_unless_its_mask_is_reset(attention, reset):
    config = small_config(
        "A",
        reset_attention_mask=reset,
        reset_state=False,
        multi_latent_attention=attention == "latent",
    )
    change = effect(build_model(config), at=4, boundaries=boundaries_of([6, 10], [6, 10]))
    assert change[4] > 1e-3
    if reset:
        assert change[6:].le(ROUNDING).all()
    else:
        assert change[6:].gt(1e-4).all()


@pytest.mark.parametrize("pattern", ["AEMR", "AEMEAEMEAEMR"])
def test_a_packed_row_is_its_documents_run_separately(pattern):
    model = build_model(small_config(pattern, reset_attention_mask=True))
    tokens, lengths = random_tokens(1, SEQ), [5, 1, 10]
    with torch.no_grad():
        packed = run_model(model, tokens, boundaries_of(lengths))
        apart = [run_model(model, part) for part in tokens.split(lengths, dim=1)]
    assert_near(packed, torch.cat(apart, dim=1))


def test_the_forward_step_gives_the_model_the_batchs_documents():
    from megacpp_nemo.model.steps import hybrid_forward_step

    config = small_config("AEMR", reset_attention_mask=True)
    model = build_model(config)
    tokens, labels = random_tokens(1, SEQ), random_tokens(1, SEQ, seed=1)
    boundaries = boundaries_of([5, 11])
    batch = {
        "tokens": tokens,
        "labels": labels,
        "position_ids": torch.arange(SEQ).unsqueeze(0),
        "document_ids": boundaries.document_ids,
    }

    def called(input_ids, position_ids, labels, loss_mask, packed_seq_params):
        assert loss_mask is None
        return model(
            input_ids, position_ids, None, labels=labels, packed_seq_params=packed_seq_params
        )

    called.config = config
    assert_near(hybrid_forward_step(called, batch), run_model(model, tokens, boundaries, labels))
    del batch["document_ids"]
    assert_near(hybrid_forward_step(called, batch), run_model(model, tokens, None, labels))
