/* Try it: sends the prompt, shows both answers as they come, keeps the conversation in the form. */

import { StreamProblem, jsonLines } from "./try-stream.js";
import { TurnView } from "./try-turn.js";

const form = document.getElementById("try-form");
const at = (id) => document.getElementById(id);
const { prompt, history, against } = form.elements;
const send = at("send"), stop = at("stop"), restart = at("restart"), status = at("status"), problem = at("problem");
let running = null;
let ticking = 0;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) answer();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
restart.addEventListener("click", (event) => {
  event.preventDefault();
  forget();
  prompt.focus();
});
against?.addEventListener("change", () => {
  forget();
  const parent = against.value === "parent";
  at("reference-name").textContent = parent ? form.dataset.parentName : form.dataset.baseName;
  at("reference-what").textContent = parent ? "the model it was trained from" : "the bare base, no adapter";
});

function forget() {
  running?.abort();
  history.value = "";
  at("turns").replaceChildren();
  at("try-empty").hidden = false;
  restart.hidden = true;
  say("");
  tell("");
}

function say(text) {
  clearInterval(ticking);
  status.textContent = text;
}

function tell(text) {
  problem.textContent = text;
  problem.hidden = text === "";
}

function loading(seconds) {
  const started = performance.now();
  say(`Loading the model… about ${seconds} s`);
  ticking = setInterval(() => {
    const left = seconds - (performance.now() - started) / 1000;
    status.textContent = left > 0.5 ? `Loading the model… about ${Math.ceil(left)} s` : "Loading the model… a little longer than usual";
  }, 1000);
}

async function answer() {
  tell("");
  if (!prompt.value.trim()) return tell("Write a prompt first.");
  const abort = new AbortController();
  const body = new FormData(form); // before the box is emptied
  const turn = new TurnView(prompt.value, against?.value === "parent" ? form.dataset.parentName : "Base");
  begin(abort, turn);
  let failed = false;
  try {
    await follow(jsonLines(form.dataset.stream, body, abort.signal), turn);
  } catch (error) {
    if (error.name !== "AbortError") {
      failed = true;
      tell(error instanceof StreamProblem ? error.message : "Something went wrong on this page. Reload it and send again.");
    }
  }
  end(abort, turn, failed);
}

function begin(abort, turn) {
  running = abort;
  at("turns").append(turn.element);
  at("try-empty").hidden = true;
  prompt.value = "";
  send.disabled = true;
  stop.hidden = restart.hidden = false;
  say("Asking…");
  turn.element.scrollIntoView({ block: "nearest" });
}

async function follow(events, turn) {
  for await (const event of events) {
    if (event.type === "queued") say(event.place === 1 ? "The model is busy with another prompt; yours is next." : `The model is busy; ${event.place} prompts before yours.`);
    else if (event.type === "loading") loading(event.seconds);
    else if (event.type === "ready") say(`Answering on ${event.device === "cuda" ? "the GPU" : "the CPU"} in ${event.dtype}…`);
    else if (event.type === "text") {
      if (ticking || status.textContent === "Asking…") say("Answering…");
      turn.add(event);
    } else if (event.type === "done") turn.finish(event);
    else if (event.type === "error") throw new StreamProblem(event.text);
  }
}

function end(abort, turn, failed) {
  const current = running === abort;
  if (current) running = null;
  send.disabled = running !== null;
  stop.hidden = running === null;
  turn.interrupt(failed ? "not finished" : "stopped");
  if (!turn.element.isConnected) return; // the conversation was cleared meanwhile
  if (failed || (turn.isEmpty && abort.signal.aborted)) prompt.value ||= turn.prompt; // nothing typed is lost
  if (turn.isEmpty && (failed || abort.signal.aborted)) turn.element.remove();
  else if (!failed) remember(turn.record);
  at("try-empty").hidden = at("turns").childElementCount > 0;
  restart.hidden = at("turns").childElementCount === 0;
  say("");
  prompt.focus();
}

function remember(record) {
  const kept = history.value ? JSON.parse(history.value) : { turns: [] };
  history.value = JSON.stringify({ against: against?.value ?? "base", turns: [...kept.turns, record] });
}
