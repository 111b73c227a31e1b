// Light or dark, before anything is painted: loaded in the head, not as a module.
// "auto" follows the system; the choice is kept in this browser.

(() => {
  const NAME = "moe-edge.theme";
  const choices = ["auto", "light", "dark"];
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      const choice = localStorage.getItem(NAME);
      return choices.includes(choice) ? choice : "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  }

  let choice = stored();

  function apply() {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    dispatchEvent(new CustomEvent("themechange"));
  }

  window.moeEdgeTheme = {
    get choice() {
      return choice;
    },
    /** Take one of "auto", "light", "dark", and keep it. */
    set(next) {
      choice = choices.includes(next) ? next : "auto";
      try {
        localStorage.setItem(NAME, choice);
      } catch {
        // It holds until the page is closed.
      }
      apply();
    },
  };
  system.addEventListener("change", apply);
  apply();
})();
