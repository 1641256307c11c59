"""What every method answers. Shared code asks these questions and never for a method's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from antefix.attention.branch import Branch, Condition
from antefix.base import Base
from antefix.data.encode import Limits
from antefix.data.linearise import TextFormat
from antefix.parts.initial import Positions
from antefix.parts.inserted import Inserted
from antefix.parts.key_value import KeyValue
from antefix.parts.linear import LinearPart
from antefix.parts.rows import EncoderRows
from antefix.parts.word_head import Head
from antefix.sites import Sites


class MethodConfig(BaseModel):
    """The choices of one method; checked once, never changed afterwards."""

    # What stands under a field is its description, also in docs/recipe.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def completed(self, targets: Sequence[str]) -> Self:
        """With what is learned of the training targets before training starts."""
        return self

    @property
    def parent(self) -> str | None:
        """The folder of the kept prefix that training starts from; None: it starts from no other."""
        return None

    @property
    def start_is_drawn(self) -> bool:
        """Whether first values depend on the seed, not on these choices and the base alone."""
        return True


class MethodModule(nn.Module):
    """One prefix under a method: a torch module whose parameters are what is trained.

    A method answers with slots, branches, or both; what it leaves as it is here, it does not need.
    """

    Config: ClassVar[type[MethodConfig]]
    summary: ClassVar[str]
    """One line for tables of methods: what it does and where it comes from."""
    paper: ClassVar[str]
    """Where it comes from: an arXiv number."""
    parts: ClassVar[tuple[str, ...]]
    """The learned pieces that it is made of, for the same tables."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What a recipe or its examples must give beside pairs, at least for training; for the same tables."""
    acts_on_rows: ClassVar[bool] = True
    """Whether rows of a batch can differ in it; not where it stands in the place of the base's weights."""
    is_searched: ClassVar[bool] = False
    """Whether it is found without gradients, by a search among a few values (`searched`)."""
    folds_to_key_value: ClassVar[bool] = False
    """Whether what is kept is plain keys and values, whatever it was trained as."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Head | None = None
        """What reads labels off hidden states, for tasks that label (see `antefix.tasks`)."""

    def kept(self) -> dict[str, Tensor]:
        """What a prefix file holds, its head included."""
        return self.kept_tensors() | ({} if self.head is None else self.head.kept())

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """The learning rate that fits this parametrisation."""
        raise NotImplementedError

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """A fresh prefix, ready to be trained. Raises PrefixError where the base lacks what it needs."""
        raise NotImplementedError

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        """A kept prefix. Raises PrefixError for tensors that do not fit the sites."""
        raise NotImplementedError

    def kept_tensors(self) -> dict[str, Tensor]:
        """What a prefix file holds, by tensor name: folded, float32, on the processor."""
        raise NotImplementedError

    @property
    def positions(self) -> Positions:
        """Where the tokens stand beside the slots."""
        return "in_place"

    @property
    def num_virtual_tokens(self) -> int:
        """How many slots a site holds."""
        return 0

    def room_in(self, context_length: int | None) -> int | None:
        """How many tokens a base's context has room for: `shifted` slots take positions. None: nobody knows."""
        if context_length is None or self.positions != "shifted":
            return context_length
        return context_length - self.num_virtual_tokens

    def limits_in(self, context_length: int | None) -> Limits:
        """How many tokens of an example fit beside it into a base's context, and which it has fed besides."""
        return Limits(
            context=self.room_in(context_length), condition=self.condition_length, inserted=self.num_inserted_tokens
        )

    @property
    def for_targets(self) -> bool:
        """Whether targets alone see the slots: a source is then read as the base reads it."""
        return False

    @property
    def leaves_sources(self) -> bool:
        """Whether all of it is for targets, so that a source's states can be kept from epoch to epoch."""
        return self.for_targets

    @property
    def needs_places(self) -> bool:
        """Whether it must know where every token stands in its text."""
        return False

    @property
    def condition_length(self) -> int | None:
        """How many tokens the second text of every row has at most (see `antefix.condition`); None: it needs none."""
        return None

    def rate_scales(self) -> list[tuple[list[nn.Parameter], float]]:
        """What is trained, in groups, each with its learning rate as a multiple of the run's."""
        return [([p for p in self.parameters() if p.requires_grad], 1.0)]

    def searched(self) -> list[nn.Parameter]:
        """The vectors that are searched, one after the other, where `is_searched`."""
        return []

    @property
    def step_size(self) -> float:
        """Of such a search at its beginning."""
        return 1.0

    def auxiliary_loss(self, condition: Condition | None) -> Tensor | None:
        """What is added to the loss of a batch in training, a mean over its sources; None: nothing."""
        return None

    def slots(self) -> Mapping[str, KeyValue]:
        """The key/value slots by site name, differentiable with respect to the parameters."""
        return {}

    def linear_parts(self) -> Mapping[str, LinearPart]:
        """What it has at linear layers, by their path, differentiable likewise."""
        return {}

    def weights(self) -> Mapping[str, nn.Parameter]:
        """What stands in the place of the base's own weights, by their path: the baselines' way.

        Rows of a batch cannot differ in them.
        """
        return {}

    @property
    def symbols(self) -> tuple[str, ...]:
        """Texts that are one token each, after the base's own."""
        return ()

    def with_symbols(self, text_format: TextFormat) -> TextFormat:
        """The text format of what it is trained on and used for, with those of `symbols` that it writes itself."""
        return text_format

    def new_tokens(self) -> Tensor | None:
        """The embeddings of `symbols`, (S, C), differentiable likewise; None: there are none."""
        return None

    @property
    def num_inserted_tokens(self) -> int:
        """How many tokens it has fed between a source and its target."""
        return 0

    def inserted(self) -> Inserted | None:
        """What those tokens are, differentiable likewise; None: there are none."""
        return None

    def encoder_rows(self) -> EncoderRows | None:
        """What stands before a text in an encoder, differentiable likewise; None: nothing."""
        return None

    def branches(self) -> Mapping[str, Sequence[Branch]]:
        """What acts in another way than by slots, by site name, differentiable likewise."""
        return {}
