// Choose models, give them an input, watch the text come. Speaks to the server's own interface and to nothing else.

const $ = (id) => document.getElementById(id);
const E2E = ["name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"];
const LISTED = 50;

let base = null;
let running = null; // what stops the texts that are being written

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path) {
  const reply = await fetch(path, { headers: headers() });
  const content = await reply.json();
  if (!reply.ok) throw new Error(content.error.message);
  return content;
}

function make(tag, content = "", properties = {}) {
  const made = document.createElement(tag);
  made.append(content);
  return Object.assign(made, properties);
}

// ---- models

class Chooser {
  constructor(place, letter) {
    const made = $("chooser").content.cloneNode(true);
    this.box = made.querySelector(".chooser");
    this.legend = made.querySelector("legend");
    this.search = made.querySelector(".search");
    this.tags = made.querySelector(".tags");
    this.list = made.querySelector(".list");
    this.more = made.querySelector(".more");
    this.card = made.querySelector(".card");
    this.letter = letter;
    this.tag = "";
    this.model = null;
    this.known = new Set();
    place.append(made);
    let soon;
    this.search.addEventListener("input", () => {
      clearTimeout(soon);
      soon = setTimeout(() => this.refresh(), 200);
    });
  }

  async refresh() {
    const wanted = new URLSearchParams({ limit: LISTED, search: this.search.value, tag: this.tag });
    const asked = (this.asked = {});
    let found;
    try {
      found = await ask(`/v1/models?${wanted}`);
    } catch (error) {
      this.list.replaceChildren(make("p", error.message));
      return;
    }
    if (asked !== this.asked) return; // somebody typed on
    this.showTags(found.data);
    this.list.replaceChildren(...found.data.map((model) => this.line(model)));
    if (!found.data.length) this.list.append(make("p", "Nothing of that name or tag."));
    this.more.hidden = !found.has_more;
    this.more.textContent = `The first ${LISTED}; search for others.`;
    if (!this.model && found.data.length) {
      const first = found.data[this.letter === "B" && found.data.length > 1 ? 1 : 0];
      await this.choose(first.id);
      for (const input of this.list.querySelectorAll("input")) input.checked = input.value === first.id;
    }
  }

  line(model) {
    const input = make("input", "", { type: "radio", name: `model-${this.letter}`, value: model.id });
    input.checked = this.model !== null && this.model.id === model.id;
    input.addEventListener("change", () => this.choose(model.id));
    const told = model.antefix;
    const label = make("label", input);
    label.append(make("span", told ? told.name : model.id));
    const slots = told && told.num_virtual_tokens ? `${told.num_virtual_tokens} slots` : "";
    label.append(make("small", told ? slots : "base"));
    return label;
  }

  showTags(models) {
    for (const model of models) for (const tag of model.antefix?.tags ?? []) this.known.add(tag);
    const shown = [...this.known].sort().slice(0, 12);
    this.tags.replaceChildren(
      ...shown.map((tag) => {
        const button = make("button", tag, { type: "button" });
        button.setAttribute("aria-pressed", String(tag === this.tag));
        button.addEventListener("click", async () => {
          this.tag = this.tag === tag ? "" : tag;
          await this.refresh();
          [...this.tags.children].find((other) => other.textContent === tag)?.focus();
        });
        return button;
      }),
    );
  }

  async choose(id) {
    if (await this.look(id)) modelChanged(this);
  }

  // Whether it is still the one that is wanted when its answer has come; without an answer there is no model.
  async look(id) {
    this.wanted = id;
    const path = `/v1/models/${id.split("/").map(encodeURIComponent).join("/")}`;
    const found = await ask(path).catch((error) => ({ problem: error.message }));
    if (id !== this.wanted) return false; // somebody chose on
    this.model = found.problem ? null : found;
    this.showCard(found.problem);
    return true;
  }

  showCard(problem) {
    const card = this.model?.antefix?.card;
    let lines = [["problem", problem]];
    if (card) lines = linesOf(card, this.model.antefix);
    else if (this.model) lines = [["base", this.model.id], ["prefix", "none: the frozen model itself"]];
    const shown = lines.filter(([, value]) => value);
    this.card.querySelector("dl").replaceChildren(...shown.flatMap(([key, value]) => [make("dt", key), make("dd", value)]));
  }

  get name() {
    return this.model?.antefix?.name ?? this.model?.id ?? "";
  }

  get format() {
    return this.model?.antefix?.card?.text_format ?? {};
  }
}

function linesOf(card, told) {
  const short = (value) => (typeof value === "number" ? String(Math.round(value * 10000) / 10000) : JSON.stringify(value));
  const last = (value) => (Array.isArray(value) ? value.at(-1) : value);
  const scores = Object.entries(card.scores).map(([name, value]) => {
    const found = last(value);
    const parts = found && typeof found === "object" ? Object.entries(found).map(([key, one]) => `${key} ${short(one)}`) : [short(found)];
    return `${name}: ${parts.slice(0, 6).join(", ")}`;
  });
  const training = Object.entries(card.training).filter(([, value]) => ["string", "number"].includes(typeof value));
  return [
    ["notes", card.notes],
    ["method", card.method],
    ["slots", told.num_virtual_tokens ? String(told.num_virtual_tokens) : ""],
    ["reads", card.text_format.chat ? "conversations" : (card.text_format.linearise ?? "")],
    ["tags", card.tags.join(", ")],
    ["scores", scores.join("; ")],
    ["trained on", training.slice(0, 6).map(([key, value]) => `${key} ${value}`).join(", ")],
    ["parents", card.parents.join(", ")],
    ["licence", card.licence],
    ["in memory", told.resident ? "yes" : "not yet; read when asked for"],
  ];
}

const choosers = [new Chooser($("choosers"), "A"), new Chooser($("choosers"), "B")];
const chosen = () => choosers.slice(0, $("compare").checked ? 2 : 1);

function showCompare() {
  const two = $("compare").checked;
  document.querySelector("main").classList.toggle("two", two);
  choosers[1].box.hidden = !two;
  choosers[0].legend.textContent = two ? "First" : "Base or prefix";
  choosers[1].legend.textContent = "Second";
  showOutputs();
}

function modelChanged(chooser) {
  const reads = chooser.format.linearise;
  if (chooser === choosers[0] && reads) {
    const isTable = ["e2e", "table"].includes(reads);
    setKind(isTable ? "table" : "text");
    $("text-label").textContent = ["webnlg", "dart", "triples"].includes(reads) ? "Triples: subject : relation : object | …" : "Text";
    if (isTable && tableIsUntouched()) fillRows(reads === "e2e" ? E2E : ["name", "", ""]);
  }
  showOutputs();
}

// ---- the input

const kind = () => document.querySelector("input[name=kind]:checked").value;

function setKind(value) {
  document.querySelector(`input[name=kind][value=${value}]`).checked = true;
  showKind();
}

function showKind() {
  $("table-input").hidden = kind() !== "table";
  $("text-input").hidden = kind() !== "text";
  showCurl();
}

function addRow(field = "", value = "") {
  const row = make("div", "", { className: "row" });
  const number = () => [...$("rows").children].indexOf(row) + 1;
  const name = make("input", "", { value: field, className: "field" });
  const content = make("input", "", { value, className: "value" });
  const remove = make("button", "×", { type: "button" });
  row.append(name, content, remove);
  $("rows").append(row);
  name.setAttribute("aria-label", `Field ${number()}`);
  content.setAttribute("aria-label", field ? `Value of ${field}` : `Value ${number()}`);
  remove.setAttribute("aria-label", `Remove field ${number()}`);
  remove.addEventListener("click", () => {
    row.remove();
    $("add").focus();
    showCurl();
  });
  return name;
}

function fillRows(fields) {
  $("rows").replaceChildren();
  for (const field of fields) addRow(field);
}

const tableIsUntouched = () => [...document.querySelectorAll(".value")].every((input) => !input.value);

function table() {
  const rows = [...$("rows").children].map((row) => [row.querySelector(".field").value.trim(), row.querySelector(".value").value.trim()]);
  return rows.filter(([field, value]) => field && value);
}

// ---- requests

function request(chooser) {
  const body = { model: chooser.model?.id ?? "", stream: true, stream_options: { include_usage: true } };
  for (const [name, id] of [["max_tokens", "max-tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if ($(id).value !== "") body[name] = Number($(id).value);
  }
  if (kind() === "table") return ["/v1/tables", { ...body, table: table() }];
  const text = $("text").value;
  if (chooser.model?.parent) return ["/v1/tables", { ...body, table: text }];
  body.max_tokens ??= 128;
  if ($("chat").checked) return ["/v1/chat/completions", { ...body, messages: [{ role: "user", content: text }] }];
  return ["/v1/completions", { ...body, prompt: text }];
}

function curl(chooser) {
  const [path, { stream_options, stream, ...body }] = request(chooser);
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = $("key").value.trim() ? ` \\\n  -H "Authorization: Bearer $ANTEFIX_KEY"` : "";
  return `curl ${location.origin}${path} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

function showCurl() {
  $("curl").textContent = chosen().map(curl).join("\n\n");
}

async function copyCurl() {
  showCurl();
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    say("copied");
  } catch {
    // Without a secure address the browser keeps the clipboard to itself: the line is shown, and marked.
    $("curl-box").open = true;
    getSelection().selectAllChildren($("curl"));
    say("marked: copy it with the keyboard");
  }
}

function say(text) {
  $("said").textContent = text;
  setTimeout(() => ($("said").textContent = ""), 4000);
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function write(chooser, output, signal) {
  const written = output.querySelector(".written");
  const figures = output.querySelector(".figures");
  output.querySelector("h3").textContent = chooser.name;
  written.className = "written busy";
  written.textContent = figures.textContent = "";
  const start = performance.now();
  let first = null;
  let reason = "";
  try {
    const [path, body] = request(chooser);
    const sent = { method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers() } };
    const reply = await fetch(path, sent);
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    const left = reply.headers.get("X-Antefix-Not-Applied");
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        const text = choice.text ?? choice.delta?.content ?? "";
        if (text) first ??= performance.now() - start;
        written.append(text);
        reason = choice.finish_reason ?? reason;
      }
      if (event.usage) figures.textContent = figuresOf(event.usage, start, first, reason, left);
    }
  } catch (error) {
    if (error.name === "AbortError") figures.textContent = "stopped";
    else {
      written.classList.add("bad");
      written.append(written.textContent ? ` [${error.message}]` : error.message);
    }
  } finally {
    written.classList.remove("busy");
  }
}

function figuresOf(usage, start, first, reason, left) {
  const seconds = (performance.now() - start) / 1000;
  const parts = [
    `${usage.prompt_tokens} tokens read`,
    `${usage.prompt_tokens_details.prefix_tokens} slots`,
    `${usage.completion_tokens} written`,
    `first after ${Math.round(first ?? 0)} ms`,
    `${(usage.completion_tokens / seconds).toFixed(1)}/s`,
    reason === "length" ? "cut at the most tokens" : "",
    left ? `without the card's ${left}` : "",
  ];
  return parts.filter(Boolean).join(" · ");
}

function showOutputs() {
  const outputs = [...$("outputs").children];
  chosen().forEach((chooser, place) => {
    const output = outputs[place] ?? $("outputs").appendChild($("output").content.cloneNode(true).firstElementChild);
    const written = output.querySelector(".written");
    if (!written.textContent && !written.classList.contains("busy")) {
      written.className = "written empty";
      written.textContent = "Nothing written yet.";
    }
    // A text keeps the name of who wrote it.
    if (written.classList.contains("empty")) output.querySelector("h3").textContent = chooser.name;
  });
  outputs.slice(chosen().length).forEach((output) => output.remove());
  $("as-chat").hidden = chosen().every((chooser) => chooser.model?.parent);
  showCurl();
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  $("write").disabled = true;
  $("stop").disabled = false;
  showOutputs();
  const outputs = [...$("outputs").children];
  await Promise.all(chosen().map((chooser, place) => write(chooser, outputs[place], running.signal)));
  running = null;
  $("write").disabled = false;
  $("stop").disabled = true;
  for (const chooser of chosen()) if (chooser.model) chooser.look(chooser.wanted); // it is in memory now
}

// ---- the server

async function lookAtHealth() {
  let text = "no answer";
  let ok = false;
  try {
    const reply = await fetch("/health");
    const found = await reply.json();
    ok = reply.ok;
    text = ok ? "● ready" : `engine ${found.engine}`;
  } catch {
    // The text says it.
  }
  $("health").textContent = text;
  $("health").classList.toggle("bad", !ok);
}

async function connect() {
  try {
    const found = await ask("/v1/models?limit=1");
    base = found.data[0]?.parent ?? found.data[0]?.id ?? null;
    $("base").textContent = base ? `over ${base}` : "no model for this key";
  } catch (error) {
    $("base").textContent = error.message;
    $("key-box").open = true;
  }
  await Promise.all(choosers.map((chooser) => chooser.refresh()));
}

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  connect();
});
$("compare").addEventListener("change", showCompare);
$("add").addEventListener("click", () => addRow().focus());
$("form").addEventListener("submit", submit);
$("form").addEventListener("input", showCurl);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("copy").addEventListener("click", copyCurl);
for (const input of document.querySelectorAll("input[name=kind]")) input.addEventListener("change", showKind);
fillRows(["name", "", ""]);
showCompare();
connect();
lookAtHealth();
setInterval(lookAtHealth, 10000);
