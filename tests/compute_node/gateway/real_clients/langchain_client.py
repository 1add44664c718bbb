"""What people do with `langchain-openai`; run by test_real_clients.py in the clients' environment.

arguments: the URLs of a real gateway and of a scripted one
"""

import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

real, scripted = sys.argv[1:]
OPTIONS = {"api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(model="tiny-chat", base_url=f"{real}/v1", max_tokens=16, **OPTIONS)
whole = chat.invoke("In the beginning")
assert whole.content
assert whole.usage_metadata["output_tokens"] == 16
assert "".join(chunk.content for chunk in chat.stream("In the beginning")) == whole.content


class Day(BaseModel):
    word: Literal["light", "dark"]
    number: Literal[1, 2, 3]


structured = ChatOpenAI(model="tiny-chat", base_url=f"{real}/v1", max_tokens=300, **OPTIONS)
structured.reasoning_effort = "none"
for method in ("json_schema", "function_calling"):
    day = structured.with_structured_output(Day, method=method).invoke("In the beginning")
    assert isinstance(day, Day), (method, day)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


agent = ChatOpenAI(model="scripted", base_url=f"{scripted}/v1", **OPTIONS).bind_tools([weather])
answer = agent.invoke("Weather in Paris?")
(call,) = answer.tool_calls
assert call["name"] == "weather"
result = weather.invoke(call)
final = agent.invoke([("user", "Weather in Paris?"), answer, result])
assert final.content == "It is sunny in Paris."
print("passed")
