"""Hypothesis strategies for recipes and their parts."""

from hypothesis import strategies as st

from service.contract.options import PictureOptions
from service.contract.recipe import JudgedRecipe, MadeWith, RecipeVerdict
from service.contract.records import MAX_STAGES, SHOWN_SCORES, Point
from shared.options import LIMITS, MAX_SEED
from tests.shared.test_options import fractions, sampling_options

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
models = st.builds(MadeWith, name=texts, digest=st.text("0123456789abcdef", min_size=64, max_size=64))
verdicts = st.builds(
    RecipeVerdict,
    accuracy=fractions,
    exact=st.booleans(),
    f1=fractions,
    scores=st.dictionaries(texts, fractions, max_size=SHOWN_SCORES + LIMITS.max_labels),
    distances=st.none() | st.lists(st.none() | fractions, max_size=LIMITS.max_labels),
)
layouts = st.lists(st.builds(Point, x=fractions, y=fractions), max_size=LIMITS.max_labels)
recipes = st.builds(
    lambda first, labels, **more: JudgedRecipe(first=first - len(labels), labels=labels, **more),
    version=st.just(1),
    model=models,
    labels=st.lists(st.lists(texts, max_size=8), max_size=5),
    layouts=st.none() | st.lists(st.none() | layouts, max_size=5),
    seed=st.integers(0, MAX_SEED),
    first=st.integers(5, 2**31),
    options=sampling_options.map(lambda options: PictureOptions(**options.model_dump())),
    trajectory=st.none() | st.integers(2, MAX_STAGES),
    columns=st.integers(1, LIMITS.max_columns),
    evaluator=st.none() | models,
    verdicts=st.lists(verdicts, max_size=3),
)
