// A line over time, of the last minute or more.

const KEPT = 120; // values; a minute while a reply is written

/** A canvas at the resolution of the screen: {context, width, height} in CSS pixels. */
export function prepared(canvas, height = null) {
  const width = canvas.clientWidth;
  const high = height ?? canvas.clientHeight;
  const ratio = window.devicePixelRatio || 1;
  const [pixelsWide, pixelsHigh] = [Math.round(width * ratio), Math.round(high * ratio)];
  if (canvas.width !== pixelsWide) canvas.width = pixelsWide;
  if (canvas.height !== pixelsHigh) canvas.height = pixelsHigh;
  if (height !== null) canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, high);
  return { context, width, height: high };
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class Chart {
  /** most: the top of the scale; null: the largest value that is shown. */
  constructor(canvas, most = null) {
    this.canvas = canvas;
    this.most = most;
    this.values = [];
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
  }

  draw() {
    const { context, width, height } = prepared(this.canvas);
    if (width === 0) return;
    const foot = height - 1.5;
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, foot + 1);
    context.lineTo(width, foot + 1);
    context.stroke();
    if (this.values.length < 2) return;
    const top = this.most ?? Math.max(...this.values, 1e-9);
    const step = width / (KEPT - 1);
    const x = (at) => width - (this.values.length - 1 - at) * step;
    const y = (value) => foot - (foot - 3) * Math.min(1, value / top);
    context.beginPath();
    this.values.forEach((value, at) => (at === 0 ? context.moveTo(x(at), y(value)) : context.lineTo(x(at), y(value))));
    context.strokeStyle = colour("--accent");
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(width, foot);
    context.lineTo(x(0), foot);
    context.globalAlpha = 0.12;
    context.fillStyle = colour("--accent");
    context.fill();
    context.globalAlpha = 1;
  }
}
