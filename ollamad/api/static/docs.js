// Shows the OpenAPI document of this node. No libraries, no other hosts; texts are only ever set
// as text.
"use strict";

const METHODS = ["get", "head", "post", "put", "patch", "delete"];
const byId = (id) => document.getElementById(id);
let api = null;

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text !== null && text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function inline(text) {
  // `code` is the only markup inside a line.
  return text.split("`").map((part, at) => (at % 2 ? make("code", part) : part));
}

function prose(text) {
  const out = document.createDocumentFragment();
  for (const block of text.trim().split(/\n\s*\n/)) {
    const lines = block.split("\n");
    if (lines[0].startsWith("# ")) {
      out.append(make("h2", lines[0].slice(2)));
    } else if (lines[0].startsWith("|")) {
      const rows = lines.filter((line) => !/^\|[\s|:-]+\|$/.test(line));
      const table = make("table");
      rows.forEach((line, at) => {
        const row = make("tr");
        for (const cell of line.split("|").slice(1, -1)) {
          const box = make(at ? "td" : "th");
          box.append(...inline(cell.trim()));
          row.append(box);
        }
        table.append(row);
      });
      out.append(wide(table));
    } else {
      const paragraph = make("p");
      paragraph.append(...inline(block.replace(/\n/g, " ")));
      out.append(paragraph);
    }
  }
  return out;
}

function wide(table) {
  // Scrolls by itself where the window is narrow.
  return Object.assign(make("div", null, table), { className: "wide" });
}

function resolve(node) {
  while (node && node.$ref) {
    node = node.$ref.slice(2).split("/").reduce((at, key) => at[key], api);
  }
  return node;
}

function nameOf(schema) {
  if (!schema) return "anything";
  if (schema.$ref) return schema.$ref.split("/").pop().split(".").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.map(nameOf).join(" | ");
  if (schema.type === "array") return `list of ${nameOf(schema.items)}`;
  if (schema.type === "object" && schema.additionalProperties) {
    return `object of ${nameOf(schema.additionalProperties)}`;
  }
  return schema.format || schema.type || "anything";
}

function referencesOf(schema) {
  if (!schema) return [];
  if (schema.$ref) return [schema];
  const inner = [...(schema.anyOf || schema.oneOf || [])];
  if (schema.items) inner.push(schema.items);
  if (typeof schema.additionalProperties === "object") inner.push(schema.additionalProperties);
  return inner.flatMap(referencesOf);
}

function shape(schema, seen = []) {
  const out = document.createDocumentFragment();
  const whole = resolve(schema);
  if (!whole || !whole.properties) {
    out.append(make("p", nameOf(schema)));
    return out;
  }
  if (whole.description) out.append(prose(whole.description));
  const table = make("table");
  const required = new Set(whole.required || []);
  const nested = [];
  for (const [key, value] of Object.entries(whole.properties)) {
    const extra = value.default !== undefined && value.default !== null
      ? `default ${JSON.stringify(value.default)}` : required.has(key) ? "required" : "";
    table.append(make("tr", null, make("td", null, make("code", key)),
      make("td", nameOf(value)), make("td", extra)));
    nested.push(...referencesOf(value));
  }
  out.append(wide(table));
  for (const reference of nested) {
    if (seen.includes(reference.$ref)) continue;
    const target = resolve(reference);
    if (!target.properties) continue;
    seen = [...seen, reference.$ref];
    const details = make("details", null, make("summary", nameOf(reference)));
    const known = seen;
    details.addEventListener("toggle", () => details.append(shape(reference, known)), { once: true });
    out.append(details);
  }
  return out;
}

function json(value) {
  return make("pre", null, make("code", JSON.stringify(value, null, 2)));
}

function curl(method, path, operation) {
  const parameters = (operation.parameters || []).filter((each) => each.in === "path");
  const filled = parameters.reduce((text, each) =>
    text.replace(`{${each.name}}`, encodeURIComponent(each.example || each.name)), path);
  const how = { get: "", head: "-I " }[method] ?? `-X ${method.toUpperCase()} `;
  const parts = [`curl ${how}${location.origin}${filled}`];
  if (operation.security.length) parts.push('-H "Authorization: Bearer $TOKEN"');
  const content = operation.requestBody ? operation.requestBody.content : {};
  const body = content["application/json"];
  if (content["application/octet-stream"]) parts.push("--data-binary @FILE");
  if (body && body.example) {
    parts.push("-H 'Content-Type: application/json'");
    parts.push(`-d '${JSON.stringify(body.example).replace(/'/g, "'\\''")}'`);
  }
  return make("pre", null, make("code", parts.join(" \\\n  ")));
}

function operationOf(method, path, operation) {
  const article = make("article");
  article.id = operation.operationId;
  const role = operation["x-role"];
  article.append(
    Object.assign(make("span", role === "none" ? "no token" : role), { className: "role" }),
    make("h3", null, Object.assign(make("span", method.toUpperCase()), { className: "method" }), " ", path),
    make("p", null, make("strong", operation.summary)),
    prose(operation.description || ""));
  if ((operation.parameters || []).length) {
    const table = make("table");
    for (const each of operation.parameters) {
      const text = make("td");
      text.append(...inline(each.description || ""));
      table.append(make("tr", null, make("td", null, make("code", each.name)), make("td", each.in),
        make("td", nameOf(each.schema)), text));
    }
    article.append(wide(table));
  }
  article.append(curl(method, path, operation));
  for (const [type, media] of Object.entries((operation.requestBody || { content: {} }).content)) {
    const details = make("details", null, make("summary", `Body: ${type}`));
    details.addEventListener("toggle", () => details.append(shape(media.schema)), { once: true });
    article.append(details);
  }
  for (const [status, reference] of Object.entries(operation.responses)) {
    const answer = resolve(reference);
    const details = make("details", null,
      make("summary", null, `${status} `, ...inline(answer.description)));
    details.addEventListener("toggle", () => {
      for (const [type, media] of Object.entries(answer.content || {})) {
        const parts = media["x-item-schema"];
        details.append(Object.assign(make("p", type), { className: "type" }));
        if (parts) {
          details.append(make("p", "A stream, of which each line or event is one of:"));
          for (const part of parts.anyOf) {
            details.append(make("h4", nameOf(part)), shape(part));
          }
        } else {
          details.append(shape(media.schema));
        }
        if (media.example !== undefined) details.append(json(media.example));
      }
    }, { once: true });
    article.append(details);
  }
  return article;
}

function show() {
  const main = byId("main"), list = byId("list");
  main.replaceChildren(make("h1", `${api.info.title} ${api.info.version}`), prose(api.info.description));
  list.replaceChildren();
  for (const tag of api.tags) {
    const section = make("section", null, make("h2", tag.name), prose(tag.description));
    const group = make("div", null, make("h2", tag.name));
    for (const [path, item] of Object.entries(api.paths)) {
      for (const method of METHODS) {
        const operation = item[method];
        if (!operation || operation.tags[0] !== tag.name) continue;
        section.append(operationOf(method, path, operation));
        const link = make("a", null,
          Object.assign(make("span", method.toUpperCase()), { className: "method" }),
          path.replace("/api/v1", ""));
        link.href = `#${operation.operationId}`;
        link.title = operation.summary;
        link.dataset.words = `${method} ${path} ${operation.summary}`.toLowerCase();
        group.append(link);
      }
    }
    main.append(section);
    list.append(group);
  }
  if (location.hash) {
    const target = byId(location.hash.slice(1));
    if (target) target.scrollIntoView();
  }
}

async function load(token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch("openapi.json", { headers });
  } catch (problem) {
    byId("state").textContent = `This node does not answer: ${problem.message}`;
    return;
  }
  if (answer.status === 401 || answer.status === 403) {
    byId("sign-in").hidden = false;
    byId("state").textContent = token ? "This token is not good." : "";
    return;
  }
  if (!answer.ok) {
    byId("state").textContent = `The node answered with status ${answer.status}.`;
    return;
  }
  api = await answer.json();
  show();
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  load(byId("token").value.trim());
});
byId("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const link of byId("list").querySelectorAll("a")) {
    link.hidden = !words.every((word) => link.dataset.words.includes(word));
    link.style.display = link.hidden ? "none" : "";
  }
});
load("");
