// Figures of the stack, anew each second; after a loss the page connects again by itself.
import { eventsOf } from "./events.js";
import { fetchWithKey } from "./key.js";

const RETRY_MS = 2000, SILENT_MS = 10000;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function readOnce(show) {
  const left = new AbortController();
  let timer = setTimeout(() => left.abort(), SILENT_MS);
  try {
    const answer = await fetchWithKey("live", { signal: left.signal, cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    for await (const event of eventsOf(answer)) {
      clearTimeout(timer);
      timer = setTimeout(() => left.abort(), SILENT_MS);
      show(JSON.parse(event));
    }
  } finally {
    clearTimeout(timer);
  }
}

// show: called with figures; lost: with the reason, while there are none.
export async function follow(show, lost) {
  for (;;) {
    await new Promise((resolve) => {  // a page that nobody sees costs the server nothing
      if (!document.hidden) resolve();
      else document.addEventListener("visibilitychange", resolve, { once: true });
    });
    try {
      await readOnce(show);
      lost("connection lost, trying again");
    } catch (error) {
      lost(error.name === "TypeError" || error.name === "AbortError"
        ? "the server does not answer, trying again" : `${error.message}, trying again`);
    }
    await pause(RETRY_MS);
  }
}
