// The API key, for servers that want one: asked for when an answer is 401, kept in this tab.
const dialog = document.getElementById("key");
const form = document.getElementById("key-form");
const text = document.getElementById("key-text");
const problem = document.getElementById("key-problem");
const NAME = "flashmoe-api-key";
let asking = null;

function headers(more) {
  const key = sessionStorage.getItem(NAME);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// Resolves once somebody has typed a key; all who wait share one dialog.
function askForKey() {
  if (asking) return asking;
  problem.textContent = sessionStorage.getItem(NAME) ? "The server did not take this key." : "";
  sessionStorage.removeItem(NAME);
  asking = new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(NAME, text.value.trim());
      text.value = "";
      dialog.close();
      asking = null;
      resolve();
    }, { once: true });
  });
  dialog.showModal();
  return asking;
}

dialog.addEventListener("cancel", (event) => event.preventDefault());  // nothing works without

// As fetch does, with the key; asks for one as long as the server wants another.
export async function fetchWithKey(address, options = {}) {
  if (document.documentElement.dataset.key === "needed" && !sessionStorage.getItem(NAME)) await askForKey();
  for (;;) {
    const answer = await fetch(address, { ...options, headers: headers(options.headers ?? {}) });
    if (answer.status !== 401) return answer;
    await askForKey();
  }
}
