"""The models that the HTTP side tells of: listed, found, loaded, unloaded, under a second name."""

from __future__ import annotations

from pathlib import Path

import pytest
from app_caller import BASE, COMPLETION, caller, error, make_bank
from pydantic import TypeAdapter

from antefix.bank import Bank
from antefix.server import listing, replies


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("served") / "bank")


def test_the_models_with_their_parents(bank: Bank) -> None:
    client, engine = caller(bank)
    engine.loaded["menus"] = False
    found = client.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == [BASE, *(f"{BASE}:{name}" for name in sorted(bank))]
    assert [model["parent"] for model in found["data"]] == [None, *[BASE] * len(bank)]
    assert [model["antefix"]["resident"] for model in found["data"][1:]] == [False, True, False, False]
    one = client.get(f"/v1/models/{BASE}:menus").json()
    assert one["antefix"]["card"]["text_format"]["linearise"] == "table"
    assert client.get("/v1/models/menus").json() == one
    (listed,) = [m for m in client.get("/v1/models").json()["data"] if m["id"] == one["id"]]
    assert listed["antefix"].items() <= one["antefix"].items(), "the list says of a prefix what its own page says"
    assert client.get(f"/v1/models/{BASE}").json()["parent"] is None
    assert error(client.get(f"/v1/models/{BASE}:none"), 404)["code"] == "model_not_found"
    error(client.get("/v1/models/../../etc"), 404)


def test_the_list_in_pages_by_search_and_by_tag(bank: Bank) -> None:
    client, _ = caller(bank)

    def names(query: str) -> list[str]:
        return [model["id"].removeprefix(f"{BASE}:") for model in client.get(f"/v1/models?{query}").json()["data"]]

    assert names("search=FOO") == ["menus"]
    assert names("tag=food") == ["menus"]
    first = client.get("/v1/models?limit=2").json()
    assert (names("limit=2"), first["has_more"]) == ([BASE, "drawn"], True)
    last = client.get(f"/v1/models?limit=3&after={first['data'][-1]['id']}").json()
    assert ([m["root"] for m in last["data"]], last["has_more"]) == (["menus", "news", "talk"], False)


def test_the_list_is_whole_however_many_are_read_at_once(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = caller(bank)
    whole = client.get("/v1/models").json()
    TypeAdapter(replies.ModelList).validate_python(whole, extra="forbid")
    for size in (1, 2, 3, 4):
        monkeypatch.setattr(listing, "_PAGE", size)
        assert client.get("/v1/models").json() == whole
        assert client.get("/v1/models?limit=3").json() == {**whole, "data": whole["data"][:3], "has_more": True}
        assert client.get("/v1/models?limit=5").json() == whole


def test_a_new_prefix_is_there_at_once_and_a_removed_one_gone(bank: Bank, tmp_path: Path) -> None:
    own = Bank(tmp_path / "bank")
    own.add("first", bank["menus"])
    client, _ = caller(own)
    assert len(client.get("/v1/models").json()["data"]) == 2
    own.add("second", bank["menus"])
    assert [m["root"] for m in client.get("/v1/models").json()["data"][1:]] == ["first", "second"]
    assert client.post("/v1/completions", {**COMPLETION, "model": "second"}).status_code == 200
    own.remove("second")
    assert len(client.get("/v1/models").json()["data"]) == 2
    error(client.post("/v1/completions", {**COMPLETION, "model": "second"}), 404)
    (own.folder / "first" / "card.json").write_text("{")
    assert error(client.post("/v1/completions", {**COMPLETION, "model": "first"}), 400)["code"] == "broken_prefix"


def test_prefixes_are_loaded_and_unloaded_as_vllm_does_loras(bank: Bank) -> None:
    client, engine = caller(bank)
    reply = client.post("/v1/load_prefix", {"prefix_name": "dishes", "prefix_path": "menus"})
    assert (reply.status_code, reply.text) == (200, "Success: prefix 'dishes' added successfully.")
    assert client.post("/v1/completions", {**COMPLETION, "model": "dishes"}).status_code == 200
    assert engine.jobs[-1].prefixes == ("menus",)
    taken = {"prefix_name": "dishes", "prefix_path": "talk"}
    assert "is taken" in error(client.post("/v1/load_prefix", taken), 400)["message"]
    assert client.post("/v1/load_prefix", {"prefix_name": "talk", "pin": True}).status_code == 200
    assert engine.loaded == {"menus": False, "talk": True}
    assert client.post("/v1/unload_prefix", {"prefix_name": "dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)
    error(client.post("/v1/unload_prefix", {"prefix_name": "dishes"}), 404)
    assert error(client.post("/v1/load_prefix", {"prefix_name": "news"}), 400)["code"] == "broken_prefix"
    for path in ("../menus", "/etc", "menus/../menus", str(bank.folder.parent)):
        error(client.post("/v1/load_prefix", {"prefix_name": "x", "prefix_path": path}), 400)
    absolute = {"prefix_name": "talk", "prefix_path": str(bank.folder.absolute() / "talk")}
    assert client.post("/v1/load_prefix", absolute).status_code == 200


def test_a_prefix_of_the_bank_goes_by_its_own_name(bank: Bank, tmp_path: Path) -> None:
    own = Bank(tmp_path / "own")
    own.add("first", bank["menus"])
    client, engine = caller(own)
    assert client.post("/v1/load_prefix", {"prefix_name": "second", "prefix_path": "first"}).status_code == 200
    own.add("second", bank["talk"])
    assert client.post("/v1/completions", {**COMPLETION, "model": "second"}).status_code == 200
    assert engine.jobs[-1].prefixes == ("second",)


def test_a_second_name_can_be_given_back_when_its_prefix_has_left_the_memory(bank: Bank) -> None:
    client, engine = caller(bank)
    assert client.post("/v1/load_prefix", {"prefix_name": "dishes", "prefix_path": "menus"}).status_code == 200
    engine.loaded.clear()
    assert client.post("/v1/unload_prefix", {"prefix_name": "dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)


def test_a_second_name_is_the_same_with_the_bases_before_it(bank: Bank) -> None:
    client, engine = caller(bank)
    named = {"prefix_name": f"{BASE}:dishes", "prefix_path": "menus"}
    assert client.post("/v1/load_prefix", named).status_code == 200
    for model in ("dishes", f"{BASE}:dishes"):
        assert client.post("/v1/completions", {**COMPLETION, "model": model}).status_code == 200
    taken = {"prefix_name": f"{BASE}:dishes", "prefix_path": "talk", "pin": True}
    assert "is taken" in error(client.post("/v1/load_prefix", taken), 400)["message"]
    assert engine.loaded == {"menus": False}, "what is refused is not read"
    assert client.post("/v1/load_prefix", {"prefix_name": f"{BASE}:menus"}).status_code == 200
    assert client.post("/v1/unload_prefix", {"prefix_name": f"{BASE}:dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)
