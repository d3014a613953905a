// The page of one lcconvert server: files become the first message of a conversation, answers are streamed.
//
// Files are read here and sent as text, in the wording that `lcconvert ask` uses; nothing is uploaded until it is counted
// or asked about. Whatever comes from a file or a model is set as text, never as markup. The server keeps what it has
// read, so every request sends the whole conversation and the server reads only what is new.

const $ = (id) => document.getElementById(id);
const NEVER = new Set([".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", ".DS_Store"]);
const LISTED = 500; // rows of the file list; more are counted
const COUNT_AFTER = 250; // ms without a change before tokens are counted
const WAITING_AFTER = 1500; // ms without an event before the queue is looked at

let about = null;
const files = new Map(); // path -> {text, size}
const skipped = new Map(); // path -> why
const turns = []; // {role, content}, as sent, the files left out
let running = null; // AbortController of the answer that is being streamed
let counting = null; // AbortController of the count that is being made
let counted = null; // {count, needed_bytes, free_bytes, max_model_len} of files and conversation
let timer = 0;

// Words and numbers

const whole = new Intl.NumberFormat("en-US");
const number = (n) => whole.format(Math.round(n));
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
const percent = (share) =>
  share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
const seconds = (s) => (s < 10 ? `${s.toFixed(1)} s` : s < 100 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);

function bytes(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 999.5) return `${unit === "B" ? Math.round(n) : n.toPrecision(3)} ${unit}`;
    n /= 1000;
  }
  return `${n.toPrecision(3)} TB`;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const short = (text) => (text.length > 32 ? `${text.slice(0, 31)}…` : text);
const say = (text) => { $("announce").textContent = text; };

// Requests

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let reply;
  try {
    reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refused("The server cannot be reached; is it still running?", 0);
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  if (reply.status === 401) {
    askForKey();
    throw new Refused("This server asks for an API key; give it in Settings", 401);
  }
  throw new Refused(told?.error?.message ?? `The server answered with status ${reply.status}`, reply.status);
}

function askForKey() {
  $("settings").open = true;
  showPanel(true);
  $("key").focus();
}

/** The JSON bodies of server-sent events, until [DONE]. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The answer broke off; the connection to the server was lost", 0);
    const lines = (buffer + value).split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const body = JSON.parse(line.slice(6));
      if (body.error) throw new Refused(body.error.message, 0);
      yield body;
    }
  }
}

/** The conversation as messages, with the files before its first question. */
function messages(question) {
  const asked = [...turns, { role: "user", content: question }];
  if (files.size) {
    const parts = [...files.keys()].sort().map((path) => files.get(path).text).join("");
    asked[0] = { role: "user", content: about.before + parts + about.after + asked[0].content };
  }
  return asked;
}

/** A model without a chat template continues a text. */
const prompt = (question) =>
  about.chat ? { messages: messages(question) } : { prompt: messages(question).map((turn) => turn.content).join("\n\n") };

// Files

function breakControl(text) {
  for (const token of about.control_tokens) {
    text = text.replaceAll(token, () => token.slice(0, 1) + about.broken + token.slice(1));
  }
  return text;
}

async function read(path, file) {
  if (file.size > about.max_body) return skipped.set(path, `${bytes(file.size)}, more than the context holds`);
  const data = new Uint8Array(await file.arrayBuffer());
  if (/\.pdf$/i.test(path)) return skipped.set(path, "PDF; lcconvert ask reads those");
  if (data.includes(0)) return skipped.set(path, "binary");
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(data);
    const header = about.header.replace("{path}", () => path);
    files.set(path, { text: breakControl(`${header}${text.trimEnd()}\n\n`), size: file.size });
    skipped.delete(path);
  } catch {
    skipped.set(path, "not UTF-8");
  }
}

/** A line of a .gitignore in the folder `base` ("" or "a/b/") as {leaves, folders, matches}, or null for no rule. */
function rule(line, base) {
  const pattern = line.replace(/^!/, "").replace(/(?<!\\)\s+$/, "");
  if (!pattern || line.startsWith("#")) return null;
  const bare = pattern.replace(/\/$/, "");
  const glob = bare.replace(/^\//, "").replace(/\/\*\*\/|\*\*\/|\/\*\*|\*|\?|\\(.)|[.+^${}()|]/g, (found, escaped) => ({
    "/**/": "/(?:.*/)?", "**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]",
  })[found] ?? `\\${escaped ?? found}`).replaceAll("[!", "[^");
  let test;
  try {
    test = new RegExp(`^${bare.includes("/") ? "" : "(?:.*/)?"}${glob}$`);
  } catch {
    return null; // no pattern git would know either
  }
  const matches = (path) => path.startsWith(base) && test.test(path.slice(base.length));
  return { leaves: !line.startsWith("!"), folders: pattern.endsWith("/"), matches };
}

/** The paths of `found` that .gitignore files among them leave out, as git would: the last rule that matches decides,
 * and nothing below a folder that is left out comes back. */
async function ignored(found) {
  const rules = [];
  for (const [path, file] of found.filter(([path]) => /(^|\/)\.gitignore$/.test(path)).sort()) {
    const base = path.slice(0, -".gitignore".length);
    rules.push(...(await file.text()).split(/\r?\n/).map((line) => rule(line, base)).filter(Boolean));
  }
  const leftOut = (path, folder) => rules.findLast((r) => (folder || !r.folders) && r.matches(path))?.leaves ?? false;
  const left = found.map(([path]) => path).filter((path) => {
    const parts = path.split("/");
    return parts.some((_, last) => leftOut(parts.slice(0, last + 1).join("/"), last < parts.length - 1));
  });
  return new Set(left);
}

/** `found`: [path, File] pairs; what a .gitignore among them leaves out is only counted. */
async function add(found) {
  const kept = found.filter(([path]) => !path.split("/").some((part) => NEVER.has(part)));
  const left = await ignored(kept);
  const wanted = kept.filter(([path]) => !left.has(path));
  $("drop").setAttribute("aria-busy", "true");
  for (const [path, file] of wanted) {
    try {
      await read(path, file);
    } catch (error) {
      skipped.set(path, `cannot be read: ${error.message}`);
    }
  }
  $("drop").removeAttribute("aria-busy");
  if (kept.length > wanted.length) skipped.set(".gitignore", `leaves out ${plural(kept.length - wanted.length, "file")}`);
  say(`${plural(files.size, "file")} added, ${number(skipped.size)} skipped`);
  changed();
}

/** What was dropped, folders walked; those that are never wanted are not entered. */
async function walk(entry, found) {
  if (NEVER.has(entry.name)) return;
  if (entry.isFile) {
    found.push([entry.fullPath.slice(1), await new Promise((done, fail) => entry.file(done, fail))]);
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail)); // about a hundred at a time
    if (!some.length) return;
    for (const child of some) await walk(child, found);
  }
}

async function dropped(event) {
  event.preventDefault();
  $("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  for (const entry of entries) await walk(entry, found).catch((error) => skipped.set(entry.name, error.message));
  await add(found);
}

function fileRow(path) {
  const cut = path.lastIndexOf("/") + 1;
  const remove = element("button", { type: "button", textContent: "×", title: "Remove", ariaLabel: `Remove ${path}` });
  remove.onclick = () => { files.delete(path); changed(); $("files").focus(); };
  const shown = element(
    "span", { className: "path", title: path },
    element("span", { className: "folder clip", textContent: path.slice(0, cut) }),
    element("span", { className: "name clip", textContent: path.slice(cut) }),
  );
  return element("li", {}, shown, element("span", { className: "size", textContent: bytes(files.get(path).size) }), remove);
}

function changed() {
  const paths = [...files.keys()].sort();
  const more = paths.length - LISTED;
  const rest = more > 0 ? [element("li", { textContent: `and ${plural(more, "more file")}` })] : [];
  $("files").replaceChildren(...paths.slice(0, LISTED).map(fileRow), ...rest);
  $("files").hidden = !paths.length;
  $("clear").hidden = !paths.length && !skipped.size;
  $("skipped").hidden = !skipped.size;
  $("skipped").firstElementChild.textContent = `${number(skipped.size)} skipped`;
  const reasons = [...skipped].map(([path, why]) => element("li", { textContent: `${path}: ${why}` }));
  $("skipped").lastElementChild.replaceChildren(...reasons);
  counted = null;
  showPlan();
  clearTimeout(timer);
  timer = setTimeout(count, COUNT_AFTER);
}

// The memory plan

async function count() {
  counting?.abort();
  counted = null;
  if (!files.size && !turns.length) return showPlan();
  const own = (counting = new AbortController());
  try {
    const reply = await post("tokenize", { ...prompt(""), return_tokens: false }, own.signal);
    counted = await reply.json();
    showPlan();
  } catch (error) {
    if (!own.signal.aborted) showPlan(error.message);
  }
}

const answerTokens = () => Math.max(1, Math.floor(Number($("max-tokens").value) || 512));

function showPlan(problem) {
  const most = about.max_context, answer = answerTokens(), tokens = counted?.count ?? 0;
  const known = counted || (!files.size && !turns.length);
  const title = element("strong", { textContent: known ? number(tokens) : problem ? "–" : "Counting" });
  const share = known ? ` tokens, ${percent(tokens / most)} of ${number(most)}` : problem ? "" : " tokens…";
  $("tokens").replaceChildren(title, share);
  $("bar-files").style.width = `${Math.min(100, (100 * tokens) / most)}%`;
  $("bar-answer").style.width = `${Math.min(100, (100 * answer) / most)}%`;
  const each = about.context_bytes / most;
  const rows = [
    [`KV cache for it (${about.kv_scheme})`, counted ? bytes(counted.needed_bytes) : known ? "0 B" : "–"],
    [`and for ${number(answer)} tokens of answer`, bytes(answer * each)],
    ["Free for requests", bytes(counted ? counted.free_bytes : about.context_bytes)],
    ["Weights, loaded", bytes(about.weights_bytes)],
  ];
  $("plan").replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", { textContent: name }), element("dd", { textContent: value }),
  ]));
  const over = tokens + answer > most;
  $("bar").classList.toggle("over", over);
  $("bar").ariaLabel = `${percent(tokens / most)} of the context is used`;
  const largest = [...files].sort((a, b) => b[1].size - a[1].size).slice(0, 3).map(([path]) => short(path.split("/").pop()));
  const advice = files.size ? `Remove files; the largest are ${largest.join(", ")}.` : "Start a new conversation.";
  const text = problem ? sentence(problem) : (over ? `${number(tokens + answer - most)} tokens too many. ${advice}` : "");
  if ($("misfit").textContent !== text) $("misfit").textContent = text;
  $("misfit").hidden = !text;
  const summary = files.size ? `${plural(files.size, "file")}${counted ? `, ${number(tokens)} tokens` : ""}` : "Files";
  $("toggle").textContent = summary;
}

// The conversation

/** Text with `code` and fenced blocks as elements; everything else stays as it was written. */
function rendered(text) {
  const made = document.createDocumentFragment();
  const blocks = text.split(/^```[^\n]*\n?/m);
  blocks.forEach((block, index) => {
    if (index % 2) {
      made.append(element("pre", { tabIndex: 0 }, element("code", { textContent: block.replace(/\n$/, "") })));
      return;
    }
    const before = index ? block.replace(/^\n+/, "") : block;
    const plain = index < blocks.length - 1 ? before.replace(/\n+$/, "") : before;
    plain.split(/`([^`\n]+)`/).forEach((piece, inner) => {
      if (piece) made.append(inner % 2 ? element("code", { textContent: piece }) : piece);
    });
  });
  return made;
}

function addTurn(role, text) {
  $("empty").hidden = true;
  const body = element("div", { className: "text" }, role === "user" ? text : rendered(text));
  const turn = element("article", { className: `turn ${role}` },
    element("h3", { textContent: role === "user" ? "You" : about.model }), body);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return { turn, body };
}

function note(turn, text, bad = false) {
  const made = element("p", { className: bad ? "note bad" : "note", textContent: text });
  if (bad) made.setAttribute("role", "alert");
  turn.append(made);
  $("log").scrollTop = $("log").scrollHeight;
}

function working(text, rate = "", share = null) {
  $("work").hidden = text === null;
  $("doing").textContent = text ?? "";
  $("rate").textContent = rate;
  $("progress").hidden = share === null;
  if (share !== null) $("progress").value = share;
}

function showReading(progress, since) {
  const { done, total, prompt_tokens: all, cached_tokens: cached } = progress;
  const spent = (performance.now() - since) / 1000;
  const left = done && done < total && spent > 2 ? `, about ${seconds((spent / done) * (total - done))} left` : "";
  const kept = cached ? `, ${number(cached)} of ${number(all)} are cached` : "";
  working(`Reading ${plural(all - cached, "token")}${kept}`, `${Math.floor((100 * done) / total)}%${left}`, done / total);
}

/** Until the first event: whether the request waits, and for how many others. */
async function lookAtQueue() {
  const state = await fetch("health").then((reply) => reply.json()).catch(() => null);
  if (!state) return working("The server does not answer");
  const others = state.running + state.waiting - 1;
  if (others > 0) working(`Waiting, ${plural(others, "other request")} at work or in the queue`);
}

function stats({ usage, first, last, sent }) {
  const { prompt_tokens: read, completion_tokens: made, prompt_tokens_details: { cached_tokens: cached } } = usage;
  const parts = [plural(made, "token")];
  if (made > 1) parts.push(`${((1000 * (made - 1)) / (last - first)).toFixed(1)} tokens/s`);
  parts.push(`first after ${seconds((first - sent) / 1000)}`);
  parts.push(`${percent(cached / read)} of ${plural(read, "prompt token")} cached`);
  return parts.join(" · ");
}

function body(question) {
  const asked = { ...prompt(question), stream: true, stream_options: { include_usage: true }, progress: true };
  asked.max_tokens = answerTokens();
  asked.temperature = Math.min(2, Math.max(0, Number($("temperature").value) || 0));
  if ($("session").value) asked.session = $("session").value;
  return asked;
}

async function send(question) {
  clearTimeout(timer);
  counting?.abort();
  running = new AbortController();
  busy(true);
  addTurn("user", question);
  const { turn, body: shown } = addTurn("assistant", "");
  const seen = { sent: performance.now(), first: 0, last: 0, usage: null };
  let text = "", finish = null, frame = 0, reading = 0;
  const draw = () => {
    frame = 0;
    const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    shown.replaceChildren(rendered(text));
    if (near) $("log").scrollTop = $("log").scrollHeight;
  };
  working("Sending");
  say("Sent");
  const queue = setInterval(lookAtQueue, WAITING_AFTER);
  try {
    const reply = await post(about.chat ? "v1/chat/completions" : "v1/completions", body(question), running.signal);
    for await (const event of events(reply)) {
      clearInterval(queue);
      if (event.lcconvert_progress) {
        reading ||= performance.now();
        showReading(event.lcconvert_progress, reading);
      }
      if (event.usage) seen.usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      seen.last = performance.now();
      seen.first ||= seen.last;
      text += choice.delta?.content ?? choice.text ?? "";
      finish = choice.finish_reason ?? finish;
      working("Answering");
      frame ||= requestAnimationFrame(draw);
    }
    turns.push({ role: "user", content: question }, { role: "assistant", content: text });
    draw();
    if (!text) note(turn, "The model gave an empty answer.");
    if (finish === "length") note(turn, "Cut off at the longest answer; allow more in Settings.");
    note(turn, stats(seen));
    say("The answer is complete");
  } catch (error) {
    draw();
    if (running.signal.aborted) {
      note(turn, "Stopped.");
      say("Stopped");
    } else {
      note(turn, sentence(error.message), true);
    }
    if (text) turns.push({ role: "user", content: question }, { role: "assistant", content: text });
    else if (!$("question").value) $("question").value = question;
  } finally {
    clearInterval(queue);
    cancelAnimationFrame(frame);
    running = null;
    working(null);
    busy(false);
    grow();
    count();
  }
}

function busy(yes) {
  $("log").ariaBusy = String(yes);
  const back = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("fresh").hidden = yes || !document.querySelector(".turn");
  if (back) (yes ? $("stop") : $("question")).focus();
}

// Controls

function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
}

function showPanel(open) {
  $("panel").classList.toggle("open", open);
  $("toggle").ariaExpanded = String(open);
}

function submit(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (running || !question) return;
  showPanel(false);
  $("question").value = "";
  grow();
  send(question);
}

function listen() {
  $("ask").onsubmit = submit;
  $("question").oninput = grow;
  $("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
  $("stop").onclick = () => running?.abort();
  $("fresh").onclick = () => {
    turns.length = 0;
    for (const turn of document.querySelectorAll(".turn")) turn.remove();
    $("empty").hidden = false;
    busy(false);
    $("question").focus();
    count();
  };
  $("clear").onclick = () => { files.clear(); skipped.clear(); changed(); $("add-files").focus(); };
  $("toggle").onclick = () => showPanel(!$("panel").classList.contains("open"));
  $("max-tokens").oninput = () => showPlan();
  $("key").onchange = count;
  for (const kind of ["files", "folder"]) {
    const input = $(`pick-${kind}`);
    $(`add-${kind}`).onclick = () => input.click();
    input.onchange = async () => {
      await add([...input.files].map((file) => [file.webkitRelativePath || file.name, file]));
      input.value = "";
    };
  }
  document.ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
  document.ondragleave = (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); };
  document.ondrop = dropped;
}

async function start() {
  try {
    about = await (await fetch("page/about.json")).json();
  } catch {
    $("empty").replaceChildren(element("p", { className: "bad", textContent: "The server does not answer; reload the page." }));
    return;
  }
  document.title = `${about.model} – lcconvert`;
  $("model").textContent = `${about.model}, ${number(about.max_context)} tokens of context`;
  $("model").title = about.model;
  $("session-field").hidden = !about.sessions;
  $("key-field").hidden = !about.key;
  $("max-tokens").value = Math.min(512, about.max_context / 4);
  listen();
  changed();
  grow();
  if (about.key) $("settings").open = true;
  $("question").focus({ preventScroll: true });
}

start();
