"""Linear sites: what is found of every architecture, and what parts compute there, beside changed weights and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHOD_CONFIGS, NOT_ON, tell_sources, tiny_base, tiny_batch, tiny_method, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import antefix
from antefix.accounting import flop_a_token
from antefix.attach import attached
from antefix.base import Base
from antefix.cli import app
from antefix.errors import CommandError, PrefixError
from antefix.merge import merged
from antefix.methods import method_class
from antefix.methods.listing import counted
from antefix.parts.linear import LinearPart, Network, together
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.sites import LinearSite, find_sites
from antefix.training.recipe import TrainingRecipe

GATED = {"llama", "qwen3", "mistral", "gemma2", "gemma3"}
FUSED = {"gpt2", "gpt_neox"}


def logits(base: Base, batch: dict[str, Tensor]) -> Tensor:
    tell_sources(base)
    with torch.no_grad():
        return base.model(**batch).logits


def test_every_block_has_its_layers(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = find_sites(model)
    at: dict[tuple[str, int], list[LinearSite]] = {}
    for site in sites.layers.linear:
        at.setdefault((site.kind, site.layer), []).append(site)
    assert at.keys() == {(s.kind, s.layer) for s in sites.attention}
    for (kind, _), found in at.items():
        projections = ["attention_in"] * (1 if architecture in FUSED else 3)
        feed_forward = ["feed_forward_in"] * (2 if architecture in GATED else 1)
        wanted = [*projections, "attention_out"]
        assert [s.role for s in found] == wanted + ([] if kind == "cross" else [*feed_forward, "feed_forward_out"])
    for attention in sites.attention:
        own = at[attention.kind, attention.layer]
        query, key, value = ([c for s in own for c in getattr(s, name)] for name in ("query", "key", "value"))
        assert len(query) == attention.num_heads * attention.key_width
        assert len(key) == attention.num_key_value_heads * attention.key_width
        assert len(value) == attention.num_key_value_heads * attention.value_width


def test_fused_projections_are_told_apart_by_head() -> None:
    model = tiny_model("gpt_neox")
    (first, *_) = find_sites(model).layers.linear
    width = len(first.query) // 6
    assert first.query[: width + 1] == (*range(width), 3 * width), "query, key and value of a head stand together"
    assert (first.key[0], first.value[0]) == (width, 2 * width)


def weight_of(layer: nn.Module) -> Tensor:
    """(out, in), to be written into."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def changed_by_hand(base: Base, method: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The method's equations, written into the weights of the base."""
    rank, alpha = config.get("rank", 1), 8.0
    for site in find_sites(base.model).layers.linear:
        layer = base.model.get_submodule(site.name)
        weight, bias = weight_of(layer), layer.bias
        own = {n.removeprefix(f"{site.name}."): t for n, t in tensors.items() if n.startswith(f"{site.name}.")}
        if "scale" in own:
            weight *= own["scale"]
        for name in ("query", "key", "value"):
            columns = list(getattr(site, name))
            if f"{name}_scale" in own:
                weight[columns] *= own[f"{name}_scale"][:, None]
                if bias is not None:
                    bias[columns] *= own[f"{name}_scale"]
            if f"{name}_down" in own:
                weight[columns] += alpha / rank * own[f"{name}_up"] @ own[f"{name}_down"]
        if f"{site.role}_down" in own:
            weight += alpha / rank * own[f"{site.role}_up"] @ own[f"{site.role}_down"]
    if method == "bitfit":
        for name, tensor in tensors.items():
            layer = base.model.get_submodule(name.removesuffix(".bias"))
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(tensor)))
            layer.bias += tensor


def kept(base: Base, method: str, **config: Any) -> Prefix:
    module = tiny_method(base, method, **config)
    card = Card(
        method=method, config={**METHOD_CONFIGS[method], **config}, positions=module.positions,
        base=BaseRecord(name=base.name, fingerprint=base.fingerprint),
    )  # fmt: skip
    return Prefix(module.kept_tensors(), card)


WEIGHTS = ("ia3", "lora", "bitfit", "full", "top_layers")
EVERYWHERE = ["query", "key", "value", "attention_out", "feed_forward_in", "feed_forward_out"]


@pytest.mark.parametrize(
    ("method", "config"),
    [("ia3", {}), ("lora", {"rank": 3, "projections": EVERYWHERE, "initial_scale": 0.02}), ("bitfit", {})],
)
def test_what_is_learned_is_what_weights_would_be(architecture: str, method: str, config: dict[str, Any]) -> None:
    base, batch = tiny_base(architecture), tiny_batch(architecture, "right")
    module = tiny_method(base, method, **config)
    with attached(base.model, module):
        beside = logits(base, batch)
    with torch.no_grad():
        changed_by_hand(base, method, config, module.kept_tensors())
    torch.testing.assert_close(beside, logits(base, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "config"),
    [("ia3", {}), ("lora", {}), ("bitfit", {}), ("full", {}), ("top_layers", {})]
    + [("adapter", {"form": form, "train_norms": True}) for form in ("houlsby", "pfeiffer", "parallel")],
)
def test_untrained_it_is_the_base(architecture: str, method: str, config: dict[str, Any]) -> None:
    base, batch = tiny_base(architecture), tiny_batch(architecture)
    found = method_class(method)
    module = found.build(base, found.Config.model_validate(config))
    bare = logits(base, batch)
    with attached(base.model, module):
        assert torch.equal(logits(base, batch), bare)


@pytest.mark.parametrize("method", WEIGHTS)
def test_merged_is_attached(architecture: str, method: str) -> None:
    base, batch = tiny_base(architecture), tiny_batch(architecture, "right")
    prefix, bare = kept(base, method), logits(base, batch)
    if method == "bitfit" and not find_sites(base.model).layers.biased:
        with pytest.raises(PrefixError, match="has no bias that one could be written into: attach the prefix instead"):
            merged(base, prefix)
        return
    with attached(base.model, prefix):
        wanted = logits(base, batch)
    made = merged(base, prefix)
    torch.testing.assert_close(logits(made, batch), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(base, batch), bare), "the base is what it was"
    with pytest.raises(PrefixError, match="a prefix was written into this base already"):
        merged(made, prefix)


def test_what_is_no_weight_is_not_merged(method: str) -> None:
    """Every method of the table is merged, to what attaching it computes (above), or refused."""
    if method in WEIGHTS:
        pytest.skip("it is")
    name = next(n for n in ("llama", "bert", "bart") if n not in NOT_ON.get(method, ()))
    base = tiny_base(name)
    with pytest.raises(PrefixError, match=f"{method} cannot be written into weights: only scales, biases and low-rank"):
        merged(base, kept(base, method))


def test_labels_of_words_are_merged_and_a_learned_head_is_not() -> None:
    base = tiny_base("llama")
    rows = [antefix.Example(source=s, targets=(t,)) for s, t in (("a", "yes"), ("b", "no"))]
    training = TrainingRecipe(max_steps=1, evaluations=1)
    given: dict[str, Any] = {"task": "classification", "method": "ia3", "training": training, "dev": rows}
    assert merged(base, antefix.train(base, rows, words={"yes": "x", "no": "y"}, **given)).name == "tiny-llama + ia3"
    with pytest.raises(PrefixError, match="a learned label head cannot be written into the base"):
        merged(base, antefix.train(base, rows, **given))


def test_a_merged_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    base, batch = tiny_base("gpt2"), tiny_batch("gpt2")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    prefix = kept(base, "lora")
    prefix.save(tmp_path / "prefix")
    words = ["merge", str(tmp_path / "prefix"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "made")]
    assert CliRunner().invoke(app, words).exit_code == 0
    with attached(base.model, prefix), torch.no_grad():
        wanted = base.model(**batch).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, CommandError)
    assert "exists: give another --out" in str(again.exception)


@pytest.mark.parametrize("form", ["houlsby", "pfeiffer", "parallel"])
def test_adapters_by_hand(form: str) -> None:
    """BERT's blocks written out: projections, residuals and norms of its own, the networks between them."""
    base, batch = tiny_base("bert"), tiny_batch("bert")
    module = tiny_method(base, "adapter", form=form, scale=4.0)
    t = module.kept_tensors()

    def network(name: str, x: Tensor) -> Tensor:
        hidden = torch.relu(x @ t[f"{name}.down"].T + t[f"{name}.down_bias"])
        return 4.0 * (hidden @ t[f"{name}.up"].T + t[f"{name}.up_bias"])

    bert: Any = base.model.bert
    with torch.no_grad():
        x = bert.embeddings(batch["input_ids"])
        for n, layer in enumerate(bert.encoder.layer):
            path = f"bert.encoder.layer.{n}"
            attention = layer.attention.self(x)[0]
            given = layer.attention.output.dense(attention)
            if form == "houlsby":
                given = given + network(f"{path}.attention.output.dense", given)
            x = layer.attention.output.LayerNorm(given + x)
            given = layer.output.dense(layer.intermediate(x))
            given = given + network(f"{path}.output.dense", x if form == "parallel" else given)
            x = layer.output.LayerNorm(given + x)
        wanted = base.model.cls(x)
    with attached(base.model, module):
        torch.testing.assert_close(logits(base, batch), wanted, rtol=1e-4, atol=1e-4)


def test_counts_are_the_facts() -> None:
    """Of the papers' formulas, with the tiny models' sizes put in: d width, f inner width, L blocks, r rank."""
    d, f, L, r = 48, 56, 3, 5
    bert, gpt2 = tiny_base("bert"), tiny_base("gpt2")

    def count(base: Base, method: str, **config: Any) -> int:
        found = method_class(method)
        module = found.build(base, found.Config.model_validate(config))
        return sum(t.numel() for t in module.kept_tensors().values())

    assert count(bert, "ia3") == L * (2 * d + f)
    assert count(tiny_base("bart"), "ia3") == 2 * (2 * d + f) + L * (4 * d + f)
    assert count(bert, "bitfit") == L * (4 * d + d + f + d + d) + d
    assert count(gpt2, "lora", rank=r) == L * 2 * (2 * r * d)
    assert count(bert, "adapter", form="houlsby", width=r, train_norms=True) == 2 * L * (2 * d * r + r + d) + 4 * L * d
    assert count(bert, "adapter", form="pfeiffer", width=r) == L * (2 * d * r + r + d)
    assert count(bert, "adapter", form="parallel", width=r) == L * (2 * d * r + r + d)
    assert count(gpt2, "full") == sum(p.numel() for p in gpt2.model.parameters())
    block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    assert count(gpt2, "top_layers") == 2 * block + 2 * d
    mam = {"prefix_tuning": {"num_virtual_tokens": 3, "initial": "normal"}, "adapter": {"form": "parallel", "width": r}}
    assert count(gpt2, "mam", **mam) == 2 * L * 3 * d + L * (2 * d * r + r + d)


@pytest.mark.parametrize(("layers", "width", "inner", "wanted"), [(12, 768, 3072, 102_912), (24, 1024, 4096, 272_384)])
def test_biases_of_real_sizes_are_as_many_as_published_less_the_poolers(
    layers: int, width: int, inner: int, wanted: int
) -> None:
    """BERT-base and BERT-large by the layers that are found of the tiny one, with their sizes put in.

    Published figures count the pooler's too, which nothing here reads.
    """
    model = tiny_model("bert")
    sites = find_sites(model)
    sizes = {48: width, 56: inner}
    of_block = [sizes[w] for name, w in sites.layers.biased.items() if ".layer.0." in name]
    outside = [sizes[w] for name, w in sites.layers.biased.items() if ".layer." not in name]
    assert layers * sum(of_block) + sum(outside) + width == wanted


def test_topmost_blocks_are_trained_and_no_other() -> None:
    base = tiny_base("gpt2")
    names = set(tiny_method(base, "top_layers", num_layers=1).weights())
    assert {n.split(".")[2] for n in names if ".h." in n} == {"2"}
    assert {n for n in names if ".h." not in n} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    with_embeddings = set(tiny_method(base, "top_layers", num_layers=1, embeddings=True).weights())
    assert with_embeddings - names == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_tied_weights_are_trained_once() -> None:
    """The gradient of GPT-2's embeddings comes from both of their places."""
    base, batch = tiny_base("gpt2"), tiny_batch("gpt2")
    module = tiny_method(base, "full")
    with attached(base.model, module):
        base.model(**batch).logits.square().sum().backward()
        assert base.model.lm_head.weight is module.weights()["transformer.wte.weight"]
    unread = [n for n in range(200, 263) if n not in batch["input_ids"]]
    gradient = module.weights()["transformer.wte.weight"].grad
    assert gradient is not None
    assert bool(gradient[unread].any()), "rows that are read nowhere are scored"
    assert base.model.lm_head.weight is base.model.transformer.wte.weight


def test_weights_of_the_base_are_for_all_rows() -> None:
    base = tiny_base("llama")
    module = tiny_method(base, "top_layers")
    with (
        pytest.raises(PrefixError, match="is the same for all rows of a batch: attach it alone"),
        attached(base.model, module, tiny_method(base)),
    ):
        pass
    with (
        pytest.raises(PrefixError, match="is the same for all rows of a batch: leave attachment.rows alone"),
        attached(base.model, module, rows=[0, -1]),
    ):
        pass
    assert all(p.grad is None for p in base.model.parameters())


def test_parts_at_one_layer_add_up() -> None:
    part = together(
        [
            LinearPart(output_scale_O=torch.tensor([2.0, 1.0]), bias_O=torch.tensor([1.0, 0.0])),
            LinearPart(output_scale_O=torch.tensor([3.0, 1.0]), bias_O=torch.tensor([0.0, 5.0])),
            LinearPart(networks=(("input", "identity", Network(torch.ones(1, 2), torch.ones(2, 1))),)),
        ]
    )
    assert part.output_scale_O is not None
    assert part.bias_O is not None
    assert (part.output_scale_O.tolist(), part.bias_O.tolist()) == ([6.0, 1.0], [1.0, 5.0])
    assert len(part.networks) == 1
    assert part.input_scale_I is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_computes_the_same(name: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    base, batch = tiny_base(name), tiny_batch(name)
    targets = {"llama": ["k_proj", "v_proj", "down_proj"], "gpt2": ["mlp.c_proj"], "opt": ["k_proj", "v_proj", "fc2"]}
    if kind == "ia3":
        module = tiny_method(base, "ia3")
    else:
        module = tiny_method(base, "lora", rank=3, initial_scale=0.02, projections=["key", "value", "feed_forward_out"])
    tensors, sites = module.kept_tensors(), find_sites(base.model).layers.linear
    if name == "gpt2":  # PEFT cannot take a fused layer apart
        tensors = {n: torch.zeros_like(t) if "c_attn" in n else t for n, t in tensors.items()}
        if kind == "ia3":
            tensors = {n: torch.ones_like(t) if "c_attn" in n else t for n, t in tensors.items()}
        module = type(module).restore(find_sites(base.model), module.config, tensors)
    with attached(base.model, module):
        ours = logits(base, batch)
    outs = [t for t in targets[name] if t in ("down_proj", "fc2", "mlp.c_proj")]
    config = (
        peft.IA3Config(target_modules=targets[name], feedforward_modules=outs, task_type="CAUSAL_LM")
        if kind == "ia3"
        else peft.LoraConfig(r=3, lora_alpha=8, target_modules=targets[name], task_type="CAUSAL_LM",
                             fan_in_fan_out=name == "gpt2")
    )  # fmt: skip
    theirs = peft.get_peft_model(base.model, config).eval()
    with torch.no_grad():
        for site in sites:
            layer = theirs.base_model.model.get_submodule(site.name)
            own = {n.removeprefix(f"{site.name}."): t for n, t in tensors.items() if n.startswith(f"{site.name}.")}
            for part, tensor in own.items():
                if "c_attn" in site.name:
                    continue
                if kind == "ia3":
                    layer.ia3_l["default"].view(-1).copy_(tensor)
                else:
                    which = layer.lora_A if part.endswith("_down") else layer.lora_B
                    which["default"].weight.copy_(tensor)
        torch.testing.assert_close(ours, theirs(**batch).logits, rtol=1e-4, atol=1e-4)


def test_scales_can_start_from_kept_ones(tmp_path: Path) -> None:
    base = tiny_base("llama")
    first = kept(base, "ia3")
    first.save(tmp_path / "first")
    found = method_class("ia3")
    config = found.Config.model_validate({"initial_prefix": str(tmp_path / "first")})
    again = found.build(base, config)
    assert all(torch.equal(t, first.tensors[n]) for n, t in again.kept_tensors().items())
    assert all(p.requires_grad for p in again.parameters())
    kept(base, "ia3", feed_forward=False).save(tmp_path / "other")
    with pytest.raises(PrefixError, match="the prefix has no tensor"):
        found.build(base, found.Config.model_validate({"initial_prefix": str(tmp_path / "other")}))


@pytest.mark.parametrize(("name", "halves"), [("gpt2", 1), ("bart", 2)])
def test_a_tokens_cost_is_t_fews_formula(name: str, halves: int) -> None:
    model = tiny_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert flop_a_token(model) == (2 * count // halves, 6 * count // halves)


def test_what_a_recipe_must_say_is_not_what_a_base_lacks() -> None:
    base = tiny_base("llama")
    assert counted(base, "special_tokens")["asks_for"] == "config.tokens: name the new tokens, each once"
    assert counted(base, "cartridge")["asks_for"] == "config.document: a cartridge needs its document, name a text file"
    assert counted(base, "palt")["refusal"] is not None
    assert counted(base, "palt")["asks_for"] is None
