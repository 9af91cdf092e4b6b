"""STP in one process: value and gradients against the equation, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_nemo.callbacks.stp import SemanticTube
from megacpp_nemo.callbacks.tube import draw_triples, row_uniforms
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import StpLever
from tests.model.building import (
    assert_near,
    boundaries_of,
    build_model,
    megatron,
    random_tokens,
    run_model,
    small_config,
)

SEED, STEP, SEQ, SPANS = 7, 3, 16, 4
DOCUMENTS = boundaries_of([10, 6], [1, 15])


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    with megatron():
        calculator.init_num_microbatches_calculator(0, None, 2, 1, 1)
        try:
            yield build_model(small_config("AEMR"))
        finally:
            calculator.destroy_num_microbatches_calculator()


@pytest.fixture
def tube(model: nn.Module) -> Iterator[Callable[..., SemanticTube]]:
    """Makes tubes on the model, whose hooks end with the test, as do changes of its settings."""
    made: list[SemanticTube] = []
    config: Any = model.config
    settings = dict(vars(config))

    def make(**changes: Any) -> SemanticTube:
        lever = {"weight": 0.5, "start_step": 0, "layers": (2, 4), "spans": SPANS, **changes}
        made.append(SemanticTube([model], StpLever(**lever), SEED))
        return made[-1]

    yield make
    for one in made:
        one.close()
    vars(config).update(settings)
    model.requires_grad_(True)
    for layer in model.decoder.layers:
        layer.current_microbatch = 0


def forward(model: nn.Module, micro_batch: int = 0, documents: Any = None) -> Tensor:
    """Return the main loss of one micro-batch of two rows."""
    for layer in model.decoder.layers:
        layer.current_microbatch = micro_batch
    tokens = random_tokens(2, SEQ)
    return run_model(model, tokens, documents or DOCUMENTS, labels=tokens).mean()


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a micro-batch's loss, as Megatron's schedule scales it."""
    for parameter in model.parameters():
        parameter.grad = None
    scaled = getattr(model.config, "grad_scale_func", None) or (lambda loss: loss)
    scaled(loss / calculator.get_num_microbatches()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients(
    model: nn.Module, tube: SemanticTube | None = None, **batch: Any
) -> dict[str, Tensor]:
    """Return the gradients of a step of one micro-batch, with or without STP."""
    if tube is None:
        return backward(model, forward(model, **batch))
    tube.begin_step(STEP)
    found = backward(model, forward(model, **batch))
    tube.end_step()
    return found


@contextmanager
def outputs_of(model: nn.Module, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Collect what some layers return, `[seq, batch, hidden]`."""
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    hooks = [model.decoder.layers[number - 1].register_forward_hook(keep) for number in layers]
    yield kept
    for hook in hooks:
        hook.remove()


def loss_of(states: Tensor, first_row: int) -> Tensor:
    """Return the loss of one layer from its output, with torch's own cosine."""
    uniforms = torch.stack([row_uniforms(SEED, STEP, first_row + i, SPANS) for i in range(2)])
    positions = draw_triples(DOCUMENTS.document_ids, SEQ, uniforms).positions
    distances = []
    for row in range(2):
        for triple in positions[row].tolist():
            s, r, t = (states[position, row] for position in triple)
            distances.append(1 - functional.cosine_similarity(t - r, r - s, dim=0))
    return torch.stack(distances).mean()


@pytest.mark.parametrize("layers", [(), (1,), (2, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_value_and_gradients_are_those_of_the_loss_added_to_the_main_one(
    model, tube, layers, micro_batch
):
    with outputs_of(model, layers or (4,)) as states:
        main = forward(model, micro_batch)
    loss = torch.stack([loss_of(one, 2 * micro_batch) for one in states]).mean()
    expected = backward(model, main + 0.5 * loss)
    stp = tube(layers=layers, weight=0.5)
    found = gradients(model, stp, micro_batch=micro_batch)
    assert stp.value == pytest.approx(loss.item(), abs=1e-6)
    assert stp.straightness == pytest.approx(1 - loss.item(), abs=1e-6)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert_near(gradient, expected[name])


def test_gradients_reach_every_listed_layer_and_what_is_before_it(model, tube):
    plain, joined = gradients(model), gradients(model, tube(layers=(2,)))
    changed = {name for name in plain if not torch.equal(plain[name], joined[name])}
    for part in ("embedding", "decoder.layers.0", "decoder.layers.1"):
        assert any(name.startswith(part) for name in changed)
    for part in ("decoder.layers.2", "decoder.layers.3", "decoder.final_norm", "output_layer"):
        assert not any(name.startswith(part) for name in changed)


def test_the_gradient_follows_the_loss_scale(model, tube):
    stp = tube()
    plain, joined = gradients(model), gradients(model, stp)
    model.config.grad_scale_func = lambda loss: loss * 8
    # Megatron's own auxiliary loss takes its scale from the schedule, which does not run here.
    model.config.moe_aux_loss_coeff = 0.0
    plain_8, joined_8 = gradients(model), gradients(model, stp)
    name = "decoder.layers.2.mixer.out_proj.weight"
    torch.testing.assert_close(
        joined_8[name] - plain_8[name], 8 * (joined[name] - plain[name]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("changes", [{"weight": 0.0}, {"start_step": 4}], ids=["weight", "step"])
@pytest.mark.parametrize("measure", [False, True])
def test_out_of_force_it_measures_if_asked_and_changes_nothing(model, tube, changes, measure):
    plain = gradients(model)
    stp = tube(measure=measure, **changes)
    joined = gradients(model, stp)
    assert all(torch.equal(plain[name], joined[name]) for name in plain)
    assert (stp.value is not None) == measure


def test_a_forward_pass_without_gradients_is_not_counted(model, tube):
    stp = tube(measure=True, weight=0.0)
    stp.begin_step(0)
    with torch.no_grad():
        run_model(model, random_tokens(1, SEQ))
    stp.end_step()
    assert stp.value is None


def test_the_global_random_state_is_left_alone(model, tube):
    stp = tube()
    stp.begin_step(0)
    run_model(model, random_tokens(1, SEQ))
    before = torch.get_rng_state()
    stp.begin_step(1)
    run_model(model, random_tokens(1, SEQ))
    assert torch.equal(before, torch.get_rng_state())


def test_full_recomputation_changes_neither_value_nor_gradients(model, tube):
    stp = tube(layers=(1, 2, 3, 4))
    kept = gradients(model, stp)
    again = build_model(small_config("AEMR", recompute_granularity="full"))
    recomputing = SemanticTube([again], stp.lever, SEED)
    found = gradients(again, recomputing)
    assert recomputing.value == stp.value
    assert all(torch.equal(kept[name], found[name]) for name in kept)


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a device: its values, read by the host."""

    OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function.name() in self.OPERATIONS
        return function(*args, **(kwargs or {}))


def test_nothing_in_the_passes_waits_for_a_device(model, tube):
    stp = tube(layers=(1, 2, 3, 4))
    counts = []
    for step in (None, 0):
        if step is not None:
            stp.begin_step(step)
        with Waits() as waits:
            backward(model, forward(model))
        counts.append(waits.count)
    stp.end_step()
    assert counts[0] == counts[1]


def unhook(model: nn.Module, tube: SemanticTube) -> None:
    tube.close()


def bypass(model: nn.Module, tube: SemanticTube) -> None:
    layer = model.decoder.layers[1]
    inner = layer.forward
    model.decoder.layers[1] = Bypass(layer, inner)


class Bypass(nn.Module):
    """A layer's forward function, called by another module."""

    def __init__(self, layer: Any, inner: Any) -> None:
        super().__init__()
        self.layer_number, self.inner, self._layer = layer.layer_number, inner, [layer]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def freeze(model: nn.Module, tube: SemanticTube) -> None:
    for part in (model.embedding, *model.decoder.layers[:2]):
        part.requires_grad_(False)


def detach(model: nn.Module, tube: SemanticTube) -> None:
    layer = model.decoder.layers[2]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            {**kwargs, "hidden_states": kwargs["hidden_states"].detach()},
        ),
        with_kwargs=True,
    )
    tube._hooks.append(hook)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (unhook, "layer 2: 0 forward passes.*layer 4: 0 forward passes"),
        (bypass, "layer 2: 0 forward passes, 0 triples"),
        (freeze, r"layer 2: 1 forward passes, 8 triples, 0 with gradients\n"),
        (detach, r"layer 2: 1 forward passes, 8 triples, 0 with gradients\n"),
    ],
)
def test_a_step_without_gradients_at_a_listed_layer_is_refused(model, tube, fault, says):
    layers = list(model.decoder.layers)
    stp = tube()
    fault(model, stp)
    try:
        with pytest.raises(RuntimeRefusal, match=says):
            gradients(model, stp)
    finally:
        model.decoder.layers = nn.ModuleList(layers)


def test_a_step_without_a_document_of_three_tokens_is_refused(model, tube):
    stp = tube()
    with pytest.raises(RuntimeRefusal, match="some document has three tokens"):
        gradients(model, stp, documents=boundaries_of([2] * 8, [2] * 8))
    assert stp.value is None


def test_one_long_enough_document_in_a_batch_is_enough(model, tube):
    stp = tube()
    gradients(model, stp, documents=boundaries_of([2] * 8, [1] * 13 + [3]))
    assert 0 <= stp.value <= 2


def test_a_layer_that_runs_twice_in_a_micro_batch_is_refused(model, tube):
    tube().begin_step(0)
    run_model(model, random_tokens(1, SEQ))
    with pytest.raises(RuntimeRefusal, match="ran twice in one micro-batch"):
        run_model(model, random_tokens(1, SEQ))


def test_a_layer_that_no_stage_has_is_refused_by_its_number(tube):
    with pytest.raises(RuntimeRefusal, match=r"layers 5, 9(?s:.*)layers=\(4,\)"):
        tube(layers=(2, 5, 9))


@pytest.mark.parametrize(
    ("field", "value"), [("context_parallel_size", 2), ("calculate_per_token_loss", True)]
)
def test_what_cannot_be_computed_or_scaled_right_is_refused(model, tube, field, value):
    setattr(model.config, field, value)
    with pytest.raises(RuntimeRefusal, match=field):
        tube()


def test_packing_that_it_cannot_read_is_refused(model, tube):
    stp = tube()
    stp.begin_step(0)
    with pytest.raises(RuntimeRefusal, match="thd"):
        stp._triples(0, torch.zeros(SEQ, 1, 4), PackedSeqParams(qkv_format="thd"))
