"""What people do with `anthropic`; run by test_real_clients.py in the clients' environment.

arguments: the URLs of a real gateway and of a scripted one
"""

import sys

import anthropic

real, scripted = sys.argv[1:]
PROMPT = [{"role": "user", "content": "In the beginning"}]
OPTIONS = {
    "model": "tiny-chat",
    "max_tokens": 16,
    "messages": PROMPT,
    "extra_body": {"temperature": 0},
}
client = anthropic.Anthropic(base_url=real, api_key="none", max_retries=0)

whole = client.messages.create(**OPTIONS)
text = whole.content[0].text
assert text
assert whole.stop_reason == "max_tokens"
with client.messages.stream(**OPTIONS) as stream:
    assert "".join(stream.text_stream) == text
    assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
try:
    client.messages.create(**{**OPTIONS, "model": "claude"})
except anthropic.NotFoundError as error:
    assert "not served here" in str(error)
else:
    raise AssertionError("an unknown model was answered")

WORD = {"type": "object", "properties": {"word": {"enum": ["light", "dark"]}}, "required": ["word"]}
insisted = client.messages.create(
    model="tiny-chat",
    max_tokens=300,
    messages=PROMPT,
    tools=[{"name": "say", "input_schema": {**WORD, "additionalProperties": False}}],
    tool_choice={"type": "tool", "name": "say"},
    thinking={"type": "disabled"},
)
assert insisted.stop_reason == "tool_use"
assert insisted.content[-1].input["word"] in ("light", "dark")

TOOLS = [{"name": "weather", "description": "", "input_schema": {"type": "object"}}]
agent = anthropic.Anthropic(base_url=scripted, api_key="none", max_retries=0)
ask = {"model": "scripted", "max_tokens": 99, "tools": TOOLS}
conversation = [{"role": "user", "content": "Weather in Paris?"}]
with agent.messages.stream(**ask, messages=conversation) as stream:
    answer = stream.get_final_message()
assert answer.stop_reason == "tool_use"
assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
use = answer.content[-1]
assert use.input == {"city": "Paris"}
result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
conversation += [
    {"role": "assistant", "content": answer.content},
    {"role": "user", "content": [result]},
]
answer = agent.messages.create(**ask, messages=conversation)
assert answer.content[0].text == "It is sunny in Paris."
print("passed")
