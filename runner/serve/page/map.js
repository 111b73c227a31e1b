// Experts in memory: a row for each layer, a cell for each expert, the brighter the later it was used.
//
// The server sends a byte for each level of each expert: 0 on disk, else 1 (used longest ago) to 255 (just now).

import { colour, prepared } from "./chart.js";
import { byId } from "./dom.js";
import * as format from "./format.js";

const TALLEST_ROW = 18; // CSS pixels
const MOST_HEIGHT = 360;

export class ExpertMap {
  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.layers = [];
    this.pointed = null; // {row, column}
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.unpoint());
    canvas.addEventListener("blur", () => this.unpoint());
    canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** layers: their numbers in the model. nExperts: of each of them. levels: names, the best one first. */
  setShape(layers, nExperts, levels) {
    this.layers = layers;
    this.nExperts = nExperts;
    this.levels = levels;
    this.columns = Math.max(1, ...nExperts);
    this.first = [];
    let at = 0;
    for (const n of nExperts) {
      this.first.push(at);
      at += n * levels.length;
    }
    this.bytes = new Uint8Array(at);
    byId("low-legend").hidden = levels.length < 2;
  }

  setBytes(bytes) {
    if (bytes.length === this.bytes?.length) this.bytes = bytes;
  }

  /** {recency, level} of an expert; level -1: on disk. */
  state(row, column) {
    const start = this.first[row] + column * this.levels.length;
    for (let level = 0; level < this.levels.length; level += 1) {
      const recency = this.bytes[start + level];
      if (recency > 0) return { recency, level };
    }
    return { recency: 0, level: -1 };
  }

  geometry(width) {
    const rows = Math.max(1, this.layers.length);
    const cell = width / this.columns;
    return { cell, row: Math.max(2, Math.min(TALLEST_ROW, Math.max(cell, 5), MOST_HEIGHT / rows)), rows };
  }

  draw() {
    if (this.layers.length === 0 || this.canvas.clientWidth === 0) return;
    const { cell, row, rows } = this.geometry(this.canvas.clientWidth);
    const { context } = prepared(this.canvas, Math.ceil(row * rows));
    const gap = Math.min(cell, row) >= 4 ? 1 : 0.5;
    const shades = ramp(colour("--map-cold"), colour("--map-hot"));
    const empty = colour("--map-empty");
    let inMemory = 0;
    for (let at = 0; at < rows; at += 1) {
      for (let expert = 0; expert < this.nExperts[at]; expert += 1) {
        const { recency, level } = this.state(at, expert);
        const [x, y, w, h] = [expert * cell, at * row, cell - gap, row - gap];
        if (level !== 0) {
          context.fillStyle = empty;
          context.fillRect(x, y, w, h);
        }
        if (level >= 0) {
          inMemory += 1;
          context.fillStyle = shades[recency];
          const part = level === 0 ? 1 : 0.5; // low precision fills the lower half
          context.fillRect(x, y + h * (1 - part), w, h * part);
        }
      }
    }
    const total = this.nExperts.reduce((a, b) => a + b, 0);
    byId("map-count").textContent = `${format.count(inMemory)} of ${format.count(total)}`;
    this.canvas.setAttribute("aria-label",
      `Experts in memory: ${inMemory} of ${total}, in ${rows} layers. Arrow keys walk through them.`);
    this.outline(context, cell, row);
  }

  outline(context, cell, row) {
    if (this.pointed === null) return;
    context.strokeStyle = colour("--text");
    context.lineWidth = 1.5;
    context.strokeRect(this.pointed.column * cell - 0.5, this.pointed.row * row - 0.5, cell, row);
    this.writeTip();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { cell, row } = this.geometry(box.width);
    this.pointAt(Math.floor((event.clientY - box.top) / row), Math.floor((event.clientX - box.left) / cell));
  }

  pointAt(row, column) {
    if (row < 0 || row >= this.layers.length || column < 0 || column >= this.nExperts[row]) return;
    this.pointed = { row, column };
    this.draw();
  }

  unpoint() {
    this.pointed = null;
    this.tip.hidden = true;
    this.draw();
  }

  walk(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move || this.layers.length === 0) return;
    event.preventDefault();
    const from = this.pointed ?? { row: 0, column: 0 };
    this.pointAt(this.pointed ? from.row + move[0] : 0, this.pointed ? from.column + move[1] : 0);
  }

  writeTip() {
    const { row, column } = this.pointed;
    const words = `layer ${this.layers[row]}, expert ${column}: ${this.words(row, column)}`;
    if (this.tip.textContent !== words) this.tip.textContent = words;
    this.tip.hidden = false;
    const frame = this.canvas.getBoundingClientRect();
    const { cell, row: high } = this.geometry(frame.width);
    const left = Math.min(Math.max(0, column * cell - this.tip.offsetWidth / 2), frame.width - this.tip.offsetWidth);
    const above = row * high - this.tip.offsetHeight - 6;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${above < -20 ? (row + 1) * high + 6 : above}px`;
  }

  words(row, column) {
    const { recency, level } = this.state(row, column);
    if (level < 0) return "on disk";
    const precision = this.levels.length > 1 ? `in memory, ${this.levels[level]} precision` : "in memory";
    if (recency === 255) return `${precision}, used last`;
    return `${precision}, used later than ${format.percent((recency - 1) / 254)} of the others`;
  }
}

/** 256 colours from the one to the other; both are #rrggbb. */
function ramp(from, to) {
  const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [a, b] = [parts(from), parts(to)];
  return Array.from({ length: 256 }, (_, at) => {
    const share = (at / 255) ** 1.5;
    return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(" ")})`;
  });
}
