// The box to chat: a conversation over the OpenAI endpoint, or text that goes on where the model
// has no chat template.
import { eventsOf } from "./events.js";
import { fetchWithKey } from "./key.js";
import { duration } from "./units.js";

const at = (id) => document.getElementById(id);
let turns = [];
let answering = null;  // aborts the answer under way
let isChat = true;  // else the model has no chat template, and goes on from the text

function addTurn(kind, text) {
  const turn = document.createElement("li"), body = document.createElement("span");
  turn.className = kind;
  body.textContent = text;
  turn.append(body);
  at("turns").append(turn);
  showLatest();
  return body;
}

function showLatest() {
  at("turns").scrollTop = at("turns").scrollHeight;
}

// The name of the model that is served.
export async function model() {
  const answer = await fetchWithKey("v1/models");
  if (!answer.ok) throw new Error(await problemOf(answer));
  const found = (await answer.json()).data[0];
  isChat = found.has_chat_template;
  at("chat-note").textContent = isChat ? "" : "This model has no chat template: it goes on from your text.";
  return found.id;
}

async function problemOf(answer) {
  const found = await answer.json().catch(() => ({}));
  return found.error?.message ?? `the server answers ${answer.status}`;
}

async function ask(signal) {
  const name = await model();
  const more = isChat ? { messages: turns } : { prompt: turns.map((turn) => turn.content).join("") };
  const body = { model: name, stream: true, max_tokens: Number(at("longest").value), ...more };
  const answer = await fetchWithKey(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  });
  if (!answer.ok) throw new Error(await problemOf(answer));
  return answer;
}

// Text and thoughts of one event.
function partsOf(event) {
  const found = JSON.parse(event);
  if (found.error) throw new Error(found.error.message);
  const choice = found.choices?.[0] ?? {};
  return [choice.delta?.content ?? choice.text ?? "", choice.delta?.reasoning_content ?? ""];
}

async function take(answer, body, start) {
  let thought = null, text = "", num = 0, first = 0;
  for await (const event of eventsOf(answer)) {
    if (event === "[DONE]") break;
    const [more, thinks] = partsOf(event);
    if (!more && !thinks) continue;
    first ||= performance.now();
    num += 1;
    if (thinks) {
      thought ??= body.parentElement.insertBefore(document.createElement("span"), body);
      thought.className = "thought";
      thought.textContent += thinks;
    }
    text += more;
    body.textContent = text;
    showLatest();
  }
  if (num > 1) note(body, num, first, start);
  return text;
}

function note(body, num, first, start) {
  const rate = (1000 * (num - 1)) / (performance.now() - first);
  const line = document.createElement("small");
  line.textContent = `${rate.toFixed(1)} tokens/s; the first after ${duration((first - start) / 1000)}`;
  body.parentElement.append(line);
  showLatest();
}

function setBusy(isBusy) {
  at("send").disabled = isBusy;
  at("stop").hidden = !isBusy;
}

async function send(text) {
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  const controller = answering = new AbortController();
  setBusy(true);
  const body = addTurn("assistant", ""), start = performance.now();
  try {
    const answer = await take(await ask(controller.signal), body, start);
    turns.push({ role: "assistant", content: answer });
  } catch (error) {
    if (error.name === "AbortError") turns.push({ role: "assistant", content: body.textContent });
    else {
      turns.pop();
      if (!body.textContent) body.parentElement.remove();
      addTurn("problem", error.message);
    }
  }
  if (answering === controller) {
    answering = null;
    setBusy(false);
    at("prompt").focus();
  }
}

function reset() {
  answering?.abort();
  answering = null;
  turns = [];
  at("turns").replaceChildren();
  setBusy(false);
  at("prompt").focus();
}

export function startChat() {
  at("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = at("prompt").value;
    if (answering || !text.trim()) return;
    at("prompt").value = "";
    send(text);
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    at("chat-form").requestSubmit();
  });
  at("stop").addEventListener("click", () => answering?.abort());
  at("reset").addEventListener("click", reset);
}
