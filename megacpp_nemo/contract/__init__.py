"""The contract: what a recipe is, checked, in the standard library alone."""

from megacpp_nemo.contract.errors import (
    DataError,
    LoweringError,
    MegaCppError,
    PatternError,
    RecipeError,
    RuntimeRefusal,
)
from megacpp_nemo.contract.families import RECIPE_NAMES, describe, recipe
from megacpp_nemo.contract.pattern import (
    FULL_NAM52_PATTERN,
    FULL_NAM56R_PATTERN,
    BlockFamily,
    LayerPattern,
)
from megacpp_nemo.contract.recipe import HybridRecipe, field_paths, with_fields, with_paths
from megacpp_nemo.contract.training import Parallelism, ParallelismMode, Precision

__all__ = [
    "FULL_NAM52_PATTERN",
    "FULL_NAM56R_PATTERN",
    "RECIPE_NAMES",
    "BlockFamily",
    "DataError",
    "HybridRecipe",
    "LayerPattern",
    "LoweringError",
    "MegaCppError",
    "Parallelism",
    "ParallelismMode",
    "PatternError",
    "Precision",
    "RecipeError",
    "RuntimeRefusal",
    "describe",
    "field_paths",
    "recipe",
    "with_fields",
    "with_paths",
]
