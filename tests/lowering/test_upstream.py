"""Every lowering against the releases' own parsers, validators and configurations."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract import HybridRecipe, MegaCppError, recipe
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.releases import RELEASE_NAMES, load_release

PROGRAM = Path(__file__).parents[1] / "support" / "upstream_config.py"
FILES = {"files.data_path": ("/data/a",), "files.tokenizer_dir": "/data/tokenizer"}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"pipeline_model_parallel_size": 2},
    {"latent_attention": False, "sparse_attention": False},
    {"latent.layernorm": True, "sparse_attention": False},
    {"features.experts": False, "precision": "bf16"},
)

# Fields in which the NeMo recipe's configuration may differ from Megatron's, and why.
DIFFER = {
    "attention_softmax_in_fp32": "read by the attention without Transformer Engine only",
    "cp_comm_type": "read with context parallelism only",
    "cross_entropy_loss_fusion": "speed",
    "ffn_hidden_size": "read by dense MLPs only, and then given",
    "gradient_accumulation_fusion": "speed",
    "inference_sampling_seed": "read by generation only",
    "mamba_num_heads": "read by Mamba-2 layers only, and then given",
    "mamba_state_dim": "read by Mamba-2 layers only, and then given",
    "masked_softmax_fusion": "speed",
    "moe_grouped_gemm": "stock specs group in any case",
    "persist_layer_norm": "speed",
    "rotary_scaling_factor": "read by YaRN only",
    "use_cpu_initialization": "both false",
    # The name of the spec carries these where the release has no such layer.
    "dsa_indexer_head_dim": "in the spec's name",
    "dsa_indexer_loss_coeff": "in the spec's name",
    "dsa_indexer_n_heads": "in the spec's name",
    "dsa_indexer_topk": "in the spec's name",
    "experimental_attention_variant": "in the spec's name",
    "mtp_num_layers": "in the spec's name",
}


def tree(request: pytest.FixtureRequest, release: str) -> Path:
    folder = request.config.getoption("--megatron-sources")
    if folder is None or not (folder / release).is_dir():
        pytest.skip(f"needs a Megatron-LM tree of {release}: --megatron-sources DIR")
    return Path(folder / release).resolve()


def lowerings(release: str) -> list[tuple[HybridRecipe, Lowering]]:
    """Return every recipe of the matrix, and some of its variants, that lowers."""
    found = []
    for name, mode, dsa, mtp, precision, variant in itertools.product(
        ("nam52", "nam56r", "nam56r_4096"),
        ("nemo_native", "author_dp"),
        (True, False),
        (0, 1, 2),
        ("bf16", "fp8"),
        VARIANTS,
    ):
        changes = {"sparse_attention": dsa, "mtp.num_layers": mtp, "precision": precision}
        try:
            intent = recipe(name, mode=mode, changes={**changes, **FILES, **variant})
            found.append((intent, lower(intent, release=release)))
        except MegaCppError:
            continue  # refused: the other tests hold what is refused, and how
    return found


def asked(folder: Path, jobs: list[tuple[HybridRecipe, Lowering]]) -> list[dict[str, Any]]:
    """Return what the tree makes of each command line."""
    vectors = [
        {"argv": list(lowering.argv), "world_size": intent.parallelism.world_size}
        for intent, lowering in jobs
    ]
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps(vectors),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", RELEASE_NAMES)
def test_the_releases_own_parser_and_validator_take_every_lowering(request, release):
    folder = tree(request, release)
    jobs = lowerings(release)
    # 0.15.3 has no experts, and what is left of these recipes without them has latent attention.
    assert len(jobs) > 100 or not load_release(release).carries_spec
    answers = asked(folder, jobs)
    errors = {answer["error"] for answer in answers if "error" in answer}
    assert len(answers) == len(jobs)
    assert not errors


@pytest.mark.megatron_source
def test_the_command_line_configures_what_the_nemo_recipe_configures(request):
    folder = tree(request, "0.16.1")
    import fiddle

    from megacpp_nemo.recipes import to_nemo

    jobs = [
        (intent, lowering)
        for intent, lowering in lowerings("0.16.1")
        # NeMo sets FP8 and the stages' number type after the configuration is made.
        if intent.precision.value == "bf16" and intent.features.experts
        if intent.parallelism.pipeline_model_parallel_size == 1
    ]
    for (intent, _), answer in zip(jobs, asked(folder, jobs), strict=True):
        config = fiddle.build(to_nemo(intent).model.config)
        for field, value in answer["config"].items():
            if not hasattr(config, field) or field in DIFFER:
                continue
            ours = repr(getattr(config, field))
            assert _without_addresses(ours) == _without_addresses(value), field


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)
