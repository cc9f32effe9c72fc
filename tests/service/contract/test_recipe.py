"""Recipes: the documented format."""

import json

import pytest

from service.contract.options import PictureOptions
from service.contract.recipe import JudgedRecipe, Recipe, example, of_grid
from service.contract.records import SHOWN_SCORES, Verdict
from tests.paths import ROOT
from tests.service.store.helpers import record


def test_the_example_in_the_docs_is_valid() -> None:
    text = ROOT.joinpath("docs", "api.md").read_text().partition("\n## Recipes\n")[2]
    block = text.split("```json\n")[1].split("```")[0]
    recipe = JudgedRecipe.model_validate_json(block)
    assert set(json.loads(block)) == set(JudgedRecipe.model_fields)
    assert set(json.loads(block)["options"]) == set(PictureOptions.model_fields)
    assert len(recipe.verdicts) == len(recipe.labels)


def test_the_grid_of_a_repeat_has_the_seed_of_that_repeat() -> None:
    job = record(2, repeats=3, seed=40)
    assert (of_grid(job, 2, [], None).seed, of_grid(job, 2, [], None).labels) == (42, job.labels)


@pytest.mark.parametrize("ignored", [None, [[]], [{"accuracy": "high"}]])
def test_a_request_may_say_anything_as_verdicts(ignored: object) -> None:
    recipe = Recipe.model_validate({**example(), "evaluator": ignored, "verdicts": ignored})
    assert recipe.model_copy(update={"verdicts": []}) == Recipe.model_validate(example())


@pytest.mark.parametrize(
    ("labels", "probabilities", "shown"),
    [
        ("a", "a9 b4 c3 d2 e1 f0", "abcde"),  # the five most probable
        ("f", "a9 b4 c3 d2 e1 f0", "abcdef"),  # and those requested
        ("abcdef", "a9 b9 c9 d9 e9 f9 g8 h4", "abcdefg"),  # and one more that was found, so that it is not exact
        ("a", "a9 b8 c8 d8 e8 f8 g8 h8", "abcdef"),  # five of those
    ],
)
def test_the_scores_shown_explain_the_verdict(labels: str, probabilities: str, shown: str) -> None:
    of = {name: int(tenths) / 10 for name, tenths in probabilities.split()}
    verdict = Verdict(index=0, labels=list(labels), seed=0, accuracy=1, f1=1, exact=False, probabilities=of)
    found = verdict.shown(2)["scores"]
    assert found == {name: of[name] for name in shown}
    assert len(found) <= SHOWN_SCORES + len(labels)
