// A box to try a model: streams its answer, tells which node gave it, and can be stopped.

import { ask, failure, post } from "./node.js";

const byId = (id) => document.getElementById(id);
let turns = [], stopper = null;

/** Make the box work; `nameOf` says what to call a node by its id. */
export function startChat(nameOf) {
  byId("chat").addEventListener("submit", (event) => { event.preventDefault(); chat(nameOf); });
  byId("stop").addEventListener("click", () => stopper && stopper.abort());
  byId("clear").addEventListener("click", clearChat);
  byId("prompt").addEventListener("keydown", (event) => {
    // Not the Enter that ends a word in a script whose characters take several keys.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("chat").requestSubmit();
  });
}

export function clearChat() {
  if (stopper) stopper.abort();
  turns = [];
  byId("turns").replaceChildren();
}

/** The models that one may choose from. */
export function offerModels(names) {
  byId("chat-panel").hidden = names.length === 0;
  const select = byId("model"), chosen = select.value;
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) select.value = chosen;
}

function addTurn(who) {
  const turn = byId("turn").content.firstElementChild.cloneNode(true), log = byId("turns");
  const [by, thought, text] = turn.children;
  by.textContent = who;
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return { by, thought, text };
}

async function chat(nameOf) {
  const content = byId("prompt").value.trim(), model = byId("model").value;
  if (!content || !model || stopper) return;
  const messages = turns; // another conversation may begin before this answer ends
  messages.push({ role: "user", content });
  addTurn("you").text.textContent = content;
  const shown = addTurn(`${model} …`);
  byId("prompt").value = "";
  setStopper(new AbortController());
  try {
    await hearAnswer({ model, messages, stream: true }, shown, nameOf);
  } catch (problem) {
    const stopped = problem.name === "AbortError";
    shown.by.textContent = `${model}: ${stopped ? "stopped" : problem.message}`;
    shown.by.classList.toggle("bad", !stopped);
  }
  setStopper(null);
  // What was said counts, also if it was cut off; what was not answered is as if not asked.
  if (shown.text.textContent) messages.push({ role: "assistant", content: shown.text.textContent });
  else messages.pop();
}

function setStopper(value) {
  stopper = value;
  byId("send").disabled = value !== null;
  byId("stop").hidden = value === null;
}

async function hearAnswer(body, shown, nameOf) {
  const answer = await ask("api/v1/chat", { ...post(body), signal: stopper.signal });
  const log = byId("turns"), node = answer.headers.get("X-Ollamad-Node");
  if (node) shown.by.textContent = `${body.model} on ${nameOf(node)} …`;
  for await (const text of linesOf(answer.body)) {
    const line = JSON.parse(text);
    if (line.error) throw failure(line.error);
    if (line.done) {
      shown.by.textContent = summaryOf(line, node, nameOf);
      return;
    }
    if (line.status === "queued") shown.by.textContent = `${body.model}: place ${line.position} in the queue`;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    shown.thought.append(line.message.thinking || "");
    shown.text.append(line.message.content);
    if (atEnd) log.scrollTop = log.scrollHeight; // who scrolled up reads on there
  }
  throw failure("the answer was cut off");
}

/** `first` began the answer; who had to wait is told it at the end. When nodes were lost, the last
 * one finished it. */
function summaryOf(end, first, nameOf) {
  const moves = end.failovers || [];
  const node = moves.length ? moves[moves.length - 1].to_node : end.node_id || first;
  const speed = Math.round((1e9 * end.eval_count) / Math.max(1, end.eval_duration));
  const lost = moves.length ? `, went on after ${moves.map((move) => nameOf(move.from_node)).join(", ")}` : "";
  return `${end.model} on ${nameOf(node)}${lost}: ${end.eval_count} tokens, ${speed} tokens/s`;
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    yield* lines.filter(Boolean);
  }
}
