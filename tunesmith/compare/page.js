// The page where one person judges: shows a turn, gathers a judgement, and sends it until it is acknowledged.
// Nothing is ever read as HTML: elements are made by name from a fixed set, texts are put in as texts.
"use strict";

const ELEMENTS = new Set(["p", "ul", "ol", "li", "blockquote", "hr", "br", "strong", "em", "s", "table", "thead", "tbody",
  "tr", "th", "td", "pre", "code", "h1", "h2", "h3", "h4", "h5", "h6"]);
const $ = (id) => document.getElementById(id);
const KEY = location.pathname; // several annotators may use one browser
const letter = (place) => String.fromCharCode(65 + place);

let turn = null; // what the server gave: see app.py
let ranks = []; // of a ranking: place of each answer, 0 while it has none
let scores = {};
let picked = null; // the answer that the next key places
let busy = false;
let seconds = 0; // with the page in sight
let since = null;

// elements

function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

function rendered(pieces) {
  return pieces.map((piece) => {
    if (typeof piece === "string") return document.createTextNode(piece);
    const [name, inside] = piece;
    return element(ELEMENTS.has(name) ? name : "span", { dir: "auto" }, ...rendered(inside));
  });
}

function button(text, key, act, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, text, " ", element("kbd", {}, key));
  made.addEventListener("click", first(act));
  return made;
}

// the second click of a double click would judge what came after the first
function first(act) {
  return (event) => { if (event.detail < 2) act(); };
}

// sending: a judgement is kept here until the server has said that it is on its disk

async function post(path, body) {
  for (let wait = 300; ; wait = Math.min(2 * wait, 5000)) {
    try {
      const answer = await fetch(path, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      if (answer.ok) return { turn: await answer.json() };
      if (answer.status < 500 && answer.status !== 408 && answer.status !== 429) {
        const told = await answer.text();
        try { return { error: JSON.parse(told).error, status: answer.status }; }
        catch { return { error: told, status: answer.status }; }
      }
    } catch { /* the server is away: again below */ }
    state("not saved yet, trying again", true);
    await new Promise((done) => setTimeout(done, wait));
  }
}

async function send(path, body) {
  busy = true;
  state("saving");
  sessionStorage.setItem(KEY + "sending", JSON.stringify({ path, body }));
  const found = await post(path, body);
  sessionStorage.removeItem(KEY + "sending");
  busy = false;
  if (found.error) return refused(found);
  sessionStorage.removeItem(KEY + "draft");
  state(path === "undo" ? "taken back" : "saved");
  show(found.turn);
}

async function refused(found) {
  state(found.error, true);
  const next = await post("next", {}); // it was judged elsewhere, or its answers are others by now
  if (next.turn) show(next.turn);
}

function state(text, problem = false) {
  $("state").textContent = text;
  $("state").classList.toggle("problem", problem);
}

function identifier() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// judging

function judge(kind, given = null) {
  if (busy || !turn || turn.item === null) return;
  clock(false);
  send("judge", {
    client: identifier(), item: turn.item, kind, ranks: given, comment: $("comment").value,
    seconds: Math.min(86400, Math.round(seconds * 1000) / 1000), scores,
  });
}

function undo() {
  if (!busy && turn && turn.last) send("undo", { client: identifier(), judgement: turn.last });
}

function sendRanking() {
  if (ranks.every((rank) => rank > 0)) judge("ranked", ranks);
  else state("every answer needs a place", true);
}

function place(answer, rank) {
  ranks[answer] = rank;
  picked = ranks.findIndex((one) => one === 0);
  if (picked < 0) picked = null;
  drawRanking();
  keepDraft();
}

// showing

function show(next) {
  turn = next;
  const restored = draft();
  ranks = restored.ranks || turn.answers.map(() => 0);
  scores = restored.scores || {};
  seconds = restored.seconds || 0;
  picked = ranks.includes(0) ? ranks.indexOf(0) : null;
  const all = turn.done + turn.left;
  $("progress").max = Math.max(1, all);
  $("progress").value = turn.done;
  $("count").textContent = `${turn.done} of ${all}`;
  $("undo").disabled = turn.last === null;
  const over = turn.item === null;
  $("main").hidden = over;
  $("end").hidden = !over;
  document.querySelectorAll("#choices button, #bad, #skip").forEach((one) => (one.disabled = over));
  if (over) return end();
  $("prompt").replaceChildren(...turn.messages.map((one) =>
    element("div", { class: `message ${one.role === "user" ? "user" : "other"}`, dir: "auto" },
      element("h2", {}, one.role), ...rendered(one.shown))));
  $("answers").replaceChildren(...turn.answers.map(answerCard));
  $("answers").classList.toggle("many", turn.answers.length > 2);
  $("comment").value = restored.comment || "";
  $("bad").firstElementChild.textContent = turn.answers.length > 2 ? "All bad" : "Both bad";
  drawChoices();
  drawRanking();
  scrollTo(0, 0);
  clock(true);
}

function end() {
  clock(false);
  const told = turn.waiting ? "Others are looking at what is left. This page asks again." : "Nothing is left to judge. Thank you.";
  $("end").replaceChildren(element("p", {}, told));
  if (turn.waiting) setTimeout(() => { if (turn.item === null && !busy) load(); }, 5000);
}

function answerCard(pieces, number) {
  const card = element("article", { dir: "auto" }, element("h2", {}, letter(number)),
    ...rendered(pieces.length ? pieces : [["em", ["(no text)"]]]));
  if (!turn.rubric.length) return card;
  const rubric = element("div", { class: "rubric" });
  for (const criterion of turn.rubric) {
    const choice = element("select", { "aria-label": `${criterion}, ${letter(number)}` }, element("option", { value: "" }, "-"));
    for (let points = 1; points <= turn.most; points++) choice.append(element("option", { value: points }, String(points)));
    choice.value = String((scores[criterion] || [])[number] ?? "");
    choice.addEventListener("change", () => {
      scores[criterion] = scores[criterion] || turn.answers.map(() => null);
      scores[criterion][number] = choice.value === "" ? null : Number(choice.value);
      keepDraft();
    });
    rubric.append(element("label", {}, `${criterion} `, choice));
  }
  card.append(rubric);
  return card;
}

function drawChoices() {
  const many = turn.answers.length > 2;
  $("choices").replaceChildren(...(many
    ? [button("Save the ranking", "Enter", sendRanking, { id: "save" })]
    : [button("A is better", "1", () => judge("ranked", [1, 2]), { id: "first" }),
      button("Tie", "3", () => judge("ranked", [1, 1]), { id: "tie" }),
      button("B is better", "2", () => judge("ranked", [2, 1]), { id: "second" })]));
}

function drawRanking() {
  const area = $("ranking");
  area.hidden = turn.answers.length < 3;
  if (area.hidden) return;
  const row = (rank, title) => {
    const made = element("div", { class: "tier", "data-rank": rank }, element("span", { class: "title" }, title));
    turn.answers.forEach((_, answer) => { if (ranks[answer] === rank) made.append(chip(answer)); });
    made.addEventListener("click", () => { if (picked !== null) place(picked, rank); });
    return made;
  };
  const places = turn.answers.map((_, rank) => row(rank + 1, rank === 0 ? "1, best" : String(rank + 1)));
  area.replaceChildren(
    element("p", {}, "Drag the letters into places, or press a letter and then a number. Equal places are ties."),
    row(0, "to place"), ...places);
}

function chip(answer) {
  const made = element("button", { type: "button", class: "chip", "data-answer": answer, "aria-pressed": picked === answer },
    letter(answer));
  let start = null;
  made.addEventListener("click", (event) => event.stopPropagation());
  made.addEventListener("pointerdown", (event) => {
    start = [event.clientX, event.clientY];
    made.setPointerCapture(event.pointerId);
  });
  made.addEventListener("pointermove", (event) => {
    if (start) made.style.transform = `translate(${event.clientX - start[0]}px, ${event.clientY - start[1]}px)`;
  });
  made.addEventListener("pointercancel", () => { start = null; drawRanking(); });
  made.addEventListener("pointerup", (event) => {
    if (!start) return;
    const moved = Math.hypot(event.clientX - start[0], event.clientY - start[1]) > 6;
    start = null;
    made.hidden = true; // what is below it
    const tier = document.elementFromPoint(event.clientX, event.clientY)?.closest(".tier");
    made.hidden = false;
    if (moved && tier) place(answer, Number(tier.dataset.rank));
    else { picked = answer; drawRanking(); }
  });
  return made;
}

// what is half done survives a reload

function keepDraft() {
  clock(true);
  const kept = { item: turn.item, ranks, scores, comment: $("comment").value, seconds };
  sessionStorage.setItem(KEY + "draft", JSON.stringify(kept));
}

function draft() {
  const kept = JSON.parse(sessionStorage.getItem(KEY + "draft") || "{}");
  return kept.item === turn.item && turn.item !== null ? kept : {};
}

function clock(runs) {
  const now = performance.now();
  if (since !== null) seconds += (now - since) / 1000;
  since = runs && !document.hidden ? now : null;
}

async function load() {
  const waiting = sessionStorage.getItem(KEY + "sending");
  if (waiting) { // sent before the page was left, and perhaps not received
    const { path, body } = JSON.parse(waiting);
    return send(path, body);
  }
  const found = await post("next", {});
  if (found.error) return state(found.error, true);
  state("");
  show(found.turn);
}

// keys

const PAIR = { 1: () => judge("ranked", [1, 2]), ArrowLeft: () => judge("ranked", [1, 2]),
  2: () => judge("ranked", [2, 1]), ArrowRight: () => judge("ranked", [2, 1]),
  3: () => judge("ranked", [1, 1]), "=": () => judge("ranked", [1, 1]) };
const BOTH = { 0: () => judge("bad"), s: () => judge("skip"), u: undo,
  c: () => $("comment").focus() };

function rankingKey(key) {
  const answer = key.toUpperCase().charCodeAt(0) - 65;
  if (key === "Enter") return sendRanking();
  if (/^[1-9]$/.test(key) && picked !== null && Number(key) <= turn.answers.length) return place(picked, Number(key));
  if (/^[a-z]$/i.test(key) && answer < turn.answers.length) { picked = answer; drawRanking(); }
}

document.addEventListener("keydown", (event) => {
  if (event.target === $("comment") && event.key === "Escape") $("comment").blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !turn) return;
  if (event.target.matches("textarea, select") || (event.key === "Enter" && event.target.matches("button:not(.chip)"))) return;
  const many = turn.answers.length > 2;
  const isAnswer = many && /^[a-z]$/i.test(event.key) && event.key.toUpperCase().charCodeAt(0) - 65 < turn.answers.length;
  const act = (isAnswer ? null : BOTH[event.key]) || (many ? () => rankingKey(event.key) : PAIR[event.key]);
  if (!act) return;
  if (event.key !== "Tab" && event.key !== " ") event.preventDefault();
  act();
});
$("bad").addEventListener("click", first(() => judge("bad")));
$("skip").addEventListener("click", first(() => judge("skip")));
$("undo").addEventListener("click", undo);
$("comment").addEventListener("input", keepDraft);
document.addEventListener("visibilitychange", () => { if (turn && turn.item !== null) clock(true); });
load();
