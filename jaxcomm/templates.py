"""Chat templates: conversations as the texts that chat models were trained on."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import jinja2

from jaxcomm.tokenizer import Tokenizer

CHAT_DAY = datetime.datetime(2024, 7, 26)
"""Templates that write a date write this one, whether they ask for `date_string` (Llama 3.x) or for `strftime_now`
(Mistral Small, SmolLM3), so that a prompt is the same tokens every day."""

_CODES = [f"%{flag}{code}" for flag in ("-", "") for code in "aAbBcdefFjmpuUVwWxXyYHIMSDRT"]
_DATE_MACRO = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {CHAT_DAY.strftime(code)!r})" for code in _CODES)
    + " | replace('%%', '%') }}{%- endmacro %}{{ '' }}"
)
"""Before a chat template: its `strftime_now`. (transformers gives templates no function of a caller's.)"""


def written(tokenizer: Tokenizer, turns: list[dict[str, str]], chat_args: Mapping[str, Any]) -> str:
    """Writes a conversation as a tokenizer's chat template does. An assistant's turn at the end is one that has begun.

    A system turn that the template refuses goes before what is said first.

    Raises:
        ValueError: The template refuses the conversation; the message says why.
    """
    begun, tried, refused = turns[-1]["role"] == "assistant", [turns], None
    if turns[0]["role"] == "system" and len(turns) > 1:
        # Gemma's, for one, knows no system turn.
        system, first, *rest = turns
        tried.append([{**first, "content": f"{system['content'].rstrip()}\n\n{first['content']}"}, *rest])
    args = {"date_string": CHAT_DAY.strftime("%d %b %Y"), **chat_args}
    how = dict(tokenize=False, add_generation_prompt=not begun, continue_final_message=begun)
    for conversation in tried:
        try:
            template = _DATE_MACRO + tokenizer.get_chat_template()
            return tokenizer.apply_chat_template(conversation, chat_template=template, **how, **args)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            refused = error
    raise ValueError(" ".join(str(refused).split())[:200]) from refused
