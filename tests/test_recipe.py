"""Recipes are strict: what is wrong is named, with the nearest thing there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from antefix.errors import RecipeError
from antefix.training.recipe import Recipe, load_recipe

MINIMAL = 'name = "menus"\n[data]\ntrain = "menus.csv"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_recipe_has_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert recipe.method == "prefix_tuning"
    assert recipe.run_folder == Path("runs/menus")
    assert recipe.prefix_folder == Path("bank/menus")
    assert recipe.decoding is None


def test_overrides_reach_into_sections_and_read_values_as_toml_does(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, MINIMAL),
        [
            "training.epochs=3",
            "config.num_virtual_tokens = 7",
            "base=some/model",
            'tags=["a","b"]',
            "decoding.num_beams=2",
        ],
    )
    assert recipe.training.epochs == 3
    assert recipe.config == {"num_virtual_tokens": 7}
    assert (recipe.base, recipe.tags) == ("some/model", ("a", "b"))
    assert recipe.decoding is not None
    assert recipe.decoding.num_beams == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", r"unknown key 'training.epoch': did you mean 'epochs'\?"),
        ("trainning.epochs=3", r"unknown key 'trainning': did you mean 'training'\?"),
        ("config.num_virtual_token=3", r"unknown key 'config.num_virtual_token': did you mean 'num_virtual_tokens'\?"),
        ("method=prefix_tunning", r"unknown method 'prefix_tunning': did you mean 'prefix_tuning'\?"),
        ("training.epochs=-1", r"'training.epochs' is -1: .*greater than 0"),
        ("training.epochs=many", r"'training.epochs' is \"many\": .*number"),
        ("training.epochs='40'", r"'training.epochs' is \"40\", a text: write it without quotes"),
        ("config.num_virtual_tokens='4'", r"'config.num_virtual_tokens' is \"4\", a text"),
        ("config.initial=words", r"'config.initial' is \"words\": .*'text'"),
        ("name=../menus", r"'name' is \"../menus\""),
        ("training", r"'training' is no override: write key=value"),
        ("name.first=x", r"'name.first': 'name' is no section"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(written(tmp_path, MINIMAL), [override])
    assert "\n" not in str(caught.value)


def test_a_missing_broken_or_incomplete_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; `antefix init FILE` writes a first one"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"not a readable TOML file .*line 1"):
        load_recipe(written(tmp_path, "name = ]"))
    with pytest.raises(RecipeError, match=r"'data.train' is missing"):
        load_recipe(written(tmp_path, 'name = "x"\n[data]\n'))


def test_the_recipes_that_come_with_the_project_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
    assert recipes
    assert all(isinstance(load_recipe(path), Recipe) for path in recipes)
