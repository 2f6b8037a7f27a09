"use strict";

const $ = (id) => document.getElementById(id);
const TITLES = { jacobi: "Jacobi decoding", ar: "One token at a time" };
let about = { model: null, takes_turns: true, examples: [], max_new_tokens: 512 };
let messages = [];
let running = null; // the AbortController of the answers in progress

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/* One answer on the page: its text, coloured by forward, and its figures. */
class Answer {
  constructor(decoding, titled) {
    this.decoding = decoding;
    this.text = "";
    this.forwards = [];
    this.seconds = null;
    this.started = null;
    this.card = element("article", "answer");
    if (titled) this.card.append(element("h3", "", TITLES[decoding]));
    this.written = element("div", "written waiting");
    this.figures = element("div", "figures", "Waiting …");
    this.card.append(this.written, this.figures);
  }

  /* Adds a piece of text; the report holds the numbers of tokens and characters of each forward. */
  add(text, report, isThought) {
    const now = performance.now();
    this.started ??= now;
    this.latest = now;
    const characters = Array.from(text); // as the server counts them
    let from = 0;
    for (const [tokens, length] of report ? report.forwards : []) {
      if (tokens) this.forwards.push(tokens);
      if (length) this.append(characters.slice(from, from + length).join(""), tokens, isThought);
      from += length;
    }
    if (from < characters.length) this.append(characters.slice(from).join(""), 0, isThought);
    if (report && report.seconds !== undefined) this.seconds = report.seconds;
    if (!isThought) this.text += text;
    this.show();
  }

  append(text, tokens, isThought) {
    const shade = tokens >= 16 ? 16 : tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
    const span = element("span", `f${shade}${isThought ? " thought" : ""}`, text);
    if (tokens) span.title = tokens === 1 ? "one token, one forward" : `${tokens} tokens from one forward`;
    this.written.append(span);
  }

  get tokens() {
    return this.forwards.reduce((sum, tokens) => sum + tokens, 0);
  }

  get perForward() {
    return this.forwards.length ? this.tokens / this.forwards.length : 0;
  }

  get perSecond() {
    const seconds = this.seconds ?? (this.latest - this.started) / 1000;
    return seconds > 0 ? this.tokens / seconds : 0;
  }

  show(ending = "") {
    const figure = (value, unit) => [element("b", "", value), ` ${unit}`];
    this.figures.replaceChildren(
      ...figure(number(this.tokens), "tokens, "),
      ...figure(number(this.forwards.length), "forwards: "),
      ...figure(number(this.perForward, 2), "tokens per forward"),
      ...(this.perSecond ? [", ", ...figure(number(this.perSecond), "tokens per second")] : []),
      ending,
    );
  }

  end(reason) {
    this.written.classList.remove("waiting");
    const endings = { length: " (length limit reached)", stopped: " (stopped)" };
    if (this.forwards.length || reason === "stopped") this.show(endings[reason] ?? "");
  }

  fail(sentence) {
    this.written.classList.remove("waiting");
    const message = element("p", "wrong", sentence);
    message.setAttribute("role", "alert");
    this.written.append(message);
    if (!this.forwards.length) this.figures.remove();
  }
}

/* Requests one answer from the server; returns whether it was completed. */
async function write(answer, signal) {
  const settings = { decoding: answer.decoding, max_new_tokens: lengthAsked(), do_sample: false };
  if (signal.aborted) {
    answer.end("stopped");
    return false;
  }
  const body = { model: about.model ?? undefined, messages, stream: true, generation_config: settings };
  let reason = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      answer.fail(body?.error?.message ?? `The server responded with status ${response.status}.`);
      return false;
    }
    for await (const event of eventsOf(response)) {
      if (event.error) {
        answer.fail(event.error);
        return false;
      }
      const choice = event.choices[0];
      if (choice.delta.reasoning_content) answer.add(choice.delta.reasoning_content, event.decoding, true);
      else if (event.decoding) answer.add(choice.delta.content ?? "", event.decoding, false);
      reason = choice.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.fail("The server cannot be reached: start hf-jacobi chat again.");
      return false;
    }
    reason = "stopped";
  }
  answer.end(reason);
  return reason !== "stopped";
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

function lengthAsked() {
  return Math.max(1, Math.floor(Number($("length").value)) || about.max_new_tokens);
}

async function ask(text) {
  if (running) return;
  running = new AbortController();
  $("start").hidden = true;
  $("clear").hidden = false;
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  $("status").textContent = "The model is generating an answer.";
  messages.push({ role: "user", content: text });
  $("log").append(element("div", "mine", text.trimEnd()));
  const ways = $("compare").checked ? ["jacobi", "ar"] : ["jacobi"];
  const row = element("div", ways.length > 1 ? "answers two" : "answers");
  const answers = ways.map((way) => new Answer(way, ways.length > 1));
  row.append(...answers.map((answer) => answer.card));
  $("log").append(row);
  atEnd = true;
  follow();
  const asked = messages;
  const ended = [];
  for (const answer of answers) ended.push(await write(answer, running.signal)); // one after the other, so that neither slows the other down
  if (asked !== messages) $("log").replaceChildren(); // a new chat was started meanwhile
  else if (answers[0].text) messages.push({ role: "assistant", content: answers[0].text });
  else messages.pop();
  if (answers.length > 1 && ended.every(Boolean)) row.after(verdict(...answers));
  const [first] = answers;
  $("status").textContent = `Answer finished: ${first.tokens} tokens, ${number(first.perForward, 2)} per forward.`;
  running = null;
  $("send").textContent = "Send";
  $("send").classList.remove("stop");
  follow();
}

function verdict(jacobi, ar) {
  const sentence = element("p", "verdict");
  const times = ar.perSecond ? jacobi.perSecond / ar.perSecond : 0;
  const same = jacobi.text === ar.text ? "and the text is the same" : "and the texts differ";
  const factor = element("b", "", `${number(times, 2)} times`);
  sentence.append("Jacobi decoding generated ", factor, ` as many tokens per second, ${same}.`);
  return sentence;
}

/* Scrolls along with new text while the reader is at the end. */
let atEnd = true;
function follow() {
  if (atEnd) window.scrollTo({ top: document.body.scrollHeight });
}

function fit() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

function submit() {
  const text = $("text").value;
  if (running || !text.trim()) return;
  $("text").value = "";
  fit();
  ask(text);
}

function clear() {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("start").hidden = false;
  $("clear").hidden = true;
  $("text").focus();
}

function introduce() {
  $("model").textContent = about.model;
  document.title = `${about.model} · hf-jacobi chat`;
  $("about").textContent = `Many tokens per forward, identical text · ${about.dtype} on ${about.device}`;
  $("compare").checked = about.compare;
  $("length").value = about.max_new_tokens;
  const hints = [];
  if (about.is_miniature) hints.push("The miniature has 3.5 million parameters and was trained on two tasks only: arithmetic word problems, and questions about a table, which it answers in SQL.");
  if (!about.takes_turns) hints.push("This model has no chat template, so it reads each message on its own, exactly as typed.");
  $("hint").textContent = hints.join(" ");
  for (const example of about.examples) {
    const button = element("button", "", example.trim());
    button.type = "button";
    button.title = "Ask this";
    button.addEventListener("click", () => ask(example));
    $("examples").append(button);
  }
  $("try").hidden = !about.examples.length;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else submit();
});
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
window.addEventListener("scroll", () => {
  atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40;
});
new MutationObserver(follow).observe($("log"), { childList: true, subtree: true });
$("clear").addEventListener("click", clear);

fetch("page/about")
  .then((response) => response.json())
  .then((found) => {
    about = { ...about, ...found };
    introduce();
  })
  .catch(() => {
    $("hint").textContent = "The server cannot be reached: start hf-jacobi chat again.";
  });
