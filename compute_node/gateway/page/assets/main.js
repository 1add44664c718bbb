// Starts the page: figures come from the feed, the chat goes to the OpenAI endpoint.
import { model, startChat } from "./chat.js";
import { follow } from "./feed.js";
import { showFigures } from "./figures.js";
import { HeatMap } from "./heat_map.js";
import { SpeedLine } from "./speed_line.js";

const state = document.getElementById("state");
const heat = new HeatMap();
const line = new SpeedLine(document.getElementById("speed-line"));

function showState(text, kind) {
  if (state.textContent !== text) state.textContent = text;
  state.className = kind;
}

function show(figures) {
  const away = Object.keys(figures.away);
  showState(away.length ? `away: ${away.join(", ")}` : "live", away.length ? "bad" : "live");
  showFigures(figures);
  heat.show(figures.heat);
  line.add(figures.at_s, figures.speed.tokens_per_s);
}

startChat();
model().then((name) => { document.getElementById("model").textContent = name; }, () => {});  // the state says why
follow(show, (why) => showState(why, "bad"));
