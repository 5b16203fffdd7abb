// Conversations, kept in this browser. Each has an entry of its own, so that saving one is cheap.
//
//   {id, title, created, updated, system, temperature, maxTokens, json, tools: {on, text}, messages}
//   messages: {role: "user", text, files: [{name, content}]}
//             {role: "assistant", text, calls: [{id, name, arguments}], usage, seconds, end, failure}
//             {role: "tool", id, name, text}

const PREFIX = "rayseek.chat.";

export function newChat(system) {
  const now = Date.now();
  return {
    id: `${now.toString(36)}${Math.random().toString(36).slice(2, 8)}`, title: "", created: now, updated: now,
    system, temperature: 1, maxTokens: null, json: false, tools: { on: false, text: "" }, messages: [],
  };
}

/** All of them, the newest first. What cannot be read is left out. */
export function chats() {
  const found = [];
  try {
    for (const name of Object.keys(localStorage)) {
      if (!name.startsWith(PREFIX)) continue;
      try {
        const chat = JSON.parse(localStorage.getItem(name));
        if (chat?.id && Array.isArray(chat.messages)) found.push(chat);
      } catch {
        // not ours, or damaged
      }
    }
  } catch {
    // storage may be forbidden
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** False if the browser's storage is full or forbidden. */
export function save(chat) {
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export function remove(chat) {
  try {
    localStorage.removeItem(PREFIX + chat.id);
  } catch {
    // storage may be forbidden
  }
}

/** Calls back when another tab changes conversations. */
export function whenChangedElsewhere(callback) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) callback();
  });
}
