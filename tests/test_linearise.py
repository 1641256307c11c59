"""How sources become text and tokens: letter for letter, the same in training and generation."""

from __future__ import annotations

import pytest
from conftest import tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from antefix.data import Chat, Message, Source, Table, Triples
from antefix.data.linearise import LINEARISATIONS, TextFormat, default_format, parse_source, parse_table
from antefix.errors import DataError

END = "<|endoftext|>"
MILL = Table((("name", "X"), ("eatType", "pub"), ("priceRange", "£20"), ("familyFriendly", "yes"), ("food", "Y")))
TWO = Triples((("a", "R_One", "b"), ("c", "s", "d")))
HI = Chat((Message("system", "Be kind."), Message("user", "Hi")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def paper_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word behind it, and the first and the last token are one."""
    merges = [("Ġ", "T"), ("h", "e"), ("ĠT", "he"), ("Ġ", "a"), ("Ġ", "n")]
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    model = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    made = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=END, eos_token=END)
    assert len(made(" The")["input_ids"]) == 1
    return made


def written(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


PAPER = TextFormat(before_source=" ", separator=" <|endoftext|>", before_target=" ", after_target=" ")
"""GPT-2 in the paper's code: `' {source} {bos}'` and `' {target} {eos}'`, with its bos = eos; add a linearisation."""


class TestThePapersThree:
    """Li & Liang's code, `language_modeling.py` and `run_generation.py`."""

    @pytest.mark.parametrize(
        ("name", "source", "text"),
        [
            ("e2e", MILL, "name : X | Type : pub | price : £20 | family friendly : yes | food : Y"),
            ("webnlg", TWO, " | a : R_One : b | c : s : d"),
            ("dart", TWO, "a : r_one : b | c : s : d"),
        ],
    )
    def test_linearisations(self, name: str, source: Source, text: str) -> None:
        assert TextFormat(linearise=name).source_text(source) == text

    @pytest.mark.parametrize(
        ("name", "source", "line"),
        [
            ("e2e", Table((("name", "X"), ("food", "Y"))), f" name : X | food : Y {END} The text. {END}"),
            ("webnlg", TWO, f"  | a : R_One : b | c : s : d {END} The text. {END}"),
            ("dart", TWO, f" a : r_one : b | c : s : d {END} The text. {END}"),
        ],
    )
    def test_a_training_line(
        self, paper_tokenizer: PreTrainedTokenizerFast, name: str, source: Source, line: str
    ) -> None:
        """The joined ids are those of the whole line; loss begins behind the first end token and holds the last."""
        paper = PAPER.model_copy(update={"linearise": name})
        ids, target = paper.encode_source(paper_tokenizer, source), paper.encode_target(paper_tokenizer, "The text.")
        assert ids + target == paper_tokenizer(line)["input_ids"]
        assert ids[-1] == target[-1] == paper_tokenizer.eos_token_id
        assert written(paper_tokenizer, target) == f" The text. {END}"

    def test_what_decoding_starts_from(self, paper_tokenizer: PreTrainedTokenizerFast) -> None:
        paper = PAPER.model_copy(update={"linearise": "dart"})
        assert written(paper_tokenizer, paper.encode_source(paper_tokenizer, TWO)) == (
            f" a : r_one : b | c : s : d {END}"
        )


class TestOurs:
    def test_written_forms(self) -> None:
        assert TextFormat(linearise="table").source_text(MILL).startswith("name: X | eatType: pub | ")
        assert TextFormat(linearise="triples").source_text(TWO) == "a : R_One : b | c : s : d"
        assert TextFormat(instruction="Say: ", before_source="> ").source_text("hi") == "Say: > hi"

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            (MILL, {"linearise": "e2e"}),
            (Table((("name", "X"), ("food", "Y"))), {"linearise": "table"}),
            (TWO, {"linearise": "triples"}),
            ("hi", {"linearise": "plain"}),
            (HI, {"linearise": "plain", "chat": True}),
        ],
    )
    def test_the_format_that_fits(self, source: Source, expected: dict[str, object]) -> None:
        assert default_format([source]) == TextFormat.from_dict(expected)

    def test_e2e_is_known_by_any_of_its_tables(self) -> None:
        assert default_format([Table((("name", "X"),)), MILL]).linearise == "e2e"

    @pytest.mark.parametrize("name", LINEARISATIONS)
    def test_a_source_of_another_kind_is_refused(self, name: str) -> None:
        source = "hi" if name != "plain" else MILL
        with pytest.raises(DataError, match=f"the linearisation '{name}' writes .*: set data.text.linearise"):
            TextFormat(linearise=name).source_text(source)

    def test_a_conversation_has_no_text_without_a_template(self) -> None:
        with pytest.raises(DataError, match=r"the source is a conversation: set data.text.chat = true"):
            TextFormat().source_text(HI)


class TestTokens:
    def test_source_and_target_are_encoded_apart(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text_format = TextFormat(instruction="Q ", separator=" =>", before_target=" ", after_target="!")
        assert written(tokenizer, text_format.encode_source(tokenizer, "hi")) == "Q hi =>"
        assert written(tokenizer, text_format.encode_target(tokenizer, "ho")) == " ho!</s>"

    def test_a_beginning_that_the_tokenizer_asks_for(self, tokenizer: PreTrainedTokenizerFast) -> None:
        opening = tiny_tokenizer()
        opening.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        assert written(opening, TextFormat().encode_source(opening, "hi")) == "<s>hi\n"
        assert written(opening, TextFormat().encode_target(opening, "ho")) == "ho</s>"

    def test_an_encoder_gets_all_special_tokens_and_no_separator(self) -> None:
        encoder = tiny_tokenizer()
        encoder.backend_tokenizer.post_processor = TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert written(encoder, TextFormat().encode_source(encoder, "hi", for_encoder=True)) == "<s>hi</s>"
        short = TextFormat(max_source_tokens=4)
        assert written(encoder, short.encode_source(encoder, "hello", for_encoder=True)) == "<s>he</s>"

    def test_an_end_token_of_ones_own(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert written(tokenizer, TextFormat(end_token="#").encode_target(tokenizer, "ho")) == "ho#"
        with pytest.raises(DataError, match="end_token '##' is 2 tokens for this tokenizer, it must be one"):
            TextFormat(end_token="##").encode_target(tokenizer, "ho")
        endless = tiny_tokenizer()
        endless.eos_token = None
        with pytest.raises(DataError, match=r"no end-of-text token: set data.text.end_token"):
            TextFormat().encode_target(endless, "ho")


class TestChat:
    def test_the_template_stands_around_a_conversation(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert written(tokenizer, TextFormat().encode_source(tokenizer, HI)) == (
            "system: Be kind.\nuser: Hi\nassistant: "
        )

    def test_any_source_can_be_the_users_turn(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text_format = TextFormat(chat=True, linearise="dart", instruction="Write: ")
        assert written(tokenizer, text_format.encode_source(tokenizer, TWO)) == (
            "user: Write: a : r_one : b | c : s : d\nassistant: "
        )

    def test_an_instruction_opens_the_users_first_turn(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert written(tokenizer, TextFormat(instruction="In French: ").encode_source(tokenizer, HI)) == (
            "system: Be kind.\nuser: In French: Hi\nassistant: "
        )

    def test_a_tokenizer_without_a_template(self) -> None:
        bare = tiny_tokenizer()
        bare.chat_template = None
        with pytest.raises(DataError, match=r"no chat template: set data.text.chat = false"):
            TextFormat(chat=True).encode_source(bare, "hi")

    def test_a_template_that_refuses(self) -> None:
        strict = tiny_tokenizer()
        strict.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"template refuses this conversation \(roles must alternate\)"):
            TextFormat(chat=True).encode_source(strict, "hi")


class TestCutting:
    """The end of a long source goes; what tells the model where the target begins stays."""

    def test_the_separator_stays(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text_format = TextFormat(separator=" =>", max_source_tokens=8)
        assert written(tokenizer, text_format.encode_source(tokenizer, "hello")) == "hello =>"
        assert written(tokenizer, text_format.encode_source(tokenizer, "hello there")) == "hello =>"
        with pytest.raises(DataError, match="max_source_tokens = 3 leaves no room beside the separator"):
            text_format.model_copy(update={"max_source_tokens": 3}).encode_source(tokenizer, "hello")

    @pytest.mark.parametrize("limit", range(40, 51))
    def test_the_template_stays(self, tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
        chat = Chat((Message("system", "Be kind."), Message("user", "café 🍏🍏 crème")))
        ids = TextFormat(max_source_tokens=limit).encode_source(tokenizer, chat)
        text = written(tokenizer, ids)
        assert limit - 4 < len(ids) <= limit, "no more is cut than a character needs"
        assert text.startswith("system: Be kind.\nuser: ")
        assert text.endswith("\nassistant: ")
        assert "café 🍏🍏 crème".startswith(text.removeprefix("system: Be kind.\nuser: ").removesuffix("\nassistant: "))

    def test_no_room_in_the_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="max_source_tokens = 5 leaves no room in the chat template"):
            TextFormat(chat=True, max_source_tokens=5).encode_source(tokenizer, "hello there")


class TestTyped:
    """What a person may write where a source is asked for."""

    TABLE = Table((("name", "Mill Inn"), ("near", "Café: the old")))

    @pytest.mark.parametrize(
        "text",
        [
            "name[Mill Inn], near[Café: the old]",
            "name: Mill Inn | near: Café: the old",
            " name : Mill Inn |near :Café: the old| ",
            '{"name": "Mill Inn", "near": "Café: the old", "price": null}',
            '[["name", "Mill Inn"], ["near", "Café: the old"]]',
        ],
    )
    @pytest.mark.parametrize("linearise", ["e2e", "table"])
    def test_a_table(self, linearise: str, text: str) -> None:
        assert parse_source(text, TextFormat(linearise=linearise)) == self.TABLE

    @pytest.mark.parametrize(
        "text", ["a : R_One : b | c : s : d", " | a:R_One:b | c:s:d", '[["a", "R_One", "b"], "c | s | d"]']
    )
    @pytest.mark.parametrize("linearise", ["webnlg", "dart", "triples"])
    def test_triples(self, linearise: str, text: str) -> None:
        assert parse_source(text, TextFormat(linearise=linearise)) == TWO

    def test_plain_text_is_taken_as_it_is(self) -> None:
        assert parse_source(" a: b | c ", TextFormat()) == "a: b | c"

    @pytest.mark.parametrize("linearise", ["e2e", "table"])
    @pytest.mark.parametrize("text", ["Mill Inn", "name: Mill Inn | near", ": x", '{"name": {}}', '["ab"]', "{", "|"])
    def test_no_table(self, linearise: str, text: str) -> None:
        with pytest.raises(DataError, match=r"is no table: write name\[Fern Hill\], food\[French\] or name: Fern Hill"):
            parse_source(text, TextFormat(linearise=linearise))

    @pytest.mark.parametrize("text", ["a : b", "a : : b", "[]", '["a"]', '[["a", 1, "b"]]', '{"a": "b"}'])
    def test_no_triples(self, text: str) -> None:
        with pytest.raises(DataError, match="is no list of triples: write subject : relation : object"):
            parse_source(text, TextFormat(linearise="triples"))

    @pytest.mark.parametrize("linearise", LINEARISATIONS)
    def test_nothing(self, linearise: str) -> None:
        with pytest.raises(DataError, match="the source is empty"):
            parse_source(" \n", TextFormat(linearise=linearise))

    @pytest.mark.parametrize("text", ["", "Mill Inn", "name[Mill Inn], pub", "name[The [Old] Mill]", "name[]"])
    def test_no_meaning(self, text: str) -> None:
        assert parse_table(text) is None


class TestKept:
    def test_a_card_holds_everything_and_gives_it_back(self) -> None:
        made = TextFormat(linearise="dart", separator=" =>", max_source_tokens=7, chat=True)
        content = made.to_dict()
        assert set(content) == set(TextFormat.model_fields)
        assert TextFormat.from_dict(content) == made

    def test_only_names_are_needed(self) -> None:
        assert TextFormat.from_dict({"linearise": "e2e"}) == TextFormat(linearise="e2e")

    def test_strictness(self) -> None:
        with pytest.raises(DataError, match=r"text format: unknown key 'seperator': did you mean 'separator'\?"):
            TextFormat.from_dict({"seperator": "x"})
        with pytest.raises(DataError, match=r"unknown linearisation 'webnlp': did you mean 'webnlg'\?"):
            TextFormat.from_dict({"linearise": "webnlp"})
        with pytest.raises(DataError, match=r"unknown linearisation 'tabel': did you mean 'table'\?"):
            TextFormat(linearise="tabel")
        with pytest.raises(DataError, match="text format: 'separator': Input should be a valid string"):
            TextFormat.from_dict({"separator": 3})
        with pytest.raises(DataError, match="text format: 'max_source_tokens': Input should be greater than or equal"):
            TextFormat.from_dict({"max_source_tokens": 0})
