// Asking this node, with the token of who signed in; one that is over is renewed.

const TIMEOUT_MS = 10000; // a node that takes longer is as good as gone
const KEPT = "ollamad-session"; // the key in this tab's storage
const KEPT_MS = 60000; // a reload takes less; whom a closed tab is opened for again may be another

let session = {}; // token and refresh_token; empty while nobody signed in

export const post = (body) => ({ method: "POST", body: JSON.stringify(body) });
export const failure = (message, more) => Object.assign(new Error(message), more);
export const isSignedIn = () => Boolean(session.token);

/** A good answer. Else an error, which has `status` and `waitMs` if there was an answer at all. */
export async function ask(path, options) {
  const used = session;
  const answer = await send(path, options);
  if (answer.status !== 401 || !session.token) return checked(answer);
  if (session === used) await renew();
  return checked(await send(path, options));
}

async function send(path, options = {}) {
  const headers = {};
  if (options.body) headers["Content-Type"] = "application/json";
  if (session.token) headers.Authorization = `Bearer ${session.token}`;
  const signal = options.signal || AbortSignal.timeout(TIMEOUT_MS);
  try {
    return await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem; // it was stopped on purpose
    throw failure("it does not answer");
  }
}

async function checked(answer) {
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  const waitMs = 1000 * (Number(answer.headers.get("Retry-After")) || 0);
  throw failure(error || `the answer has the status ${answer.status}`, { status: answer.status, waitMs });
}

/** The address of the node's WebSocket, with the token in it: a page can send no header there. */
export function socketUrl() {
  const url = new URL("ws", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  if (session.token) url.searchParams.set("token", session.token);
  return url;
}

// Sessions

export const signIn = (username, password) => enter("api/v1/auth/login", { username, password });

/** End the session; if the node cannot be told, it ends by itself later. */
export async function signOut() {
  await ask("api/v1/auth/logout", { method: "POST" }).catch(() => {});
  session = {};
}

async function enter(path, body) {
  const { token, refresh_token } = await (await checked(await send(path, post(body)))).json();
  session = { token, refresh_token };
}

let renewal = null;

/** A refresh token is good for one use: who comes while it is being spent waits for the new one. */
function renew() {
  const { refresh_token } = session;
  renewal ??= enter("api/v1/auth/refresh", { refresh_token }).catch((problem) => {
    if (problem.status !== 401) throw problem;
    session = {}; // it is over; on the node's own host one may still look
  }).finally(() => { renewal = null; });
  return renewal;
}

// Tokens lie in the tab's storage only while the page is loaded again: a copied tab would else have
// the same refresh token, and one that is spent twice ends the session. The page may also be closing:
// a browser that opens the tab again later gives its storage back. Storage may be forbidden.

function keepSession() {
  try {
    if (session.token) sessionStorage.setItem(KEPT, JSON.stringify({ session, at: Date.now() }));
  } catch { /* then a reload asks for the password */ }
}

function takeSession() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    sessionStorage.removeItem(KEPT);
    if (kept && Date.now() - kept.at < KEPT_MS) session = kept.session;
  } catch { /* as above */ }
}

addEventListener("pagehide", keepSession);
addEventListener("pageshow", takeSession);
takeSession();
