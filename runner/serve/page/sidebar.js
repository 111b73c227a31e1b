// The list of conversations, and the drawers that it and the console become on a narrow screen.

import { byId, el, iconButton } from "./dom.js";

const narrow = matchMedia("(max-width: 760px)");
const consoleCovers = matchMedia("(max-width: 1080px)");

/** on: {open(id), rename(id), remove(id)}. */
export function drawConversations(conversations, currentId, writingId, on) {
  byId("conversations").replaceChildren(...conversations.map((each) => {
    const isCurrent = each.id === currentId;
    return el("li", { class: isCurrent ? "current" : null },
      el("button", { type: "button", class: "open", title: each.title, "aria-current": isCurrent ? "true" : null,
        onclick: () => on.open(each.id) }, each.title),
      each.id === writingId ? el("span", { class: "writing", role: "img", "aria-label": "is being answered" }) : null,
      iconButton("edit", `Rename “${each.title}”`, () => on.rename(each.id)),
      iconButton("trash", `Delete “${each.title}”`, () => on.remove(each.id)));
  }));
}

/** What covers the rest of the page is closed by a touch beside it, and by Escape. */
export class Drawers {
  constructor(consolePanel) {
    this.console = consolePanel;
    byId("open-sidebar").addEventListener("click", () => this.showSidebar(true));
    byId("close-sidebar").addEventListener("click", () => this.showSidebar(false));
    byId("veil").addEventListener("click", () => this.closeAll());
    byId("toggle-console").addEventListener("click", () => this.showConsole(byId("console").hidden));
    byId("close-console").addEventListener("click", () => this.showConsole(false));
    for (const each of [narrow, consoleCovers]) each.addEventListener("change", () => this.resized());
    let open = false;
    try {
      open = localStorage.getItem("moe-edge.console") !== "closed";
    } catch {
      // Closed, then.
    }
    if (open && !consoleCovers.matches) this.showConsole(true, { focus: false });
  }

  showSidebar(shown) {
    byId("sidebar").classList.toggle("shown", shown);
    byId("open-sidebar").setAttribute("aria-expanded", String(shown));
    this.drawVeil();
    if (!narrow.matches) return;
    (shown ? byId("new-conversation") : byId("open-sidebar")).focus();
  }

  get sidebarCovers() {
    return narrow.matches && byId("sidebar").classList.contains("shown");
  }

  showConsole(shown, { focus = true } = {}) {
    byId("console").hidden = !shown;
    byId("toggle-console").setAttribute("aria-expanded", String(shown));
    if (!consoleCovers.matches) {
      try {
        localStorage.setItem("moe-edge.console", shown ? "open" : "closed");
      } catch {
        // Asked for again next time.
      }
    }
    this.drawVeil();
    this.console.setShown(shown);
    if (focus) (shown ? byId("close-console") : byId("toggle-console")).focus();
  }

  get consoleIsOver() {
    return consoleCovers.matches && !byId("console").hidden;
  }

  /** Whether there was something to close. */
  closeAll() {
    const some = this.sidebarCovers || this.consoleIsOver;
    if (this.sidebarCovers) this.showSidebar(false);
    if (this.consoleIsOver) this.showConsole(false);
    return some;
  }

  resized() {
    if (!narrow.matches) byId("sidebar").classList.remove("shown");
    this.drawVeil();
  }

  drawVeil() {
    byId("veil").hidden = !(this.sidebarCovers || this.consoleIsOver);
  }
}
