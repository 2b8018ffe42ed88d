"""What an agent reads and says: one date, one beginning, room, template arguments, stop strings, thoughts. No model is loaded but
for the last test."""

import dataclasses
import datetime
from types import SimpleNamespace

import pytest
import tokenizers
import transformers

from jaxcomm.agent import Agent
from jaxcomm.config import ModelConfig
from jaxcomm.protocols.base import start_turn

CONFIG = ModelConfig(vocab=97, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, ff=8, max_positions=64)
IM_END, THINK, END = 90, 91, 92
NAMES = {0: "<s>", 1: "</s>", IM_END: "<|im_end|>", THINK: "<think>", END: "</think>"}


def tokenizer(template=None, names=NAMES, vocab=97, bos="<s>"):
    """A word per token, w5 for token 5, but for special and added ones; <s> begins every text."""
    words = {names.get(i, f"w{i}"): i for i in range(vocab)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, chat_template=template)
    if "<|im_end|>" in words:
        made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made.add_tokens([tokenizers.AddedToken(x, special=False) for x in ("<think>", "</think>") if x in words])
    return made


def agent(template=None, **how):
    made = tokenizer(template, **{key: how.pop(key) for key in ("names", "vocab", "bos") if key in how})
    return Agent(SimpleNamespace(config=CONFIG), made, (1,), chat=template is not None, **how)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        (
            "{%- set today = strftime_now('%Y-%m-%d') %}{% macro day() %}{{ today }}{% endmacro %}{{ day() }}",
            "2024-07-26",
        ),
        (
            "{% if not date_string is defined %}{% set date_string = 'none' %}{% endif %}{{ date_string }}",
            "26 Jul 2024",
        ),
        ("{{ strftime_now('%A %-d %B, %H:%M') }}", "Friday 26 July, 00:00"),
        ("\n{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}", "2024"),
        ("\nw5", "\nw5"),
    ],
)
def test_templates_write_one_date_whatever_way_they_ask(template, text):
    assert agent(template).render("w5") == text
    assert datetime.datetime.now().year > 2024, "today's date is another"


def test_template_arguments_are_passed():
    template = "{{ enable_thinking | default('unset') }} {{ date_string }}"
    assert agent(template).render("w5") == "unset 26 Jul 2024"
    assert agent(template, chat_args={"enable_thinking": False, "date_string": "1 May"}).render("w5") == "False 1 May"


def test_a_template_that_refuses_is_one_clear_line():
    refuses = "{% if messages|length < 9 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    for prompt in ("w5", [{"role": "system", "content": "w3"}, {"role": "user", "content": "w5"}]):
        with pytest.raises(ValueError, match="agent's chat template refuses the conversation: roles must alternate"):
            agent(refuses).render(prompt)


def test_what_a_template_makes_of_a_begun_answer_is_one_line_if_it_is_refused():
    begun = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    assert agent("{% for m in messages %}{{ m.content }} {% endfor %}").render(begun) == "w5 w6"
    for drops in ("{{ messages[0].content }}\n", "{{ 1 + messages[0].content }}", "{{ nothing.at.all }}"):
        with pytest.raises(ValueError, match="chat template refuses the conversation: .*") as error:
            agent(drops).render(begun)
        assert "\n" not in str(error.value)


def test_a_text_begins_once():
    raw = agent()
    assert raw.encode("w5") == raw.encode("<s> w5") == [0, 5]
    assert raw.follow("<s> w5", " w6") == [6] == raw.follow("w5", " w6")
    assert agent("<s> {{ messages[0].content }}").encode("w5") == [0, 5]


def test_prompts_that_are_cut_keep_their_beginning():
    prompts = ["w5 w6 w7 w8", "w5"]
    assert agent(longest=3).rows(prompts) == [[0, 7, 8], [0, 5]]
    assert agent(longest=1).rows(prompts) == [[0], [0]]
    assert agent(longest=2, bos=None).rows(prompts) == [[7, 8], [5]]
    assert agent("<s> {{ messages[0].content }}", longest=3).rows(prompts) == [[0, 7, 8], [0, 5]]


def test_only_a_prompt_with_a_token_that_the_model_lacks_is_refused():
    larger = agent(vocab=120)
    assert larger.encode("w96") == [0, 96]
    with pytest.raises(ValueError, match=r"the prompt has token 'w97' \(97\), the model has 97 tokens: leave it out"):
        larger.rows(["w5", "w97"])
    with pytest.raises(ValueError, match="'w100'"):
        larger.follow("w5", " w100")


def test_what_stands_before_nothing():
    assert agent().first_token == 0
    bare = agent(bos=None)
    assert bare.first_token == 1, "the token it stops at"
    with pytest.raises(ValueError, match="no token that a text begins or ends with"):
        dataclasses.replace(bare, stop_tokens=()).first_token  # noqa: B018


@pytest.mark.parametrize(
    "ids, until, said",
    [
        ([5, 6, IM_END, 7], ("<|im_end|>",), "w5 w6"),
        ([5, 6, IM_END, 7], (), "w5 w6 w7"),
        ([5, 6, IM_END, 7], ("w7", "<|im_end|>"), "w5 w6"),
        ([5, 6, IM_END, 7], ("w6 <|im_end|>",), "w5"),
        ([5, 6, IM_END, 7], ("w6 w7", ""), "w5"),
        ([THINK, 5, END, 6, 7], (), "w6 w7"),
        ([5, END, 6], (), "w6"),
        ([5, END, 5, 6], ("w5",), ""),
        ([THINK, 5, 6], (), ""),
        ([THINK, 5, END], (), ""),
    ],
)
def test_what_is_said(ids, until, said):
    assert agent().said(ids, until=until).strip() == said


def test_a_thought_that_the_prompt_began_goes_on_until_it_ends():
    a = agent()
    assert a.said([5, 6], after=[0, 4, THINK]) == "" and a.said([5, END, 6], after=[0, 4, THINK]) == "w6"
    assert a.said([5, 6], after=[0, THINK, 3, END]) == "w5 w6", "thinking was switched off"


def test_turns_stop_at_special_tokens_and_pay_for_thoughts(llama):
    """The tokens that a random model writes are given the names that the case needs."""
    ends = {0: "<s>", 1: "</s>"}
    plain = Agent(llama.params, tokenizer(names=ends), (), "plain")
    called = lambda **names: dataclasses.replace(
        plain, tokenizer=tokenizer(names=ends | {i: x for x, i in names.items()})
    )
    (free,) = start_turn(plain, ["w5 w95"]).write(12)
    ids = plain.tokenizer.convert_tokens_to_ids(list(free.written))
    n = next(n for n, i in enumerate(ids) if n and i not in ids[:n] and i not in (0, 1, 5, 95))

    (stopped,) = start_turn(called(**{"<|im_end|>": ids[n]}), ["w5 w95"]).write(12, until=["<|im_end|>"])
    assert stopped.written == (*free.written[:n], "<|im_end|>") and stopped.text == " ".join(free.written[:n])

    thinks = called(**{"<think>": 95, "</think>": ids[n], "first": ids[0]})
    (thought,) = start_turn(thinks, ["w5 <think>"]).write(12, until=["first"])
    after = ids[len(ids) - ids[::-1].index(ids[n]) :]  # the token that ends thoughts may come again
    after = after[: after.index(ids[0])] if ids[0] in after else after
    assert after and thought.text == " ".join(f"w{i}" for i in after)
    assert thought.spent.written > n, "the thought is paid for, and no stop string ends it"
    (unfinished,) = start_turn(thinks, ["w5 <think>"]).write(n)
    assert unfinished.text == "" and unfinished.spent.written == n
