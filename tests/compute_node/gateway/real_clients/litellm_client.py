"""What people do with `litellm`; run by test_real_clients.py in the clients' environment.

arguments: the URLs of a real gateway and of a scripted one
"""

import sys

import litellm

real, scripted = sys.argv[1:]
ASK = {
    "messages": [{"role": "user", "content": "In the beginning"}],
    "api_base": f"{real}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 16,
    "num_retries": 0,
}
whole = litellm.completion(model="openai/tiny-chat", **ASK)
text = whole.choices[0].message.content
assert text
chunks = litellm.completion(model="openai/tiny-chat", stream=True, **ASK)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
try:
    litellm.completion(model="openai/gpt-4", **ASK)
except litellm.NotFoundError as error:
    assert "not served here" in str(error)
else:
    raise AssertionError("an unknown model was answered")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
answer = litellm.completion(
    model="openai/scripted", tools=TOOLS, **{**ASK, "api_base": f"{scripted}/v1"}
)
assert answer.choices[0].message.tool_calls[0].function.name == "weather"
print("passed")
