// The dashboard: the cluster as this node sees it, live, and a box to try a model. It reads and
// chats; what changes the cluster is left to the command line. No libraries, no other hosts. Names
// of models and nodes are others' text, so texts are only ever set as text.

import { clearChat, offerModels, startChat } from "./chat.js";
import { ask, isSignedIn, signIn, signOut, socketUrl } from "./node.js";

// With the socket open only the nodes' load is asked for again; without it all is, less often. Both
// stay far below the hundred requests a minute that the daemon allows, also with two tabs.
const LIVE_MS = 5000, POLL_MS = 10000;
const SPACING_MS = 4000; // between two looks, however much happens
const FIRST_RETRY_MS = 1000, LAST_RETRY_MS = 30000;
const LONG = 24; // characters; what is longer may take several lines of a cell
const MAX_EVENTS = 100, MAX_ENDED_TRANSFERS = 8;
const CHANNELS = ["cluster", "nodes", "models", "transfers", "alerts", "queue"];
// What is shown: the address that it comes from, and the part of the answer.
const SOURCES = {
  version: ["api/v1/version"], me: ["api/v1/auth/me", "user"], cluster: ["api/v1/cluster/status"],
  nodes: ["api/v1/nodes", "nodes"], models: ["api/v1/models", "models"],
  transfers: ["api/v1/transfers", "transfers"], metrics: ["api/v1/metrics"],
};
const ALL = Object.keys(SOURCES), POLLED = ["cluster", "nodes", "models", "transfers", "metrics"];
const TONES = {
  online: "good", healthy: "good", completed: "good", info: "good", draining: "warn", degraded: "warn",
  warning: "warn", offline: "bad", unhealthy: "bad", failed: "bad", critical: "bad",
};

const seen = { at: null, nodes: [], models: [], transfers: [], queue: [], alerts: new Map() };
const stale = new Set(ALL); // what the next look asks for in any case
const byId = (id) => document.getElementById(id);

// ---- Who looks

function showSignIn() {
  if (!byId("sign-in").hidden) return;
  byId("sign-in").hidden = false;
  setText(byId("sign-in-why"), "");
  byId("password").focus();
}

function toggleSignIn() {
  if (byId("sign-in").hidden) showSignIn();
  else byId("sign-in").hidden = true;
}

async function submitSignIn(event) {
  event.preventDefault();
  try {
    await signIn(byId("username").value, byId("password").value);
    byId("password").value = "";
    byId("sign-in").hidden = true;
    startAgain();
  } catch (problem) {
    setText(byId("sign-in-why"), `That did not work: ${problem.message}.`);
    byId("password").select();
  }
}

/** Nobody, or somebody else, looks from now on: neither what was seen nor the socket is theirs. */
function forget() {
  round += 1;
  looking = false;
  Object.assign(seen, { at: null, nodes: [], models: [], transfers: [], queue: [] });
  seen.alerts.clear();
  ["events", "facts", "alerts"].forEach((id) => byId(id).replaceChildren());
  ["nodes", "models", "transfers", "queue"].forEach((id) => fill(id, []));
  offerModels([]);
  clearChat();
  closeSocket();
}

function startAgain() {
  forget();
  socketDue = lookedAt = 0;
  askAgain(...ALL);
  render();
}

// ---- Looking, again and again

let round = 0; // one for each who looks; what was asked for in an earlier one is nobody's any more
let timer = 0, due = Infinity, looking = false, lookedAt = 0, failures = 0, trouble = "";

const backOff = (times) => Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** times) * (0.75 + Math.random() / 2);

/** Look in `delayMs`, or earlier if that is planned already. */
function plan(delayMs) {
  if (Date.now() + delayMs >= due) return;
  clearTimeout(timer);
  due = Date.now() + delayMs;
  timer = setTimeout(look, delayMs);
}

function askAgain(...names) {
  names.forEach((name) => stale.add(name));
  plan(Math.max(200, lookedAt + SPACING_MS - Date.now()));
}

async function look() {
  due = Infinity;
  if (looking || document.hidden) return; // the end of the one, or of the other, plans the next
  looking = true;
  lookedAt = Date.now();
  const asked = round;
  const names = [...new Set([...(isLive() ? ["nodes"] : POLLED), ...stale])];
  stale.clear();
  try {
    await fetchSource(names[0]); // one is enough to see that the node, or the token, is no good
    await Promise.all(names.slice(1).map(fetchSource));
    if (asked !== round) return;
    seen.at = new Date();
    failures = 0;
    trouble = "";
    if (isLive()) socketFailures = 0; // it has lasted for a while
    openSocket();
    plan(isLive() ? LIVE_MS : POLL_MS);
    if (stale.size) askAgain(); // something happened meanwhile
  } catch (problem) {
    if (asked !== round) return;
    names.forEach((name) => stale.add(name));
    seeTrouble(problem);
  }
  looking = false;
  render();
}

async function fetchSource(name) {
  const [path, part] = SOURCES[name], asked = round;
  const answer = await (await ask(path)).json();
  if (asked === round) seen[name] = part ? answer[part] : answer;
}

function seeTrouble(problem) {
  trouble = "";
  if (problem.status === 401) { // looking goes on when somebody signs in
    forget();
    showSignIn();
    return;
  }
  trouble = problem.status ? `This node says: ${problem.message}.` : "The connection to this node is lost.";
  if (!problem.status) closeSocket(); // it may not have noticed yet
  plan(problem.waitMs || backOff(failures++));
}

// ---- Hearing what happens

let socket = null, socketFailures = 0, socketDue = 0;

const isLive = () => socket !== null && socket.readyState === WebSocket.OPEN;

function openSocket() {
  if (socket || Date.now() < socketDue) return;
  const opened = new WebSocket(socketUrl());
  socket = opened;
  opened.onopen = () => {
    CHANNELS.forEach((channel) => opened.send(JSON.stringify({ type: "subscribe", channel })));
    seen.alerts.clear(); // those that stand are told again
    seen.queue = [];
    askAgain(...ALL); // nobody told of what was before
  };
  opened.onmessage = (event) => { if (socket === opened) hear(JSON.parse(event.data)); };
  opened.onclose = () => {
    if (socket !== opened) return;
    socket = null;
    socketDue = Date.now() + backOff(socketFailures++);
    plan(FIRST_RETRY_MS); // a look tells what is wrong: the node, the token, or the socket alone
  };
}

function closeSocket() {
  const old = socket;
  socket = null;
  if (old) old.close();
}

function hear(message) {
  if (message.type === "cluster_status") seen.cluster = message.data;
  if (message.type === "queue_status") seen.queue = message.data.requests;
  if (message.type === "dropped") askAgain(...ALL);
  if (message.type === "alert") hearAlert(message);
  if (message.type === "node_event") {
    note(message, message.data.name || nameOf(message.node_id) || "nobody");
    askAgain("nodes", "models");
  }
  if (message.type === "model_event") hearModel(message, message.data);
  renderSoon();
}

function hearAlert(alert) {
  const key = `${alert.alert} ${alert.subject}`, raised = alert.state === "raised";
  if (raised) seen.alerts.set(key, alert);
  else seen.alerts.delete(key);
  note(alert, alert.message, raised ? alert.level : "over");
}

function hearModel(message, data) {
  const transfer = data.transfer_id && seen.transfers.find((each) => each.id === data.transfer_id);
  const { progress, speed, eta, bytes_done, bytes_total } = data;
  if (transfer) Object.assign(transfer, { progress, speed, eta, bytes_done, bytes_total });
  if (message.event_type === "download_progress") return transfer || askAgain("transfers");
  note(message, [message.model_name, nameOf(data.node_id), data.error].filter(Boolean).join(", "));
  return askAgain("nodes", "models", "transfers");
}

/** Add to the list of events: `node online: node-2`. */
function note(message, text, kind = message.event_type.replaceAll("_", " ")) {
  const item = make("li"), list = byId("events"), tone = TONES[message.level || kind.split(" ").pop()];
  item.append(make("time", clockOf(1000 * message.timestamp)), make("span", `${kind}: ${text}`, tone));
  // Alerts that stand are told again to each new socket.
  if ([...list.children].some((other) => other.textContent === item.textContent)) return;
  list.prepend(item);
  while (list.children.length > MAX_EVENTS) list.lastChild.remove();
}

// ---- Words and numbers

const clockOf = (ms) => new Date(ms).toLocaleTimeString([], { hourCycle: "h23" });
const percent = (part) => `${Math.round(100 * part)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const sum = (items, key) => items.reduce((total, item) => total + item[key], 0);

function size(bytes) {
  let unit = 0;
  for (; bytes >= 999.5 && unit < 5; unit += 1) bytes /= 1000;
  return `${bytes.toFixed(unit && bytes < 99.95 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB", "PB"][unit]}`;
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60), rest = String(Math.floor(seconds % 60)).padStart(2, "0");
  return minutes < 100 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function nameOf(id) {
  const node = seen.nodes.find((each) => each.id === id);
  return node ? node.name : id.slice(0, 12);
}

function several(names) {
  const more = names.length > 4 ? ` and ${names.length - 3} more` : "";
  return { text: (more ? names.slice(0, 3) : names).join(", ") + more || "–", title: names.join(", ") };
}

// ---- Showing

let rendering = false;

function renderSoon() {
  if (rendering) return;
  rendering = true;
  requestAnimationFrame(() => { rendering = false; render(); });
}

function make(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // a selection survives
}

function render() {
  const word = isLive() ? "live" : seen.at ? `asks every ${POLL_MS / 1000} s` : "not signed in";
  setText(byId("connection"), trouble ? "no connection" : word);
  byId("connection").className = trouble ? "bad" : isLive() ? "good" : "";
  const old = seen.at ? ` What is shown is of ${clockOf(seen.at)}.` : "";
  setText(byId("trouble"), `${trouble}${old} Trying again…`);
  byId("trouble").hidden = !trouble;
  byId("main").classList.toggle("old", trouble !== "");
  byId("main").hidden = !seen.at;
  setText(byId("who"), seen.at ? `${seen.me.username} (${seen.me.role})` : "");
  byId("sign-out").hidden = !isSignedIn();
  byId("sign-in-button").hidden = isSignedIn() || !seen.at;
  if (seen.at) [renderCluster, renderNodes, renderModels, renderTransfers, renderQueue].forEach((each) => each());
}

function renderCluster() {
  const { cluster, version } = seen;
  const facts = [
    ["Cluster", cluster.status, TONES[cluster.status]],
    ["Leader", cluster.leader_name || "none", cluster.leader ? "" : "bad"],
    ["Majority", ...(cluster.has_quorum ? ["reached"] : ["lost: nothing can be changed", "bad"])],
    ["Nodes online", `${cluster.nodes_online} of ${cluster.cluster_size}`],
    ["This node", nameOf(cluster.node_id)],
    ["Version", version.version],
    ["Cluster id", cluster.cluster_id.slice(0, 12)],
  ];
  byId("facts").replaceChildren(...facts.map(([term, text, tone]) => {
    const box = make("div");
    box.append(make("dt", term), make("dd", text, tone));
    return box;
  }));
  byId("alerts").replaceChildren(...[...seen.alerts.values()].map(
    (alert) => make("li", `${alert.level}: ${alert.message}`, TONES[alert.level])));
}

function renderNodes() {
  // Who needs help stands first; else as the node sorts them, by name.
  const rank = (node) => ["offline", "draining", "online"].indexOf(node.status);
  const nodes = [...seen.nodes].sort((a, b) => rank(a) - rank(b));
  const online = nodes.filter((node) => node.status === "online").length;
  setText(byId("nodes-note"), `${online} of ${nodes.length} online`);
  fill("nodes", nodes.map((node) => [node.id, nodeCells(node)]));
}

function nodeCells(node) {
  const { usage, capacity } = node, online = node.status !== "offline";
  // What a node that is gone last said of its load is not true any more.
  const { loaded, gpus } = online ? node : { loaded: [], gpus: [] };
  const part = (share, whole) => (online ? { text: `${percent(share)} of ${whole}`, bar: share } : "–");
  const vram = sum(gpus, "memory_total"), slots = sum(loaded, "slots"), queued = sum(loaded, "queued");
  return [
    { text: node.name, title: `${node.id}\n${node.address}\nversion ${node.version}` },
    { text: node.status, tone: TONES[node.status], title: `last seen ${node.last_seen}` },
    node.is_leader ? "leader" : node.voter ? "voter" : "member",
    part(usage.cpu_usage, plural(capacity.cpu_cores, "core")),
    part(usage.memory_usage, size(capacity.memory_bytes)),
    vram ? part(sum(gpus, "memory_used") / vram, size(vram)) : "–",
    part(usage.disk_usage, size(capacity.disk_bytes)),
    several(loaded.map((model) => model.name)),
    slots ? `${sum(loaded, "busy")} of ${slots}${queued ? `, ${queued} waiting` : ""}` : "–",
  ];
}

function renderModels() {
  const names = seen.models.map((model) => model.name);
  setText(byId("models-note"),
    names.length ? plural(names.length, "model") : "None yet: ollama-dist models pull NAME");
  fill("models", seen.models.map((model) => [model.name, modelCells(model)]));
  offerModels(names);
}

function modelCells(model) {
  const holds = (node) => node.status !== "offline" && node.loaded.some((each) => each.digest === model.digest);
  const there = model.replicas.length, wanted = model.replicas_wanted, { details } = model;
  return [
    { text: model.name, title: model.digest },
    size(model.size),
    [details.parameter_size, details.quantization_level].filter(Boolean).join(" ") || "–",
    { text: `${there} of ${wanted}`, tone: there === 0 ? "bad" : there < wanted ? "warn" : "" },
    several(model.replicas.map(nameOf)),
    several(seen.nodes.filter(holds).map((node) => node.name)),
    several(model.pinned.map(nameOf)),
  ];
}

function renderTransfers() {
  const runs = (each) => each.status === "pending" || each.status === "active";
  const ended = seen.transfers.filter((each) => !runs(each)).slice(0, MAX_ENDED_TRANSFERS);
  const shown = [...seen.transfers.filter(runs), ...ended];
  setText(byId("transfers-note"), shown.length ? "" : "None.");
  fill("transfers", shown.map((each) => [each.id, transferCells(each, runs(each))]));
}

function transferCells(each, runs) {
  const ends = [each.peer_id ? nameOf(each.peer_id) : "origin", nameOf(each.node_id)];
  return [
    each.model_name,
    ...(each.type === "upload" ? [ends[1], "registry"] : ends),
    { text: [each.status, each.error || each.warning].filter(Boolean).join(": "),
      tone: each.warning ? "warn" : TONES[each.status] },
    { text: `${Math.floor(each.progress)} %${each.bytes_total ? ` of ${size(each.bytes_total)}` : ""}`,
      bar: runs ? each.progress / 100 : undefined },
    each.speed ? `${size(each.speed)}/s` : "–",
    runs && each.eta !== null ? duration(each.eta) : "–",
  ];
}

function renderQueue() {
  const loaded = seen.nodes.filter((node) => node.status !== "offline").flatMap((node) => node.loaded);
  const waiting = isLive() ? seen.queue.length : seen.metrics.scheduler_stats.queued_requests;
  setText(byId("queue-note"), `${sum(loaded, "busy")} running in the cluster, ${waiting} waiting at this node`);
  fill("queue", (isLive() ? seen.queue : []).map((each, at) => [String(at), [
    String(each.position), each.model, duration(each.waited_seconds), duration(each.estimate_seconds),
  ]]));
}

/** Make the rows of a table these, each [key, cells]. Rows that stay are kept, so that selecting
 * and scrolling go on while numbers change. */
function fill(id, rows) {
  const table = byId(id), body = table.tBodies[0];
  const labels = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach(([key, cells], at) => {
    const row = old.get(key) || newRow(key, labels);
    old.delete(key);
    if (body.rows[at] !== row) body.insertBefore(row, body.rows[at] || null);
    cells.forEach((cell, column) => setCell(row.cells[column], cell));
  });
  old.forEach((row) => row.remove());
  table.parentElement.hidden = rows.length === 0;
}

function newRow(key, labels) {
  const row = make("tr");
  row.dataset.key = key;
  for (const label of labels) {
    const cell = row.insertCell(), bar = make("progress");
    cell.dataset.label = label; // narrow screens show it beside the value
    bar.setAttribute("aria-label", label);
    cell.append(bar, make("span"));
  }
  return row;
}

/** A cell is a text, or has also a `title`, a `tone` and a `bar` from 0 to 1. */
function setCell(element, cell) {
  const { text, title = "", tone = "", bar } = typeof cell === "string" ? { text: cell } : cell;
  const [progress, span] = element.children;
  progress.hidden = bar === undefined;
  progress.value = bar || 0;
  setText(span, text);
  Object.assign(span, { title, className: text.length > LONG ? `${tone} long` : tone });
}

// ---- Beginning

byId("sign-in").addEventListener("submit", submitSignIn);
byId("sign-in-button").addEventListener("click", toggleSignIn);
byId("sign-out").addEventListener("click", () => signOut().then(startAgain));
document.addEventListener("visibilitychange", () => plan(0));
startChat(nameOf);
plan(0);
