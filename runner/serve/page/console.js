// The console: asks /moe-edge/live while it is seen, twice a second while something is answered, and draws what changed.

import { getJson } from "./api.js";
import { Chart } from "./chart.js";
import { byId, el } from "./dom.js";
import * as format from "./format.js";
import { ExpertMap } from "./map.js";

const BUSY_MS = 500;
const IDLE_MS = 3000;

export class ConsolePanel {
  constructor() {
    this.map = new ExpertMap(byId("map"), byId("map-tip"));
    this.charts = {
      hitRate: new Chart(byId("hit-rate-chart"), 1), bytes: new Chart(byId("bytes-token-chart")), disk: new Chart(byId("disk-chart")),
    };
    this.isShown = false;
    this.isConnected = false;
    this.isWriting = false;
    this.isAsking = false;
    this.timer = null;
    this.last = null; // {numbers, time} of the answer before
    document.addEventListener("visibilitychange", () => this.wake());
  }

  setShown(shown) {
    this.isShown = shown;
    this.wake();
  }

  setWriting(writing) {
    this.isWriting = writing;
    this.wake();
  }

  /** The server answers, perhaps with another model than before. */
  connected() {
    byId("console-notice").hidden = true;
    this.isConnected = true;
    this.picture = null;
    this.last = null;
    this.wake();
  }

  get isSeen() {
    return this.isShown && this.isConnected && document.visibilityState === "visible";
  }

  /** Something has changed that decides whether and how often to ask. */
  wake() {
    clearTimeout(this.timer);
    if (this.isSeen && !this.isAsking) this.look();
  }

  async look() {
    this.isAsking = true;
    let isBusy = this.isWriting;
    try {
      if (!this.picture) this.takePicture(await getJson("/moe-edge/picture"));
      const live = await getJson("/moe-edge/live");
      isBusy ||= live.running > 0;
      this.take(live);
      this.say(null);
    } catch (error) {
      this.say(error.message);
    } finally {
      this.isAsking = false;
    }
    clearTimeout(this.timer);
    if (this.isSeen) this.timer = setTimeout(() => this.look(), isBusy || this.isWriting ? BUSY_MS : IDLE_MS);
  }

  say(words) {
    byId("console-notice").hidden = words === null;
    byId("console-notice").textContent = words ?? "";
  }

  // ---- what does not change while the model is loaded

  takePicture(picture) {
    this.picture = picture;
    byId("console").classList.add("known");
    this.map.setShape(picture.layers, picture.resident.map((row) => row.length), picture.levels);
    byId("policy").textContent = picture.policy ?? "";
    const parts = [...picture.memory];
    const free = (picture.budget_bytes ?? 0) - parts.reduce((sum, part) => sum + part.bytes, 0);
    if (free > 0) parts.push({ name: "free", bytes: free });
    const kinds = parts.map((part, at) => (part.name === "experts" ? "experts" : part.name === "free" ? "free" : Math.min(at, 2)));
    byId("memory-bar").replaceChildren(...parts.map((part, at) => {
      const piece = el("i", { class: `part-${kinds[at]}` });
      piece.style.flexGrow = part.bytes;
      return piece;
    }));
    byId("memory").replaceChildren(...parts.map((part, at) =>
      el("div", {}, el("i", { class: `part-${kinds[at]}` }), el("dt", {}, part.name), el("dd", {}, format.bytes(part.bytes)))));
    this.drawBoards(picture.boards ?? []);
  }

  /** A run of layers for each board, when there are several. */
  drawBoards(boards) {
    byId("boards-section").hidden = boards.length === 0;
    byId("boards-bar").replaceChildren(...boards.map((board, at) => {
      const piece = el("i", { class: `part-${at % 3}` });
      piece.style.flexGrow = board.layers[1] - board.layers[0] + 1;
      return piece;
    }));
    byId("boards").replaceChildren(...boards.map((board, at) => el("div", {}, el("i", { class: `part-${at % 3}` }),
      el("dt", {}, board.board), el("dd", {}, `layers ${board.layers[0]} to ${board.layers[1]}, ${format.bytes(board.rss_bytes)}`))));
  }

  // ---- what does

  take(live) {
    const numbers = live.numbers;
    byId("queue").textContent = live.running + live.waiting === 0 ? "idle"
      : `answering ${live.running}, ${live.waiting} of ${live.queue_limit} waiting`;
    byId("budget").textContent = `budget ${format.bytes(numbers.budget_bytes ?? 0)} · process ${format.bytes(live.peak_rss_bytes)}`;
    byId("budget").title = "The budget is the model’s. The process is the most that it has held, with Python and libraries.";
    this.map.setBytes(Uint8Array.from(atob(live.recency), (character) => character.charCodeAt(0)));
    this.takeChange(numbers);
    this.drawTraded(numbers);
    this.draw();
  }

  /** Figures of the time since the last answer; a quiet time leaves them as they are. */
  takeChange(numbers) {
    const now = performance.now();
    const before = this.last;
    this.last = { numbers, time: now };
    if (before === null) {
      this.showSoFar(numbers);
      return;
    }
    const grown = (name) => (numbers[name] ?? 0) - (before.numbers[name] ?? 0);
    const seconds = (now - before.time) / 1000;
    const [tokens, uses, read] = [grown("tokens"), grown("expert_uses"), grown("expert_bytes_read")];
    if (uses <= 0) {
      if (!this.isWriting) byId("disk").textContent = "idle";
      return;
    }
    const hitRate = grown("expert_hits") / uses;
    this.charts.hitRate.add(hitRate);
    byId("hit-rate").textContent = format.percent(hitRate);
    this.charts.disk.add(read / seconds);
    byId("disk").textContent = `${format.bytes(Math.round(read / seconds))}/s`;
    if (tokens > 0) {
      this.charts.bytes.add(read / tokens);
      byId("bytes-token").textContent = format.bytes(Math.round(read / tokens));
    }
  }

  /** What is known before anything has changed: the mean since the model was loaded. */
  showSoFar(numbers) {
    if (!numbers.expert_uses) return;
    byId("hit-rate").textContent = format.percent(numbers.expert_hits / numbers.expert_uses);
    if (numbers.tokens) byId("bytes-token").textContent = format.bytes(Math.round(numbers.expert_bytes_read / numbers.tokens));
    byId("disk").textContent = "idle";
  }

  /** Since the model was loaded. */
  drawTraded(numbers) {
    const uses = Math.max(1, numbers.expert_uses ?? 0);
    const row = (words, value) => el("div", {}, el("dt", {}, words), el("dd", {}, value));
    const share = (n) => (n ? `${format.count(n)} (${format.percent(n / uses)})` : "none");
    byId("traded").replaceChildren(
      row("expert uses", format.count(numbers.expert_uses ?? 0)),
      row("in low precision", share(numbers.low_uses)),
      row("skipped", share(numbers.skipped_uses)),
      row("read from disk in all", format.bytes(numbers.expert_bytes_read ?? 0)),
      row("prompt tokens reused", format.count(numbers.prefix_tokens_reused ?? 0)),
      row("conversations in memory", format.count(numbers.conversations_held ?? 1)));
  }

  draw() {
    if (!this.isShown || !this.picture) return;
    this.map.draw();
    for (const chart of Object.values(this.charts)) chart.draw();
  }
}
