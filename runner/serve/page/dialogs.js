// Questions to the reader, and the settings.

import { getKey, setKey } from "./api.js";
import { byId } from "./dom.js";

/**
 * Ask in a dialog. value: a text to change, which is returned; without one, true. Cancelled: null.
 * secret: the text is not shown while it is typed.
 */
export function ask({ title, text = "", yes, value, secret = false }) {
  const dialog = byId("question");
  const input = byId("question-value");
  byId("question-title").textContent = title;
  byId("question-text").textContent = text;
  byId("question-yes").textContent = yes;
  input.hidden = value === undefined;
  input.type = secret ? "password" : "text";
  input.value = value ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  if (input.hidden) byId("question-yes").focus();
  else input.select();
  byId("question-no").onclick = () => dialog.close("");
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const said = dialog.returnValue === "yes";
      resolve(said ? (value === undefined ? true : input.value) : null);
    }, { once: true });
  });
}

/** The settings dialog. changed(settings, system): called when it closes. facts: of the model, or null. */
export function openSettings({ settings, system, facts, needsKey, changed }) {
  const dialog = byId("settings");
  const radio = (name, value) => dialog.querySelector(`input[name="${name}"][value="${value}"]`);
  byId("system").value = system;
  byId("temperature").value = settings.temperature ?? "";
  const usual = facts?.sampling?.temperature;
  byId("temperature").placeholder = typeof usual === "number" ? `${Number(usual.toFixed(2))} (usual)` : "the server’s";
  byId("max-tokens").value = settings.maxTokens ?? "";
  radio("think", settings.think).checked = true;
  byId("think-row").hidden = facts !== null && !facts.capabilities.includes("thinking") && settings.think === "auto";
  radio("theme", window.moeEdgeTheme.choice).checked = true;
  byId("key-row").hidden = !needsKey;
  byId("key").value = getKey() ?? "";
  for (const each of dialog.querySelectorAll('input[name="theme"]')) {
    each.onchange = () => window.moeEdgeTheme.set(each.value);
  }
  dialog.showModal();
  dialog.addEventListener("close", () => {
    if (needsKey) setKey(byId("key").value.trim());
    changed({
      temperature: numberIn("temperature", 0, 100),
      maxTokens: wholeIn("max-tokens"),
      think: dialog.querySelector('input[name="think"]:checked').value,
    }, byId("system").value);
  }, { once: true });
}

function numberIn(id, least, most) {
  const text = byId(id).value.trim();
  const value = Number(text);
  return text === "" || !Number.isFinite(value) ? null : Math.min(most, Math.max(least, value));
}

function wholeIn(id) {
  const value = numberIn(id, 1, 2 ** 31 - 1);
  return value === null ? null : Math.round(value);
}
