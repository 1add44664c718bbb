// Puts figures into the page, in words and units.
import { bytes, duration, number, percent } from "./units.js";

const at = (id) => document.getElementById(id);

// Only what changed is touched, so that a screen reader is not interrupted each second.
function put(id, text) {
  const place = at(id);
  if (place.textContent !== text) place.textContent = text;
}

function meter(id, share) {
  at(id).value = share ?? 0;
}

function rows(id, found) {
  const body = at(id).querySelector("tbody");
  body.replaceChildren(...found.map((cells) => {
    const row = document.createElement("tr");
    if (cells.className) row.className = cells.className;
    row.append(...cells.map((cell, column) => {
      const place = document.createElement(column ? "td" : "th");
      if (!column) place.scope = "row";
      place.append(...[cell].flat());
      return place;
    }));
    return row;
  }));
}

function bar(share, label) {
  const found = document.createElement("meter");
  found.max = 1;
  found.value = share;
  found.setAttribute("aria-label", label);
  return found;
}

function showSpeed(speed) {
  put("speed", speed.tokens_per_s === null ? "–" : speed.tokens_per_s.toFixed(1));
  const first = speed.first_token_s;
  const parts = [];
  if (speed.prompt_tokens_per_s >= 1) parts.push(`${number(speed.prompt_tokens_per_s)} prompt tokens/s`);
  if (first) parts.push(`first token after ${duration(first.p50)}`);
  put("speed-more", parts.join(", "));
  rows("latency", [["To the first token", first], ["Between tokens", speed.between_tokens_s], ["In the queue", speed.queued_s]]
    .map(([name, found]) => [name, found ? duration(found.p50) : "–", found ? duration(found.p95) : "–"]));
}

function showClients(clients) {
  put("open", number(clients.open));
  const parts = [`${number(clients.waiting)} waiting, ${number(clients.total)} since the start`];
  if (clients.refused) parts.push(`${number(clients.refused)} found the queue full`);
  if (clients.failed) parts.push(`${number(clients.failed)} failed`);
  if (clients.kept_hits) parts.push(`${number(clients.tokens_saved)} prompt tokens saved in ${number(clients.kept_hits)} conversations`);
  put("clients", parts.join("; "));
}

function showExperts(experts) {
  put("hits", experts ? percent(experts.hit_ratio ?? experts.hit_ratio_ever) : "–");
  meter("hits-bar", experts?.hit_ratio ?? experts?.hit_ratio_ever);
  if (!experts) return put("hits-more", "the node is away");
  if (experts.hit_ratio_ever === null) return put("hits-more", `nothing was computed yet; room for ${number(experts.slots)} experts`);
  const lately = experts.hit_ratio === null ? "nothing lately; " : "";
  put("hits-more", `${lately}${percent(experts.hit_ratio_ever)} since the start; ${number(experts.resident)} of ${number(experts.slots)} slots hold an expert`);
}

function showDisk(disk) {
  put("busy", disk ? percent(disk.busy_share, 0) : "–");
  meter("busy-bar", disk?.busy_share);
  if (!disk) return put("disk-more", "the store is away");
  const parts = [`${bytes(disk.bytes_per_s ?? 0)}/s`];
  if (disk.read_s) parts.push(`an expert takes ${duration(disk.read_s.p50)}, 95 % below ${duration(disk.read_s.p95)}`);
  if (disk.damaged) parts.push(`${number(disk.damaged)} experts are damaged`);
  put("disk-more", parts.join("; "));
}

function showMemory(memory) {
  put("memory", memory ? bytes(memory.current_bytes) : "–");
  meter("memory-bar", memory ? memory.current_bytes / memory.ceiling_bytes : 0);
  if (!memory) return put("memory-more", "not measured here");
  const old = memory.age_s > 5 ? `, ${Math.round(memory.age_s)} s ago` : "";
  put("memory-more", `of ${bytes(memory.ceiling_bytes)}, at most ${bytes(memory.peak_bytes)}${old}`);
  rows("parts", Object.entries(memory.parts).map(([name, held]) => {
    const share = held / memory.ceiling_bytes;
    return [name, bytes(held), [percent(share), bar(share, name)]];
  }));
}

function showPolicies(policies, learning) {
  if (!policies) {
    rows("policies", []);
    return put("in-charge", learning ? `Not compared: ${learning}.` : "Not compared yet: nothing was decoded.");
  }
  const title = policies.scores.find((score) => score.name === policies.in_charge)?.title ?? policies.in_charge;
  put("in-charge", `In charge: ${title}, as ${policies.why}.`);
  rows("policies", policies.scores.map((score) => {
    const row = [score.title, [percent(score.hit_ratio, 2), bar(score.hit_ratio, score.title)],
      score.regret === null ? "–" : (100 * score.regret).toFixed(2)];
    row.className = score.name === policies.in_charge ? "in-charge" : "";
    return row;
  }));
}

function showStalls(stalls) {
  const parts = Object.entries(stalls).map(([cause, share]) => `${percent(share, 0)} ${cause}`);
  put("stalls", parts.length ? `Of the last seconds: ${parts.join(", ")}.` : "No wait in the last seconds.");
}

function times(count) {
  return ["never", "once"][count] ?? `${number(count)} times`;
}

function guardItem(guard) {
  const item = document.createElement("li"), title = document.createElement("h3"), text = document.createElement("p");
  title.textContent = `Within ${guard.budget}: ${guard.route}`;
  const changes = `tightened ${times(guard.tightened)}, relaxed ${times(guard.relaxed)}`;
  if (guard.kl === null) {
    text.textContent = `Nothing is checked yet; ${changes}.`;
    item.append(title, text);
    return item;
  }
  text.textContent = `KL ${guard.kl.toFixed(4)} nats a token, surely below ${guard.kl_high.toFixed(4)}, limit ${guard.kl_limit.toFixed(4)}. `
    + `${percent(guard.top1)} of ${number(guard.checks)} checked tokens are the likeliest of the exact model, too; ${changes}.`;
  item.append(title, bar(guard.kl / guard.kl_limit, "Share of the limit"), text);
  return item;
}

function showGuards(guards) {
  at("quality").hidden = !guards.length;
  at("guards").replaceChildren(...guards.map(guardItem));
}

export function showFigures(figures) {
  showSpeed(figures.speed);
  showClients(figures.clients);
  showExperts(figures.experts);
  showDisk(figures.disk);
  showMemory(figures.memory);
  showPolicies(figures.policies, figures.learning);
  showStalls(figures.stalls);
  showGuards(figures.guards);
}
