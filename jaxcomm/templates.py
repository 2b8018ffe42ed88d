"""Chat templates: render conversations in the format that a chat model was trained on."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import jinja2

from jaxcomm.tokenizer import Tokenizer

CHAT_DAY = datetime.datetime(2024, 7, 26)
"""The date for templates that write one, through `date_string` (Llama 3.x) or `strftime_now` (Mistral Small, SmolLM3). It
is fixed, so that a prompt has the same tokens every day."""

_CODES = [f"%{flag}{code}" for flag in ("-", "") for code in "aAbBcdefFjmpuUVwWxXyYHIMSDRT"]
_DATE_MACRO = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {CHAT_DAY.strftime(code)!r})" for code in _CODES)
    + " | replace('%%', '%') }}{%- endmacro %}{{ '' }}"
)
"""Put before a chat template: defines `strftime_now`. (transformers does not let callers pass functions to a template.)"""


def written(tokenizer: Tokenizer, turns: list[dict[str, str]], chat_args: Mapping[str, Any]) -> str:
    """Renders a conversation with a tokenizer's chat template. An assistant's turn at the end is left open.

    If the template refuses a system turn, its text is put before the text of the first turn.

    Raises:
        ValueError: The template refuses the conversation; the message says why.
    """
    begun, tried, refused = turns[-1]["role"] == "assistant", [turns], None
    if turns[0]["role"] == "system" and len(turns) > 1:
        # Gemma's template, for example, has no system turn.
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
