// Runs before the first paint: the colours and the language that this browser was set to.
const chosen = (name) => {
  try {
    return localStorage.getItem(`rayseek.${name}`);
  } catch {
    return null; // storage may be forbidden
  }
};
if (chosen("theme")) document.documentElement.dataset.theme = chosen("theme");
document.documentElement.lang =
  chosen("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
