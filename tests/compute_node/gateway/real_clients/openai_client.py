"""What people do with `openai`; run by test_real_clients.py in the clients' environment.

arguments: the URLs of a real gateway and of a scripted one
"""

import asyncio
import json
import sys
from typing import Literal

import openai
import pydantic

real, scripted = sys.argv[1:]
CHAT = [{"role": "user", "content": "In the beginning"}]
GREEDY = {"model": "tiny-chat", "messages": CHAT, "temperature": 0, "max_tokens": 16}
client = openai.OpenAI(base_url=f"{real}/v1", api_key="none", max_retries=0)

assert [model.id for model in client.models.list()] == ["tiny-chat"]
whole = client.chat.completions.create(**GREEDY)
text = whole.choices[0].message.content
assert text
assert whole.usage.completion_tokens == 16
assert whole.choices[0].finish_reason == "length"

streamed = client.chat.completions.create(
    **GREEDY, stream=True, stream_options={"include_usage": True}
)
chunks = list(streamed)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

completed = client.completions.create(
    model="tiny-chat", prompt="In the beginning", temperature=0, max_tokens=5, logprobs=2
)
assert len(completed.choices[0].logprobs.tokens) == 5


async def asynchronously() -> None:
    async with openai.AsyncOpenAI(base_url=f"{real}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(**GREEDY) for _ in range(3))
        )
        assert [answer.choices[0].message.content for answer in answers] == [text] * 3
        stream = await client.chat.completions.create(**GREEDY, stream=True)
        parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(parts) == text


asyncio.run(asynchronously())

for change, kind in [
    ({"model": "gpt-4"}, openai.NotFoundError),
    ({"n": 2}, openai.BadRequestError),
    ({"messages": [{"role": "user", "content": "x " * 60000}]}, openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**{**GREEDY, **change})
    except kind as error:
        refused = error
    else:
        raise AssertionError(change)
assert refused.code == "context_length_exceeded"


class Day(pydantic.BaseModel):
    word: Literal["light", "dark"]
    number: Literal[1, 2, 3]


HELD = {
    "model": "tiny-chat",
    "messages": CHAT,
    "max_tokens": 300,
    "seed": 1,
    "reasoning_effort": "none",
}
parsed = client.chat.completions.parse(**HELD, response_format=Day)
assert isinstance(parsed.choices[0].message.parsed, Day)
with client.chat.completions.stream(**HELD, response_format=Day) as stream:
    assert stream.get_final_completion().choices[0].message.parsed == (
        parsed.choices[0].message.parsed
    )
loose = client.chat.completions.create(
    **{**HELD, "max_tokens": 8}, response_format={"type": "json_object"}
)
assert loose.choices[0].message.content.startswith("{")
insisted = client.chat.completions.parse(
    **HELD, tools=[openai.pydantic_function_tool(Day)], tool_choice="required"
)
(call,) = insisted.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, Day)
try:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    client.chat.completions.create(**HELD, response_format=wrong)
except openai.BadRequestError as error:
    assert error.param == "response_format"
else:
    raise AssertionError("a schema that cannot be kept was taken")

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
agent = openai.OpenAI(base_url=f"{scripted}/v1", api_key="none", max_retries=0)
conversation = [{"role": "user", "content": "Weather in Paris?"}]
answer = agent.chat.completions.create(model="scripted", messages=conversation, tools=TOOLS)
message = answer.choices[0].message
assert answer.choices[0].finish_reason == "tool_calls"
assert (message.content, message.reasoning_content) == ("Let me see.", "I must look.")
(call,) = message.tool_calls
assert call.function.name == "weather"
assert json.loads(call.function.arguments) == {"city": "Paris"}
conversation += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
answer = agent.chat.completions.create(model="scripted", messages=conversation, tools=TOOLS)
assert answer.choices[0].message.content == "It is sunny in Paris."
with agent.chat.completions.stream(model="scripted", messages=conversation[:1], tools=TOOLS) as s:
    final = s.get_final_completion()
assert final.choices[0].message.tool_calls[0].function.name == "weather"
print("passed")
