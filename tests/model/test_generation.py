"""Generation: state carried from token to token, and the choice of the next token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fiddle import build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.families import recipe
from megacpp_nemo.host.cpu import CUDA_FUSIONS
from megacpp_nemo.model import generation
from megacpp_nemo.model.documents import DocumentBoundaries
from megacpp_nemo.model.generation import forward, generate
from megacpp_nemo.model.generation_state import GenerationState, enter
from megacpp_nemo.model.mamba import FusedMambaMixer
from megacpp_nemo.model.recurrent import RecurrentMixer
from megacpp_nemo.recipes.build import model_config
from tests.model.building import (
    VOCABULARY,
    assert_near,
    boundaries_of,
    build_model,
    random_tokens,
    run_model,
    shaken,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process", "no_gradients")

TOKENS = 200
GROUPED = {"multi_latent_attention": False, "kv_channels": 8, "num_query_groups": 2}
SPARSE = {"dsa_indexer_n_heads": 3, "dsa_indexer_head_dim": 16, "dsa_indexer_topk": 20}
AUTHOR = {
    "mamba_lane": "author",
    "author_mamba_num_heads": 4,
    "author_mamba_head_dim": 8,
    "author_mamba_state_dim": 16,
    "author_mamba_mimo_rank": 2,
    "author_mamba_chunk_size": 16,
}
MODELS = {
    "latent": ("AEA", {}),
    "latent_norms": ("AEA", {"qk_layernorm": True}),
    "latent_yarn": ("AEA", {"rope_type": "yarn", "rotary_scaling_factor": 4.0}),
    "sparse": ("AEA", {**SPARSE, "dsa_a_ranks": (1,)}),
    "sparse_norms": ("AEA", {**SPARSE, "dsa_a_ranks": (0, 1), "qk_layernorm": True}),
    "grouped": ("AEA", GROUPED),
    "grouped_rotary": ("AEA", {**GROUPED, "position_embedding_type": "rope"}),
    "mamba": ("MEM", {}),
    "recurrent": ("RER", {}),
    "author_mamba": ("MEM", AUTHOR),
    "author_mamba_siso": ("MEM", {**AUTHOR, "author_mamba_mimo_rank": 1}),
    "inputs": ("AMR", {"ngram_hash": True, "ngram_table_size": 60, "ngram_orders": (2, 4)}),
    "nam56r": ("AEMEAEMEAEMR", {}),
    "nam56r_author_sparse": ("AEMEAEMEAEMR", {**AUTHOR, **SPARSE, "dsa_a_ranks": (1,)}),
}


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def built(pattern: str, **changes: Any) -> nn.Module:
    """Return a small model in evaluation mode, with a context of `TOKENS + 56`."""
    settings = {"num_layers": len(pattern), "seq_length": TOKENS + 56, **changes}
    return settled(build_model(small_config(pattern, **settings)))


def settled(model: nn.Module) -> nn.Module:
    """Return a shaken model in evaluation mode, with M2RNN that contracts.

    Noise made it expand, and such a recurrence amplifies what is rounded.
    """
    for module in model.modules():
        if isinstance(module, RecurrentMixer):
            module.transition.mul_(0.5)
    return model.eval()


def by_pieces(
    model: nn.Module, tokens: Tensor, pieces: Sequence[int]
) -> tuple[Tensor, GenerationState]:
    """Return logits of every token, given to the model in pieces, and the state behind them."""
    batch, seq = tokens.shape
    state = GenerationState(batch_size=batch, max_tokens=seq, all_logits=True)
    logits = [forward(model, piece, state) for piece in tokens.split(list(pieces), dim=1)]
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_equals_the_full_forward(name: str) -> None:
    pattern, changes = MODELS[name]
    model, tokens = built(pattern, **changes), random_tokens(2, TOKENS)
    logits, state = by_pieces(model, tokens, [1] * TOKENS)
    assert_near(logits, run_model(model, tokens))
    assert state.position == TOKENS


def test_the_tiny_recipe_step_by_step_equals_its_full_forward() -> None:
    tiny = recipe("nam56r_tiny")
    config = build(model_config(tiny).config)
    for fusion in CUDA_FUSIONS:
        setattr(config, fusion, False)
    vocabulary = tiny.model.embedding.vocab_size
    model = settled(shaken(config.configure_model(SimpleNamespace(vocab_size=vocabulary))))
    assert (len(model.decoder.layers), config.hidden_size) == (12, 128)
    tokens = torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    logits, _ = by_pieces(model, tokens, [1] * TOKENS)
    assert_near(logits, run_model(model, tokens))


@pytest.mark.parametrize("name", MODELS)
def test_uneven_pieces_equal_the_whole(name: str) -> None:
    pattern, changes = MODELS[name]
    model, tokens = built(pattern, **changes), random_tokens(2, 75)
    expected = run_model(model, tokens)
    for pieces in ([75], [37, 1, 2, 35], [2, 1, 1, 71]):
        assert_near(by_pieces(model, tokens, pieces)[0], expected)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [5, 1, 2, 32]])
def test_n_grams_stop_at_the_end_of_a_document_in_a_prompt(pieces: list[int]) -> None:
    inputs = {**MODELS["inputs"][1], "structure": "core", "reset_state": False}
    model, tokens, end = built("AM", **inputs), random_tokens(2, 40), 7
    tokens[tokens == end] += 1
    tokens[0, [4, 5, 20]], tokens[1, 6] = end, end
    documents = DocumentBoundaries.from_ids(
        torch.tensor([[0] * 5 + [1] + [2] * 15 + [3] * 19, [0] * 7 + [1] * 33])
    )
    state = GenerationState(batch_size=2, max_tokens=40, all_logits=True, end_id=end)
    found = [forward(model, piece, state) for piece in tokens.split(pieces, dim=1)]
    assert_near(torch.cat(found, 1), run_model(model, tokens, documents))
    # The memory looks back at three tokens, which are all that it carries.
    assert state.carried_elements()[0] == 2 * 3
    assert not torch.equal(run_model(model, tokens, documents), run_model(model, tokens))


def test_a_prompt_of_two_documents_is_read_as_two() -> None:
    inputs = {**MODELS["inputs"][1], "reset_state": False}
    model, end = built("M", **inputs), 7
    tokens = torch.tensor([[3, 9, end, 4, 11, 2]])
    logs = run_model(model, tokens, boundaries_of([3, 3]))[:, -1].log_softmax(-1)
    likely = generate(model, tokens, max_new_tokens=1, end_id=end)
    assert likely.tokens == [[logs.argmax().item()]]
    assert likely.log_probabilities[0] == pytest.approx([logs.max().item()], abs=1e-5)
    across = generate(model, tokens, max_new_tokens=1)
    assert across.log_probabilities[0] != pytest.approx(likely.log_probabilities[0], abs=1e-5)


def test_only_the_last_tokens_logits_are_computed_unless_all_are_asked_for() -> None:
    model, tokens = built("AEMR"), random_tokens(2, 9)
    state = GenerationState(batch_size=2, max_tokens=9)
    last = forward(model, tokens, state)
    assert_near(last, run_model(model, tokens)[:, -1:])


def test_latents_and_rotary_keys_are_all_that_latent_attention_carries() -> None:
    model = built("AEA")
    config = model.config
    state = by_pieces(model, random_tokens(3, 50), [30, 20])[1]
    width = config.kv_lora_rank + config.qk_pos_emb_head_dim
    assert state.carried_elements() == {1: 50 * 3 * width, 3: 50 * 3 * width}


def test_a_norm_inside_the_up_projection_is_applied_to_the_latents() -> None:
    """Transformer Engine keeps it there; without it, the same weight stands alone."""
    model, tokens = built("AEA", qk_layernorm=True), random_tokens(2, 30)
    expected = by_pieces(model, tokens, [20, 10])[0]
    for layer in (model.decoder.layers[0], model.decoder.layers[2]):
        attention = layer.self_attention
        attention.linear_kv_up_proj.layer_norm_weight = attention.kv_layernorm.weight
        attention.kv_layernorm = nn.Identity()
    assert_near(by_pieces(model, tokens, [20, 10])[0], expected)


def test_a_sparse_layer_carries_its_indexers_keys_too() -> None:
    pattern, changes = MODELS["sparse"]
    model = built(pattern, **changes)
    config, state = model.config, by_pieces(model, random_tokens(2, 50), [30, 20])[1]
    dense = config.kv_lora_rank + config.qk_pos_emb_head_dim
    sparse = dense + config.dsa_indexer_head_dim
    assert state.carried_elements() == {1: 100 * dense, 3: 100 * sparse}


@pytest.mark.parametrize("pattern", ["MEM", "RER"])
def test_a_recurrent_layer_carries_no_more_behind_a_long_prefix(pattern: str) -> None:
    model = built(pattern)
    sizes = [by_pieces(model, random_tokens(2, n), [n])[1].carried_elements() for n in (8, TOKENS)]
    assert sizes[0] == sizes[1]
    mixer = model.decoder.layers[0].mixer
    taps, channels = mixer.conv1d.weight.size(-1), mixer.conv1d.weight.size(0)
    if pattern == "MEM":
        state = mixer.nheads * mixer.headdim * mixer.d_state
    else:
        state = mixer.num_heads * mixer.key_dim * mixer.value_dim
    assert sizes[0][1] == 2 * (channels * (taps - 1) + state)


class _Counted(TorchDispatchMode):
    """Counts the elements that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += sum(
            t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)
        )
        return result


def elements_of_a_token(model: nn.Module, prefix: int) -> int:
    """Return how many elements one more token makes the model write behind a prefix."""
    state = GenerationState(batch_size=1, max_tokens=TOKENS + 1)
    forward(model, random_tokens(1, prefix), state)
    with _Counted() as counted:
        forward(model, random_tokens(1, 1), state)
    return counted.elements


@pytest.mark.parametrize("pattern", ["MEM", "RER"])
def test_a_tokens_cost_does_not_grow_with_the_prefix_of_a_recurrent_layer(pattern: str) -> None:
    model = built(pattern)
    costs = {elements_of_a_token(model, prefix) for prefix in (4, 50, TOKENS)}
    assert len(costs) == 1


def test_a_tokens_cost_grows_by_one_key_a_token_for_attention() -> None:
    model = built("AEA")
    costs = [elements_of_a_token(model, prefix) for prefix in (50, 100, 150, 200)]
    growth = {later - earlier for earlier, later in itertools.pairwise(costs)}
    assert len(growth) == 1
    assert growth.pop() > 0


@pytest.mark.parametrize("name", ["nam56r", "grouped_rotary"])
def test_greedy_takes_the_likeliest_token_of_the_full_forward(name: str) -> None:
    pattern, changes = MODELS[name]
    model, row = built(pattern, **changes), random_tokens(2, 7)
    said = generate(model, row, max_new_tokens=12)
    for _ in range(12):
        row = torch.cat((row, run_model(model, row)[:, -1].argmax(-1, keepdim=True)), 1)
    assert said.tokens == row[:, 7:].tolist()
    logs = run_model(model, row)[:, 6:-1].log_softmax(-1)
    expected = logs.gather(2, row[:, 7:, None]).squeeze(2)
    assert_near(torch.tensor(said.log_probabilities), expected)


def test_a_prompt_is_read_in_pieces_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = built("AEMR"), random_tokens(1, 50)
    whole = generate(model, prompt, max_new_tokens=8)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 16)
    pieces = generate(model, prompt, max_new_tokens=8)
    assert pieces.tokens == whole.tokens


class Cycle(nn.Module):
    """Says the token that follows the last one in 3, 1, 4, 5, 9, 2, 6, 0 (and so on)."""

    ORDER = (3, 1, 4, 5, 9, 2, 6, 0)

    def __init__(self) -> None:
        super().__init__()
        self.config = small_config("AEMR", num_layers=4)
        self.vocab_size, self.max_sequence_length = 12, 64
        following = torch.full((12, 12), -9.0)
        for token, after in zip(self.ORDER, (*self.ORDER[1:], self.ORDER[0]), strict=True):
            following[token, after] = 3.0
        following[:, 11] = 20.0  # pads the vocabulary
        self.following = nn.Parameter(following)

    def forward(self, tokens: Tensor, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.following[tokens]


def test_a_known_cycle_is_continued() -> None:
    said = generate(Cycle(), [3, 1], max_new_tokens=10, vocab_size=11)
    assert said.tokens == [[4, 5, 9, 2, 6, 0, 3, 1, 4, 5]]
    chance = torch.tensor([3.0] + [-9.0] * 10).log_softmax(0)[0].item()
    assert said.log_probabilities[0] == pytest.approx([chance] * 10, abs=1e-6)


def test_the_end_of_the_document_ends_each_row() -> None:
    prompt = torch.tensor([[3, 1], [2, 6]])
    said = generate(Cycle(), prompt, max_new_tokens=10, end_id=0, vocab_size=11)
    assert said.tokens == [[4, 5, 9, 2, 6, 0], [0]]
    assert [len(row) for row in said.log_probabilities] == [6, 1]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([VOCABULARY], {}, "does not know"),
        ([-1], {}, "does not know"),
        ([9], {"vocab_size": 9}, "does not know"),
        ([1] * 64, {}, "leaves no room"),
        ([1] * 60, {"max_new_tokens": 5}, "do not fit"),
        ([1], {"max_new_tokens": 0}, "do not fit"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    prompt: list[int], settings: dict[str, Any], message: str
) -> None:
    model = built("M", num_layers=1, seq_length=64)
    with pytest.raises(RuntimeRefusal, match=message) as refused:
        generate(model, prompt, **{"max_new_tokens": 1, **settings})
    assert all((refused.value.given, refused.value.allowed, refused.value.hint))


def test_a_context_filled_to_its_end_is_generated() -> None:
    model = built("AM", num_layers=2, seq_length=16)
    assert len(generate(model, [1] * 10, max_new_tokens=6).tokens[0]) == 6


def test_a_row_longer_than_its_caches_is_refused() -> None:
    model = built("AEA")
    state = GenerationState(batch_size=1, max_tokens=4)
    forward(model, random_tokens(1, 3), state)
    with pytest.raises(RuntimeRefusal, match="longer than its caches"):
        forward(model, random_tokens(1, 2), state)


def test_a_context_of_another_kind_is_refused() -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    with pytest.raises(RuntimeRefusal, match="a context of their own"):
        enter(StaticInferenceContext(1, 8), 1)


def test_the_fused_mamba_mixer_is_refused_and_told_what_serves() -> None:
    model = built("A", num_layers=1)
    # It cannot be constructed without its kernels.
    mixer = FusedMambaMixer.__new__(FusedMambaMixer)
    nn.Module.__init__(mixer)
    model.mixer = mixer
    with pytest.raises(RuntimeRefusal, match=r"(?s)fused Mamba.*mamba_path='portable'"):
        generate(model, [1], max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"), [("tensor_model_parallel_size", 2), ("window_size", (64, 0))]
)
def test_settings_that_generation_does_not_know_are_refused(name: str, value: Any) -> None:
    model = built("A", num_layers=1)
    setattr(model.config, name, value)
    with pytest.raises(RuntimeRefusal, match=name):
        generate(model, [1], max_new_tokens=1)
