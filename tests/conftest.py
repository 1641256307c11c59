"""Tiny, lopsided models of real architectures, built from their configs: no download, unlike dimensions.

Every test is sealed off: the user's folders are out of sight, each test has a home of its own, and there is no network
but this machine, unless the test is marked `network`. Processes that a test starts have that home too.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Before anything is imported that looks at these only once; `own_home` gives every test its own.
os.environ["HOME"] = tempfile.mkdtemp(prefix="antefix-tests-")
os.environ["ANTEFIX_HOME"] = os.path.join(os.environ["HOME"], "antefix")
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["HOME"], ".cache")
os.environ["XDG_CONFIG_HOME"] = os.path.join(os.environ["HOME"], ".config")
os.environ["HF_HOME"] = os.path.join(os.environ["HOME"], "hub")
os.environ["MPLCONFIGDIR"] = os.path.join(os.environ["HOME"], "matplotlib")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from antefix.attach import current_attachment
from antefix.attention.branch import Condition
from antefix.base import Base
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule

SEALED = Path(os.environ["HOME"])
"""What belongs to no single test; gone when the tests are over."""

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
"""Real data that is not part of the repository; tests that need it are skipped where it is absent."""

VOCABULARY = 263
CONTEXT = 512
LAYERS, HEADS, GROUPS, WIDTH = 3, 6, 2, 8
SPECIAL = ("<pad>", "<s>", "</s>")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HEADS * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 56, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": GROUPS, "head_dim": WIDTH + 2}


def _config(name: str, **kwargs: Any) -> Any:
    return getattr(transformers, name)(**kwargs)


ARCHITECTURES: dict[str, Callable[[], tuple[str, Any]]] = {
    "gpt2": lambda: (
        "GPT2LMHeadModel",
        _config("GPT2Config", vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=48, n_layer=LAYERS, n_head=HEADS,
                n_inner=56, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    "llama": lambda: ("LlamaForCausalLM", _config("LlamaConfig", **_GROUPED)),
    "qwen3": lambda: ("Qwen3ForCausalLM", _config("Qwen3Config", **_GROUPED)),
    "mistral": lambda: ("MistralForCausalLM", _config("MistralConfig", **_GROUPED, sliding_window=4)),
    "gemma2": lambda: (
        "Gemma2ForCausalLM",
        _config("Gemma2Config", **_GROUPED, sliding_window=4, query_pre_attn_scalar=7, attn_logit_softcapping=5.0,
                final_logit_softcapping=9.0),
    ),
    "gemma3": lambda: (
        "Gemma3ForCausalLM",
        _config("Gemma3TextConfig", **_GROUPED, sliding_window=4, query_pre_attn_scalar=7,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "opt": lambda: (
        "OPTForCausalLM",
        _config("OPTConfig", vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=LAYERS, ffn_dim=56,
                num_attention_heads=HEADS, max_position_embeddings=CONTEXT, word_embed_proj_dim=48, pad_token_id=0,
                bos_token_id=1, eos_token_id=2),
    ),
    "gpt_neox": lambda: ("GPTNeoXForCausalLM", _config("GPTNeoXConfig", **_COMMON, rotary_pct=0.5)),
    "bart": lambda: (
        "BartForConditionalGeneration",
        _config("BartConfig", vocab_size=VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=LAYERS,
                encoder_attention_heads=4, decoder_attention_heads=HEADS, encoder_ffn_dim=56, decoder_ffn_dim=56,
                max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=2, forced_eos_token_id=None),
    ),
    "t5": lambda: (
        "T5ForConditionalGeneration",
        _config("T5Config", vocab_size=VOCABULARY, d_model=44, d_kv=WIDTH, d_ff=56, num_layers=LAYERS,
                num_decoder_layers=2, num_heads=HEADS, relative_attention_num_buckets=8, pad_token_id=0,
                eos_token_id=2, decoder_start_token_id=0),
    ),
    "bert": lambda: ("BertForMaskedLM", _config("BertConfig", **_COMMON)),
    "roberta": lambda: ("RobertaForMaskedLM", _config("RobertaConfig", **_COMMON)),
}  # fmt: skip
DECODER_ONLY = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "opt", "gpt_neox")
ENCODER_DECODER = ("bart", "t5")
ENCODER_ONLY = ("bert", "roberta")
UNLIKE = ("gpt2", "llama", "gemma2", "gpt_neox", "bart", "t5", "bert")
"""One of each way to count positions, to make scores and to read texts: for what the others do not do otherwise."""


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of this architecture, weights large enough that attention is far from uniform."""
    class_name, config = ARCHITECTURES[name]()
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with the models' pad, begin and end tokens and a chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({token: n for n, token in enumerate([*SPECIAL, *alphabet])}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    return _with_template(made)


def word_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word: the most frequent ones of these texts, and w0, w1, ... up to the models' vocabulary."""
    counted = Counter(word for text in texts for word in text.split())
    words = [*SPECIAL, *(word for word, _ in counted.most_common()), *(f"w{n}" for n in range(VOCABULARY))]
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(words[:VOCABULARY])}, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return _with_template(made)


def _with_template(made: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def tiny_base(name: str, seed: int = 0) -> Base:
    """A tiny model and its tokenizer, as `load_base` would give them."""
    model = tiny_model(name, seed=seed)
    return Base(model.requires_grad_(False), tiny_tokenizer(), f"tiny-{name}")


def tiny_batch(name: str, padding: str = "none", rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Random tokens for a model of this architecture, padded (`none`, `left`, `right`), positions counted.

    The rows of an encoder-decoder are padded in its encoder.
    """
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    gaps = torch.arange(rows)[:, None] if padding != "none" else torch.zeros(rows, 1, dtype=torch.long)
    places = torch.arange(length)
    mask = (places >= gaps if padding == "left" else places < length - gaps).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if name in ENCODER_DECODER:
        return {**batch, "decoder_input_ids": torch.randint(3, VOCABULARY, (rows, 4), generator=draw)}
    if name != "roberta":  # it counts for itself, past padding
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def is_output(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """True where the logits of a batch mean something: B, T."""
    decoder_ids = batch.get("decoder_input_ids")
    return batch["attention_mask"].bool() if decoder_ids is None else torch.ones_like(decoder_ids).bool()


_SLOTS: dict[str, Any] = {"num_virtual_tokens": 5, "initial": "normal", "initial_scale": 1.0}
METHOD_CONFIGS: dict[str, dict[str, Any]] = {
    "adapter": {"width": 5, "initial_scale": 0.5},
    "apt": _SLOTS,
    "bbt": {"num_virtual_tokens": 5, "dimensions": 7},
    "bbt_v2": {"num_virtual_tokens": 5, "dimensions": 7},
    "bitfit": {"initial_scale": 0.5},
    "cartridge": {"num_virtual_tokens": 5, "document": str(Path(__file__))},
    "hierarchical_blocking": {**_SLOTS, "target_tokens": 3},
    "ia3": {"initial_scale": 0.5},
    "inducer": {"initial_scale": 0.5},
    "infix": _SLOTS,
    "llama_adapter": {"num_virtual_tokens": 5, "initial_gate": 0.7},
    "lora": {"rank": 3, "initial_scale": 0.5},
    "mam": {"prefix_tuning": _SLOTS, "adapter": {"width": 4, "initial_scale": 0.5, "scale": 1.0}},
    "ntk_attention": {"initial_scale": 1.0},
    "p_tuning_v2": {**_SLOTS, "dropout": 0.0},
    "palt": {"begin": 2, "middle": 1, "end": 1, "embedding_width": 7, "initial_scale": 0.2},
    "pip_direct": _SLOTS,
    "pip_indirect": _SLOTS,
    "prefix_memory": {"initial_scale": 0.5},
    "prefix_propagation": {"num_virtual_tokens": 5, "initial_scale": 1.0},
    "prefix_tuning": _SLOTS,
    "prompt_tuning": {"num_virtual_tokens": 5, "initial": "uniform", "initial_scale": 2.0},
    "soft_infix": {"num_virtual_tokens": 2, "initial": "uniform", "initial_scale": 2.0},
    "special_tokens": {"tokens": ["[IN:GO", "[SL:TO", "]"], "initial_noise": 8.0},
    "sparse_prefix": {**_SLOTS, "top_k": 3},
}
"""For every method of the table a config under which it matters from the start, on any tiny model."""

METHOD_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adapter": {
        "narrow": {"width": 2, "activation": "gelu"},
        "houlsby": {"form": "houlsby", "train_norms": True},
        "parallel": {"form": "parallel", "scale": 4.0},
    },
    "apt": {
        "short": {"num_virtual_tokens": 2},
        "mean": {"gate_from": "mean"},
        "first, no layer gate": {"gate_from": "first", "layer_gate": False},
        "no hidden state": {"hidden_state": False},
        "no token gate": {"token_gate": False},
    },
    "bbt": {"short": {"num_virtual_tokens": 2}, "words": {"initial": "text"}},
    "bbt_v2": {"short": {"num_virtual_tokens": 2}},
    "bitfit": {"compact": {"biases": "query_and_feed_forward_in"}},
    "cartridge": {"short": {"num_virtual_tokens": 2}, "all trained": {"freeze_first": False}},
    "hierarchical_blocking": {"short": {"num_virtual_tokens": 3}, "uniform": {"blocks": 3, "blocked_layers": 1.0}},
    "ia3": {"attention": {"feed_forward": False}},
    "inducer": {
        "narrow": {"value_width": 2},
        "before the projection": {"value_extension": False, "key_width": 0},
        "share": {"value_extension": False, "gating_ablation": True},
    },
    "llama_adapter": {"short": {"num_virtual_tokens": 2}, "top, raw": {"top_layers": 1, "gate": "raw"}},
    "lora": {
        "narrow": {"rank": 2, "projections": ["key", "feed_forward_out"]},
        "everywhere": {
            "projections": ["query", "key", "value", "attention_out", "feed_forward_in", "feed_forward_out"],
        },
    },
    "mam": {"short": {"prefix_tuning": {**_SLOTS, "num_virtual_tokens": 2}}},
    "ntk_attention": {"low rank": {"rank": 2}, "softplus": {"mass": "softplus"}},
    "p_tuning_v2": {"short": {"num_virtual_tokens": 2}, "dropout": {"dropout": 0.2}},
    "palt": {
        "begin": {"begin": 1, "middle": 0, "end": 0},
        "first layer": {"layers": [0]},
    },
    "pip_direct": {"short": {"num_virtual_tokens": 2}, "network": {"parametrisation": "network", "hidden_width": 9}},
    "pip_indirect": {"short": {"num_virtual_tokens": 2}, "along the sequence": {"cosine_axis": "sequence"}},
    "prefix_memory": {"after the projection": {"place": "after_projection"}, "gelu": {"feature_map": "gelu"}},
    "prefix_propagation": {"short": {"num_virtual_tokens": 2}},
    "prompt_tuning": {"short": {"num_virtual_tokens": 2}, "vocabulary": {"initial": "vocabulary"}},
    "soft_infix": {"short": {"num_virtual_tokens": 1}, "vocabulary": {"initial": "vocabulary"}},
    "sparse_prefix": {
        "short": {"num_virtual_tokens": 2, "top_k": 1},
        "top-p, blocks": {"top_k": None, "top_p": 0.6, "blocks": 2, "target_tokens": 3},
        "soft": {"top_k": None},
    },
    "special_tokens": {"fewer": {"tokens": ["<a>", "<b>"]}},
    "top_layers": {"one": {"num_layers": 1}, "embeddings": {"embeddings": True}},
    "infix": {"short": {"num_virtual_tokens": 2}, "network": {"parametrisation": "network", "hidden_width": 9}},
    "prefix_tuning": {
        "short": {"num_virtual_tokens": 2},
        "network": {"parametrisation": "network", "hidden_width": 9},
        "linear, dropout, frozen sink": {"parametrisation": "linear", "dropout": 0.3, "freeze_first": True},
    },
}
"""For every method the changes to METHOD_CONFIGS under which it is swept; the first makes a prefix of another size."""

for _name in METHODS:  # one that is listed in neither is swept as it is
    METHOD_CONFIGS.setdefault(_name, {})
    METHOD_VARIANTS.setdefault(_name, {"as it is": {}})


NOT_ON = {
    "cartridge": (*ENCODER_ONLY, *ENCODER_DECODER),  # their tokens cannot stand behind slots
    "infix": ENCODER_ONLY,
    "palt": (*DECODER_ONLY, *ENCODER_DECODER),  # it asks an encoder
    "special_tokens": (*ENCODER_ONLY, *ENCODER_DECODER),
    "soft_infix": (*ENCODER_ONLY, *ENCODER_DECODER),  # nothing stands between source and target there
    "pip_direct": (*DECODER_ONLY, *ENCODER_ONLY, "t5"),  # a state of this T5 does not split into its heads
    "pip_indirect": (*DECODER_ONLY, *ENCODER_ONLY, "t5"),
}
"""Architectures that a method is not for."""

SOURCE_COLUMNS = 5
"""Of the rows of `tiny_batch`, padding included, for methods that tell sources from targets."""


def tell_sources(base: Base, columns: int | Sequence[int] = SOURCE_COLUMNS) -> None:
    """Tell what is attached where the sources end, and a second text, the same for all rows, if it needs one."""
    attachment = current_attachment(base.model)
    if attachment is None:
        return
    attachment.source_lengths = columns
    if (length := attachment.condition_length) is not None:
        attachment.condition = tiny_condition(length)


def tiny_condition(length: int) -> Condition:
    """States of a second text of three tokens, in so many places."""
    states = torch.randn(1, 8, HEADS * WIDTH, generator=torch.Generator().manual_seed(5))[:, :length]
    return Condition(states, torch.arange(length)[None] < 3)


def tiny_method(base: Base, method: str = "prefix_tuning", seed: int = 1, **config: Any) -> MethodModule:
    """A random prefix under a method, trainable; `config` changes METHOD_CONFIGS. Skips what is not for the base."""
    if base.name.removeprefix("tiny-") in NOT_ON.get(method, ()):
        pytest.skip(f"{method} is not for {base.name}")
    torch.manual_seed(seed)
    found = method_class(method)
    module = found.build(base, found.Config.model_validate({**METHOD_CONFIGS[method], **config}))
    with torch.no_grad():
        for weight in module.weights().values():  # it would be the base's own
            weight += 0.1 * torch.randn_like(weight)
    return module


def tiny_pair(base: Base, method: str = "prefix_tuning", **config: Any) -> tuple[MethodModule, MethodModule]:
    """Two random prefixes of unlike sizes, to be mixed in a batch. Skips what is the same for all rows."""
    if not method_class(method).acts_on_rows:
        pytest.skip(f"{method} is the same for all rows")
    other = next(iter(METHOD_VARIANTS[method].values()))
    return tiny_method(base, method, **config), tiny_method(base, method, seed=2, **{**other, **config})


def heed_interrupts() -> None:
    """For a process's start: a shell has what it starts in the background ignore Ctrl-C, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[(method, name) for method, variants in METHOD_VARIANTS.items() for name in variants], ids="-".join
)
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A method and the changes to its METHOD_CONFIGS."""
    method, name = request.param
    return method, METHOD_VARIANTS[method][name]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=UNLIKE)
def unlike_architecture(request: pytest.FixtureRequest) -> str:
    """For what would be the same on the other architectures."""
    return str(request.param)


def close_the_network() -> None:
    """From here on, whoever looks beyond this machine in this process gets a RuntimeError."""

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            # No tuple: a socket in the file system, or one that is connected already.
            host = arguments[1][0] if isinstance(arguments[1], tuple) else None
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
        else:
            return
        name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
        is_here = name.startswith("127.") or name in ("localhost", "::1", "0.0.0.0")
        if not is_here and "ANTEFIX_TESTS_NETWORK" not in os.environ:
            raise RuntimeError(f"the network is closed to tests ({name}): mark the test `network` if it needs one")

    sys.addaudithook(refuse)


def pytest_configure() -> None:
    close_the_network()


def pytest_unconfigure() -> None:
    shutil.rmtree(SEALED, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_home(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The test's own, new HOME and ANTEFIX_HOME."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ANTEFIX_HOME", str(home / "antefix"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    if request.node.get_closest_marker("network") is not None:
        monkeypatch.setenv("ANTEFIX_TESTS_NETWORK", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE")
    return home


@pytest.fixture(scope="session")
def served() -> Iterator[Any]:
    """One running server (`served.Served`) for all tests that do it no harm."""
    pytest.importorskip("fastapi")
    from served import make_files, serving

    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        with serving(Path(folder), "--max-queue", "64", "--grace", "3") as running:
            yield running
