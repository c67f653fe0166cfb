/* Light or dark, decided before the first paint: what was chosen, else what the system says. It is the only script
 * that holds the page up, so it does nothing else but wire its button. */
{
  const KEY = "jstream.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const other = { light: "dark", dark: "light" };
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEY);
  } catch {
    // A browser that keeps nothing shows what the system says.
  }
  const seen = () => (chosen in other ? chosen : system.matches ? "dark" : "light");
  const decide = () => {
    document.documentElement.dataset.theme = seen();
    document.getElementById("theme")?.setAttribute("aria-label", `Change to ${other[seen()]} colours`);
    dispatchEvent(new Event("themechange"));
  };
  const toggle = () => {
    const wanted = other[seen()];
    chosen = wanted === (system.matches ? "dark" : "light") ? null : wanted;
    try {
      if (chosen) localStorage.setItem(KEY, chosen);
      else localStorage.removeItem(KEY);
    } catch {
      // It lasts as long as the page, then.
    }
    decide();
  };
  system.addEventListener("change", decide);
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", toggle);
    decide();
  });
  decide();
}
