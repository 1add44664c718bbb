"""The shipped model with a chat template, which it has none of."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.stack import MODEL

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "system" and not loop.first %}
{{- raise_exception("System message must be at the beginning") }}
{%- endif %}
{{- "<|im_start|>" + message.role + "\n" + message.content }}
{%- for call in message.tool_calls or [] %}
{{- "\n<tool_call>\n" + (call.function | tojson) + "\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}
{%- if enable_thinking is defined %}{{ "<think>\n" }}
{%- if not enable_thinking %}{{ "\n</think>\n\n" }}{% endif %}
{%- endif %}
{%- endif %}"""


def make_chat_model(folder: Path, template: str = CHAT_TEMPLATE) -> Path:
    """A copy in `folder`, which is made."""
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder
