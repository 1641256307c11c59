"""PALT (Shen et al. 2022, arXiv 2210.13715): a frozen encoder is asked whether a triple is true.

    [CLS] P_begin head relation P_middle [SEP] tail P_end [SEP]

The prompts P are new tokens. Their embeddings come from a network, which is dropped once they are learned:

    P = W_2 relu(W_1 E + b_1) + b_2,  E of shape (n, 512)

Square maps that start at zero, so that they change nothing then, calibrate what the encoder knows: every input
embedding (prompts, special tokens and padding among them, before positions are added), and what feeds the feed-forward
layers of two layers, which in BERT is the attention block's output after its norm and goes past them as well:

    x + W x + b

Of d wide states that is 512 n + (512 d + d) + (d^2 + d) + 3 (d^2 + d) trained values, n d + 3 (d^2 + d) kept ones, and
2 d + 2 of the head, which says `true` or `false` (`antefix.tasks.triples`).

Decided here: the paper's head is BERT's, pre-trained to tell whether a sentence follows another, and frozen; a base
such as MiniLM has none, so a new one is trained, off the first token's state. All tokens are of the first segment. The
paper calibrates layers 6 and 11 of 12, 12 and 23 of 24, counted from 0: the middle one and the last one, here of any
number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from antefix.base import Base
from antefix.data.example import Triples
from antefix.data.linearise import LINEARISATIONS, TextFormat
from antefix.errors import PrefixError
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.linear import LinearPart, Network
from antefix.parts.site_tensors import SiteTensors, as_kept, checked
from antefix.sites import Sites, find_sites

_PROMPTS = "prompts"


class PaltConfig(MethodConfig):
    """The choices of PALT."""

    begin: int = Field(10, ge=1)
    """Prompt tokens before head and relation. The paper has 10, 10 and 10, or 2, 0 and 0."""
    middle: int = Field(10, ge=0)
    """Prompt tokens after the relation."""
    end: int = Field(10, ge=0)
    """Prompt tokens after the tail."""
    embedding_width: int = Field(512, ge=1)
    """Of what the network makes prompts from."""
    layers: tuple[int, ...] = ()
    """The layers that are calibrated, counted from 0; empty: the middle one (of two the even one) and the last one."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of the calibration's first values; 0: the base exactly."""

    @property
    def num_prompts(self) -> int:
        """At all three places."""
        return self.begin + self.middle + self.end


class PromptNetwork(nn.Module):
    """Embedding - linear - ReLU - linear: (n, C)."""

    def __init__(self, num_prompts: int, embedding_width: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_prompts, embedding_width)
        self.network = nn.Sequential(nn.Linear(embedding_width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        made: Tensor = self.network(self.embedding.weight)
        return made


class Palt(MethodModule):
    """Prompts in an encoder's texts, and square maps after embeddings and norms."""

    Config = PaltConfig
    summary = "prompts and calibration that tell true triples from false ones (PALT, Shen et al. 2022)"
    paper = "arXiv 2210.13715"
    needs = ("triples", "an encoder")
    parts = ("soft tokens", "square maps")

    def __init__(
        self, config: PaltConfig, sites: Sites, tensors: Mapping[str, Tensor], network: PromptNetwork | None
    ) -> None:
        """network: what makes the prompts; None: they are among the tensors."""
        super().__init__()
        self.config, self.network = config, network
        self._places = _places(sites, config)
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """5e-5: the paper's for UMLS, where it trains ten epochs."""
        return 5e-5

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """Raises PrefixError for a base that is no encoder, and for layers that it does not have."""
        sites = find_sites(base.model)
        shapes = {name: shape for name, shape in _shapes(sites, config).items() if name != _PROMPTS}
        network = PromptNetwork(config.num_prompts, config.embedding_width, sites.hidden_size)
        first = {name: torch.randn(shape) * config.initial_scale for name, shape in shapes.items()}
        return cls(config, sites, first, network)

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        kept = checked(tensors, _shapes(sites, config))
        return cls(config, sites, kept, None).requires_grad_(False).eval()

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(f"<prompt {n}>" for n in range(self.config.num_prompts))

    def with_symbols(self, text_format: TextFormat) -> TextFormat:
        """Raises PrefixError for texts that are no triples: there is no place for prompts in them."""
        if LINEARISATIONS[text_format.linearise].kind is not Triples:
            raise PrefixError("palt is asked whether triples are true: set task = 'triples', and give triples")
        until, after = self.config.begin, self.config.begin + self.config.middle
        begin, middle, end = (
            "".join(some) for some in (self.symbols[:until], self.symbols[until:after], self.symbols[after:])
        )
        return text_format.model_copy(
            update={
                "before_source": begin + text_format.before_source,
                "separator": middle,
                "after_target": text_format.after_target + end,
            }
        )

    def new_tokens(self) -> Tensor:
        if self.network is None:
            return self._tensors.named(_PROMPTS)
        made: Tensor = self.network()
        return made

    def linear_parts(self) -> dict[str, LinearPart]:
        at = {name: self._tensors.at(name) for name in self._places}
        squares = {name: Network.square(own["weight"], own["bias"]) for name, own in at.items()}
        return {name: LinearPart(networks=(("output", "identity", square),)) for name, square in squares.items()}

    def kept_tensors(self) -> dict[str, Tensor]:
        return {_PROMPTS: as_kept(self.new_tokens())} | self._tensors.kept()


def _places(sites: Sites, config: PaltConfig) -> list[str]:
    """What is calibrated: the input embeddings, and the norms that feed the feed-forward layers."""
    if sites.kinds != ("encoder_self",):
        raise PrefixError("palt needs an encoder, such as BERT or MiniLM")
    found = sites.layers
    feed_forward = {s.layer: sites.feed_forward_input_of(s.name) for s in found.linear}
    norms = {norm.feeds: norm.name for norm in found.norms}
    last = len(feed_forward) - 1
    layers = dict.fromkeys(config.layers or (round(last / 2), last))  # round: of two halves the even one
    if wrong := [n for n in layers if feed_forward.get(n) not in norms]:
        raise PrefixError(f"config.layers: there is no layer {wrong[0]} with a norm before its feed-forward layers")
    return [found.embeddings, *(norms[feed_forward[n]] for n in layers)]


def _shapes(sites: Sites, config: PaltConfig) -> dict[str, tuple[int, ...]]:
    width = sites.hidden_size
    shapes: dict[str, tuple[int, ...]] = {_PROMPTS: (config.num_prompts, width)}
    for name in _places(sites, config):
        shapes |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
    return shapes
