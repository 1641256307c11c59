"""Prints docs/recipe.md: every key of a recipe, its default, its meaning and what is allowed, from the models' fields.

`make docs` runs it. The sentence under a field is its meaning here; a field without one is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from antefix.decoding import Decoding
from antefix.methods import METHODS, method_class
from antefix.training.objectives import RankingWeights
from antefix.training.recipe import BlackBoxRecipe, DataRecipe, Recipe, TrainingRecipe
from antefix.training.space import Range, SearchRecipe

INTRODUCTION = """\
<!-- Made by docs/generate_recipe_page.py: change the fields of the models instead. -->
# Recipe

A recipe is a TOML file that describes a whole run of `antefix train`; `antefix init FILE` writes a first one. The run's
own keys come first, the sections after them. An unknown key is an error that names the nearest known one.

- **Paths** (data files, bank, run, base) are relative to the folder where the command is run, not to the recipe.
- **On the command line** `key=value` goes before what the file says, and a dot reaches into a section:
  `antefix train menus.toml name=menus_long training.epochs=8`. A value is read as TOML does; what is not
  valid TOML is taken as text.
- **None** as a default is what holds when the key is left out. TOML has no word for it.

What stands in `[data.reader]` and `[data.text]` is described in [Data](data.md).
"""
DECODING = """\
Also the keys of `antefix generate --set`; names and meanings are those of transformers' `generate`. What this section
leaves out has the defaults below; but tables and triples are decoded with beams of 5 unless `num_beams` is set.
"""
SEARCH = """\
What `antefix search` tries; `antefix train` passes over it.
"""
RANGE = """\
A key of the recipe, in quotes, has bounds or choices:

```toml
[search.space]
"training.learning_rate" = {low = 1e-3, high = 1e-1, log = true}
"config.num_virtual_tokens" = {choices = [5, 10, 20]}
```

May be searched: `base`, `dtype`, `method`, `config.*`, `training.*`, `decoding.*`, `data.pairs`,
`data.max_source_tokens`, `data.text.*`. Not: `training.seed`, `training.dev_metric`, `training.dev_metric_sources`,
`training.trackers`, `training.checkpoint_seconds`. `base` and `decoding.*` need a `training.dev_metric` other than the
loss.
"""
KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "array": "list of texts"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def allowed(field: dict[str, Any]) -> str:
    """What values a field of a JSON schema takes: its choices, or its type and range."""
    kind = next(option for option in field.get("anyOf", [field]) if option.get("type") != "null")
    if "enum" in kind.get("items", kind):
        choices = ", ".join(f"`{choice}`" for choice in kind.get("items", kind)["enum"])
        return f"{'list of' if 'items' in kind else 'one of'} {choices}"
    limits = [f"{words} {kind[key]}" for key, words in LIMITS.items() if key in kind]
    if "anyOf" in kind.get("items", {}):
        return "list of values"
    pattern = [f"matching `{kind['pattern']}`"] if "pattern" in kind else []
    if kind.get("items", {}).get("type") == "integer":
        return "list of integers"
    return ", ".join([KINDS.get(kind.get("type", "object"), "section"), *limits, *pattern])


def rows(model: type[BaseModel]) -> Iterator[str]:
    """The lines of a model's table."""
    schema = model.model_json_schema()
    yield from ("| key | default | meaning |", "| --- | --- | --- |")
    for key, field in schema["properties"].items():
        if "description" not in field:
            raise SystemExit(f"{model.__name__}.{key} has no sentence under it: say what it means")
        value = field.get("default", {})
        default = "None" if value is None else "" if isinstance(value, dict) else f"`{json.dumps(value)}`"
        default = "*required*" if key in schema.get("required", ()) else default
        meaning = " ".join(field["description"].split()).replace("|", r"\|")
        yield f"| `{key}` | {default} | {meaning} *({allowed(field)})* |"


def page() -> Iterator[str]:
    """The page, line by line."""
    yield INTRODUCTION
    yield from ("## The run's own keys", "", *rows(Recipe), "")
    yield from ("## `[data]`", "", *rows(DataRecipe), "")
    for method in METHODS:
        made = method_class(method)
        choices = rows(made.Config) if made.Config.model_fields else ["It has no choices."]
        yield from (f"## `[config]` of `{method}`", "", *choices, "")
        if not made.is_searched:
            rate = made.default_learning_rate(made.Config())
            yield from (f"`training.learning_rate` is {rate:g} with these defaults.", "")
    yield from ("## `[training]`", "", *rows(TrainingRecipe), "")
    yield from ("## `[training.ranking]`", "", *rows(RankingWeights), "")
    yield from ("## `[training.black_box]`", "", *rows(BlackBoxRecipe), "")
    yield from ("## `[search]`", "", SEARCH, *rows(SearchRecipe), "")
    yield from ("## `[search.space]`", "", RANGE, *rows(Range), "")
    yield from ("## `[decoding]`", "", DECODING, *rows(Decoding))


if __name__ == "__main__":
    print("\n".join(page()))
