"""Chat templates that a recipe names: the Jinja text of some public formats, and which text an
entry `chat_template` stands for.

Each template takes messages with a role (system, user, assistant) and a content, as transformers'
`apply_chat_template` passes them. Whitespace between the tags is none of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pymerge.checkpoint.files import MAX_CONFIG, read_bounded, reason
from pymerge.methods.method import short

AUTO = "auto"
_LEAST = 20  # characters of a Jinja text

_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
  {{- (message['content'] | trim) ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# The system's text stands before the first question, as the format has no role for it.
_MISTRAL = """\
{%- set state = namespace(system='', asked=false) -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {%- set state.system = message['content'] ~ '\\n\\n' -%}
  {%- elif message['role'] == 'user' and not state.asked -%}
    {{- ' [INST] ' ~ state.system ~ message['content'] ~ ' [/INST]' -}}
    {%- set state.system = '' -%}
    {%- set state.asked = true -%}
  {%- elif message['role'] == 'assistant' and state.asked -%}
    {{- ' ' ~ message['content'] ~ eos_token -}}
    {%- set state.asked = false -%}
  {%- else -%}
    {{- raise_exception('after a system message, user and assistant take turns') -}}
  {%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- for message in messages -%}
  {%- set content = message['content'] | trim -%}
  {%- if message['role'] == 'user' -%}
    {{- '### Instruction:\\n' ~ content -}}
  {%- elif message['role'] == 'user_context' -%}
    {{- '### Input:\\n' ~ content -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '### Response:\\n' ~ content -}}
  {%- else -%}
    {{- content -}}
  {%- endif -%}
  {{- '' if loop.last and not add_generation_prompt else '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '### Response:\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
  {%- endif -%}
  {{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}
  {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '[|assistant|]' -}}
{%- endif -%}
"""

NAMED = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def chat_template(raw: str, find: Callable[[str], Path | None]) -> str:
    """The text that an entry stands for, or "auto" as it is: a name of `NAMED`, a Jinja text, or
    the path of a file with one. find: the local file of a name. ValueError with the reason.
    """
    if raw == AUTO:
        return raw
    if raw in NAMED:
        return NAMED[raw]
    if "{" in raw and len(raw) >= _LEAST:
        return raw
    path = find(raw)
    if path is None:
        raise ValueError(
            f"{short(raw)} is neither {AUTO}, nor one of {', '.join(NAMED)}, nor a file; write a"
            " Jinja text itself, or the path of a file that holds it"
        )
    try:
        text = read_bounded(path, MAX_CONFIG).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {reason(error)}; name a file with a Jinja text") from None
    if "{" not in text:
        raise ValueError(f"{path} holds no Jinja text: there is no {{ in it")
    return text
