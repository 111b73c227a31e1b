// One conversation as it is seen. It draws what it is given and calls back; it changes nothing.

import { copyText, el, icon, iconButton } from "./dom.js";
import * as format from "./format.js";
import { renderMarkdown } from "./markdown.js";

const REDRAW_MS = 60; // between two drawings of a reply that grows

export class Thread {
  /** on: {retry(), edit(text)}, both for the last question. */
  constructor(container, scroller, on) {
    this.container = container;
    this.scroller = scroller;
    this.on = on;
    this.views = [];
  }

  /** Draw all of it. */
  show(conversation) {
    this.views.forEach((view) => view.close());
    const { messages } = conversation;
    const lastQuestion = messages.findLastIndex((message) => message.role === "user");
    this.views = messages.map((message, at) =>
      message.role === "user"
        ? new QuestionView(message, at === lastQuestion ? this.on : null)
        : new ReplyView(message, at === messages.length - 1 ? this.on : null, () => this.follow()));
    this.container.replaceChildren(...this.views.map((view) => view.node));
    this.toEnd();
  }

  /** The last message has grown, or ended. */
  update(message) {
    this.views.find((view) => view.message === message)?.update();
  }

  get isAtEnd() {
    const s = this.scroller;
    return s.scrollHeight - s.scrollTop - s.clientHeight < 48;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.following = true;
  }

  /** Stay at the end, unless the reader has scrolled away. */
  follow() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

class QuestionView {
  constructor(message, on) {
    this.message = message;
    this.on = on;
    this.node = el("article", { class: "message user", "aria-label": "You" });
    this.draw();
  }

  draw() {
    const actions = this.on && el("div", { class: "actions" }, copyButton(() => this.message.content),
      iconButton("edit", "Edit and ask again", () => this.edit(), { class: "icon-button edit" }));
    this.node.replaceChildren(el("div", { class: "question" }, this.message.content), ...(actions ? [actions] : []));
  }

  edit() {
    const input = el("textarea", { "aria-label": "Your message", rows: 2 });
    const ask = () => {
      const text = input.value.trim();
      if (text) this.on.edit(text);
    };
    const leave = () => {
      this.draw();
      this.node.querySelector(".edit").focus();
    };
    input.value = this.message.content;
    input.addEventListener("input", () => fit(input));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        ask();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      }
    });
    this.node.replaceChildren(el("div", { class: "editor" }, input, el("div", { class: "buttons" },
      el("button", { type: "button", onclick: leave }, "Cancel"),
      el("button", { type: "button", class: "primary", onclick: ask }, "Ask again"))));
    fit(input);
    input.focus();
  }

  update() {}
  close() {}
}

/** A text field as high as its text. */
export function fit(input) {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

class ReplyView {
  constructor(message, on, grown) {
    this.message = message;
    this.on = on;
    this.grown = grown;
    this.timer = null;
    this.thoughts = el("div", { class: "thoughts" });
    this.summary = el("summary", {}, "Thinking");
    this.thinking = el("details", { class: "thinking", hidden: true, ontoggle: () => this.drawThoughts() }, this.summary,
      this.thoughts);
    this.waiting = el("p", { class: "waiting", hidden: true }, "Evaluating the prompt");
    this.markdown = el("div", { class: "markdown" });
    this.end = el("div", {});
    this.node = el("article", { class: "message assistant", "aria-label": "Reply" }, this.thinking, this.waiting, this.markdown,
      this.end);
    this.draw();
  }

  /** Soon, and not for every token. */
  update() {
    if (!this.message.pending) {
      clearTimeout(this.timer);
      this.timer = null;
      this.draw();
    } else if (this.timer === null) {
      this.timer = setTimeout(() => {
        this.timer = null;
        this.draw();
      }, REDRAW_MS);
    }
  }

  close() {
    clearTimeout(this.timer);
  }

  draw() {
    const { content, reasoning, pending } = this.message;
    this.node.classList.toggle("writing", Boolean(pending));
    this.node.setAttribute("aria-busy", String(Boolean(pending)));
    this.waiting.hidden = !pending || Boolean(content || reasoning);
    this.thinking.hidden = !reasoning;
    if (reasoning) {
      const isOver = Boolean(content) || !pending;
      this.thinking.classList.toggle("done", isOver);
      this.summary.textContent = isOver ? "Thought before it answered" : "Thinking";
      this.drawThoughts();
    }
    renderMarkdown(this.markdown, content);
    this.end.replaceChildren(...(pending ? [] : [this.notice(), this.foot()].filter(Boolean)));
    this.grown();
  }

  drawThoughts() {
    const text = (this.message.reasoning ?? "").trim();
    if (this.thinking.open && this.thoughts.textContent !== text) this.thoughts.textContent = text;
  }

  notice() {
    const { error, stopped, cut } = this.message;
    const words = error ?? (stopped ? "Stopped." : cut ? "The reply ends here because it has as many tokens as it may have." : null);
    if (words === null) return null;
    const retry = this.on && error && el("button", { type: "button", onclick: () => this.on.retry() }, "Retry");
    return el("div", { class: error ? "notice failed" : "notice", role: error ? "alert" : null }, el("span", {}, words), retry || null);
  }

  foot() {
    const { stats, content } = this.message;
    const actions = el("div", { class: "actions" });
    if (content) actions.append(copyButton(() => this.message.content));
    if (this.on) actions.append(iconButton("retry", "Answer again", () => this.on.retry(), { class: "icon-button retry" }));
    return el("div", { class: "foot" }, el("div", { class: "stats" }, ...statsNodes(stats)), actions);
  }
}

function copyButton(text) {
  const button = iconButton("copy", "Copy", async () => {
    const words = (await copyText(text())) ? "Copied" : "The browser does not allow it";
    button.title = words;
    button.setAttribute("aria-label", words);
    button.replaceChildren(words === "Copied" ? el("span", { "aria-hidden": "true" }, "✓") : icon("close"));
    setTimeout(() => {
      button.title = "Copy";
      button.setAttribute("aria-label", "Copy");
      button.replaceChildren(icon("copy"));
    }, 1500);
  });
  return button;
}

/** What a reply took, and what was traded for it. */
function statsNodes(stats) {
  if (!stats) return [];
  const figure = (value, words) => el("span", {}, el("b", {}, value), ` ${words}`);
  const nodes = [];
  if (stats.tokensPerSecond > 0) nodes.push(figure(format.figures(stats.tokensPerSecond), "tokens/s"));
  if (stats.ttft !== null) nodes.push(figure(format.seconds(stats.ttft), "to the first token"));
  const traded = stats.traded;
  if (traded) {
    if (traded.expert_uses > 0) nodes.push(figure(format.percent(traded.expert_hit_rate), "hits"));
    nodes.push(figure(format.bytes(traded.expert_bytes_read), "read"), ...tradedNodes(traded, figure));
  }
  return nodes;
}

function tradedNodes(traded, figure) {
  const isTraded = traded.low_uses > 0 || traded.skipped_uses > 0;
  if (!isTraded) return [el("span", {}, traded.policy === "exact" ? "exact" : `${traded.policy}, nothing traded`)];
  const share = (n) => format.percent(n / Math.max(1, traded.expert_uses));
  const nodes = [];
  if (traded.low_uses > 0) nodes.push(figure(share(traded.low_uses), "in low precision"));
  if (traded.skipped_uses > 0) nodes.push(figure(share(traded.skipped_uses), "skipped"));
  const kld = traded.expected_kld_per_token;
  nodes.push(typeof kld === "number" ? figure(kld.toPrecision(2), "nats/token expected") : el("span", {}, "damage not measured"));
  nodes.push(el("span", {}, traded.policy));
  return nodes;
}
