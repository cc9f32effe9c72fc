"""Recipes: the documented format."""

import json

from service.contract.recipe import Recipe
from shared.options import SamplingOptions
from tests.paths import ROOT


def test_the_example_in_the_docs_is_valid() -> None:
    text = ROOT.joinpath("docs", "recipes.md").read_text()
    block = text.split("```json\n")[1].split("```")[0]
    recipe = Recipe.model_validate_json(block)
    assert set(json.loads(block)) == set(Recipe.model_fields)
    assert set(json.loads(block)["options"]) == set(SamplingOptions.model_fields)
    assert len(recipe.verdicts) == len(recipe.labels)
