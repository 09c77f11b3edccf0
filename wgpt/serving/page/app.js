// The page of `wgpt serve`. The server keeps nothing: the prompt's file is sent with each request.

import { ask, bytesOf, facts, linesOf, names } from "/api.js";
import { Sound } from "/player.js";
import { Recorder } from "/recorder.js";
import { $, View, clock, from, onPlayer, player } from "/view.js";

const SILENCE_SCALE = { topDb: 20, peak: 16384 }; // of pictures without a prompt

let prompt = null; // {file, name, views, samples, mel, scale}; null: the model starts from silence
let request = null; // AbortController of what the server is making
let recorder = null;
const takes = [];

function fail(error) {
  if (error?.name === "AbortError") return;
  $("#error").textContent = error?.message || error || "";
  $("#error").hidden = !error;
}

onPlayer(() => {
  for (const button of document.querySelectorAll(".ab button")) {
    button.ariaPressed = String(takeOf(button.value)?.view.sound === player.sound);
  }
});

// -- the prompt -----------------------------------------------------------------------------------

// file: a Blob, or the promise of one.
async function choosePrompt(file, name) {
  request?.abort();
  const mine = (request = new AbortController());
  fail(null);
  dropPrompt();
  busy("Listening to the prompt …");
  try {
    file = await file;
    if (file.size > 1e6 * facts.limits.max_upload_mb) {
      throw new Error(`The prompt may hold at most ${facts.limits.max_upload_mb} MB, ` +
        `got ${(file.size / 1e6).toFixed(1)} MB.`);
    }
    const model = $("#model").value;
    const answer = await (await ask("/prompt", { model }, file, mine.signal)).json();
    if (request === mine) showPrompt(file, name, model, answer);
  } catch (error) {
    fail(error);
  } finally {
    idle(mine);
  }
}

function showPrompt(file, name, model, answer) {
  const mel = new Int8Array(bytesOf(answer.recording.mel));
  const samples = new Int16Array(bytesOf(answer.recording.pcm));
  const most = (numbers) => numbers.reduce((a, b) => Math.max(a, Math.abs(b)), 1);
  const scale = { topDb: mel.reduce((a, b) => Math.max(a, b)), peak: 1.3 * most(samples) };
  const show = (title, { pcm, mel }) => {
    const sound = new Sound(facts.rate_hz, samples.length);
    const nPrompt = samples.length / facts.step_samples;
    const view = new View($("#prompt .pair"), title, sound, pictureOf(model, nPrompt, scale));
    view.push(pcm, mel);
    sound.finish();
    view.picture.draw();
    view.refresh();
    return view;
  };
  $("#prompt").hidden = false;
  $("#empty").hidden = true;
  $("#prompt-name").textContent = name;
  const n = facts.models[model].n_codebooks;
  const codec = `Through the codec, ${n === 1 ? "one codebook" : `${n} codebooks`}: the ceiling`;
  const shown = [show("As recorded", answer.recording), show(codec, answer.codec)];
  shown[1].root.title = "What is lost here, no continuation can have.";
  prompt = { file, name, views: shown, samples, mel, scale };
  $("#nothing").ariaPressed = "false";
}

function pictureOf(model, nPrompt, scale) {
  const { mel_edges_hz: edgesHz } = facts.models[model];
  return { stepSamples: facts.step_samples, edgesHz, nPrompt, ...scale };
}

function dropPrompt() {
  for (const view of prompt?.views || []) view.remove();
  prompt = null;
  $("#prompt").hidden = true;
  $("#nothing").ariaPressed = "true";
  for (const chip of document.querySelectorAll("#examples button")) chip.ariaPressed = "false";
}

function chooseExample(index, chip) {
  const file = ask(`/examples/${index}`, {}).then((answer) => answer.blob());
  choosePrompt(file, facts.examples[index].text);
  chip.ariaPressed = "true";
}

async function record() {
  const button = $("#record");
  const { max_prompt_s: most } = facts.limits;
  if (recorder) {
    const finished = recorder;
    recorder = null;
    button.classList.remove("recording");
    button.textContent = "Record";
    choosePrompt(finished.stop(), "recorded");
    return;
  }
  fail(null);
  player.stop();
  try {
    const started = new Recorder();
    await started.start((length, peak) => {
      if (recorder !== started) return;
      button.textContent = `Stop ${length.toFixed(1)} s`;
      $("#status").textContent = peak < 0.001 ? "The microphone is silent." : "Recording …";
      if (length >= most - 0.2) record();
    });
    recorder = started;
    button.classList.add("recording");
    button.textContent = "Stop";
  } catch (error) {
    fail(`The microphone cannot be used: ${error.message}`);
  }
}

// -- takes ----------------------------------------------------------------------------------------

function settings() {
  const chosen = { model: $("#model").value, seconds: $("#seconds").value, seed: $("#seed").value };
  for (const input of document.querySelectorAll("#sampling input")) chosen[input.name] = input.value;
  return chosen;
}

async function makeTake(chosen, given) {
  request?.abort();
  const mine = (request = new AbortController());
  fail(null);
  const take = addTake(chosen, given);
  const { sound } = take.view;
  busy("Listening to the prompt …");
  player.play(sound, take.start());
  try {
    const answer = await ask("/continue", chosen, given?.file ?? null, mine.signal);
    for await (const line of linesOf(answer)) {
      if (line.error) throw new Error(line.error);
      if (line.ahead) busy(`Waiting: ${line.ahead} ahead …`);
      else receive(take, line);
    }
    if (take.made < take.nWanted) throw new Error("The server stopped before the end.");
  } catch (error) {
    fail(error);
  } finally {
    sound.finish();
    if (player.sound === sound) player.pump();
    finishTake(take);
    idle(mine);
  }
}

function addTake(chosen, given) {
  const n = 1 + (takes[0]?.n || 0);
  const root = from("take-template");
  const nWanted = Math.round((chosen.seconds * facts.rate_hz) / facts.step_samples);
  const nPrompt = given ? given.samples.length / facts.step_samples : 0;
  const sound = new Sound(facts.rate_hz, (nPrompt + nWanted) * facts.step_samples);
  const take = { n, root, chosen, given, nWanted, made: 0, tokens: [], entropy: 0 };
  take.label = `Take ${n} · seed ${chosen.seed}`;
  take.start = (withPrompt = $("#with-prompt").checked) =>
    withPrompt ? 0 : nPrompt * facts.step_samples;
  $("#takes").prepend(root);
  const picture = pictureOf(chosen.model, nPrompt, given?.scale || SILENCE_SCALE);
  take.view = new View($(".sound", root), take.label, sound, picture, take.start);
  if (given) {
    sound.push(given.samples);
    take.view.picture.push(given.mel);
  }
  take.view.picture.draw();
  const after = $(".after", root);
  take.view.root.querySelector(".title").after(after);
  after.textContent = given ? `after “${given.name}”` : "from silence";
  if (names.length > 1) after.textContent += ` by ${chosen.model}`;
  $(".retry", root).onclick = () => {
    $("#seed").value = 1 + Math.max(...takes.map((other) => Number(other.chosen.seed)));
    makeTake({ ...chosen, seed: $("#seed").value }, given);
  };
  $(".remove", root).onclick = () => removeTake(take);
  takes.unshift(take);
  $("#empty").hidden = true;
  root.scrollIntoView({ block: "nearest" });
  return take;
}

function receive(take, line) {
  take.view.push(line.pcm, line.mel, line.pace);
  if (player.sound === take.view.sound) player.pump();
  take.view.picture.draw();
  take.view.refresh();
  take.made += line.tokens.length;
  take.tokens.push(...line.tokens);
  take.entropy += line.entropy_nats.reduce((a, b) => a + b, 0);
  take.first ??= line.elapsed_s;
  take.pace = line.pace;
  take.root.dataset.made = take.made;
  const samples = take.made * facts.step_samples;
  const buffering = player.sound === take.view.sound && player.state === "waiting";
  busy(`${clock(samples)} of ${clock(take.nWanted * facts.step_samples)}` +
    (buffering ? ", playing as soon as it lasts …" : " …"));
  if (line.warning) {
    $(".warning", take.root).textContent =
      `This take is stuck: ${line.warning}. Try another seed, a higher temperature or another prompt.`;
    $(".warning", take.root).hidden = false;
  }
}

function finishTake(take) {
  if (!take.made) {
    removeTake(take);
    return;
  }
  const { root } = take;
  root.dataset.state = "done";
  const codebooks = take.tokens[0].map((_, k) => take.tokens.map((step) => step[k]).join(" "));
  $(".tokens", root).textContent = codebooks.join("\n");
  const { codebook_size: size } = facts.models[take.chosen.model];
  $(".facts", root).textContent =
    `First sound after ${take.first.toFixed(2)} s, then ${take.pace.toFixed(1)} times real time. ` +
    `Entropy ${(take.entropy / take.made).toFixed(1)} of ${Math.log(size).toFixed(1)} nats.`;
  saveLink(take);
  take.view.picture.draw();
  take.view.refresh();
  $(".remove", root).disabled = false;
  listTakes();
}

function saveLink(take) {
  const link = $(".save", take.root);
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(take.view.sound.wav(take.start()));
  link.download = `wgpt-take-${take.n}-seed-${take.chosen.seed}.wav`;
  link.hidden = false;
}

function removeTake(take) {
  take.view.remove();
  take.root.remove();
  takes.splice(takes.indexOf(take), 1);
  listTakes();
}

const takeOf = (side) => takes.find(({ n }) => n === Number($(`#${side}`).value));

function listTakes() {
  const done = takes.filter(({ root }) => root.dataset.state === "done");
  $("#compare").hidden = done.length < 2;
  for (const [side, other] of [["a", 1], ["b", 0]]) {
    const select = $(`#${side}`);
    select.replaceChildren(...done.map(({ n, label }) => new Option(label, n)));
    if (done.length > 1) select.value = done[other].n; // the newest is B
  }
}

function playSide(side) {
  const take = takeOf(side);
  const playing = takes.find(({ view }) => view.sound === player.sound);
  const at = playing ? player.position - playing.start(false) + take.start(false) : take.start();
  player.play(take.view.sound, Math.round(at));
}

// -- controls -------------------------------------------------------------------------------------

function busy(text) {
  $("#status").textContent = text;
  $("#continue").disabled = true;
  $("#stop").disabled = false;
  for (const button of document.querySelectorAll(".retry")) button.disabled = true;
}

function idle(mine) {
  if (request !== mine) return; // another request took over
  request = null;
  $("#status").textContent = "";
  $("#continue").disabled = false;
  $("#stop").disabled = true;
  for (const button of document.querySelectorAll(".retry")) button.disabled = false;
}

function showModel() {
  const { n_codebooks: n } = facts.models[$("#model").value];
  for (const field of document.querySelectorAll(".fine")) field.hidden = n === 1;
}

$("#model").replaceChildren(...names.map((name) => new Option(name)));
$("#model-field").hidden = names.length === 1;
$("#model-name").textContent = names.length === 1 ? `by ${names[0]}` : "";
$("#prompt-limits").textContent =
  `At most ${facts.limits.max_prompt_s} s and ${facts.limits.max_upload_mb} MB.`;
$("#seconds").max = facts.limits.max_seconds;
$("#seconds").value = Math.min(8, facts.limits.max_seconds);
for (const input of document.querySelectorAll("#sampling input")) {
  input.value = facts.sampling[input.name];
}
facts.examples.forEach(({ text, language }, index) => {
  const chip = from("example-template");
  $("span", chip).textContent = text;
  $("small", chip).textContent = language;
  chip.onclick = () => chooseExample(index, chip);
  $("#examples").append(chip);
});
$("#examples-box").hidden = !facts.examples.length;

const showSeconds = () => ($("#seconds-text").value = `${Number($("#seconds").value).toFixed(1)} s`);
$("#seconds").oninput = showSeconds;
$("#model").onchange = () => {
  showModel();
  if (prompt) choosePrompt(prompt.file, prompt.name);
};
$("#file").onchange = ({ target }) => {
  if (target.files[0]) choosePrompt(target.files[0], target.files[0].name);
  target.value = "";
};
$("#record").onclick = record;
$("#nothing").onclick = () => {
  request?.abort();
  dropPrompt();
};
$("#with-prompt").onchange = () => {
  for (const take of takes) if (take.root.dataset.state === "done") saveLink(take);
};
$("#controls").onsubmit = (event) => {
  event.preventDefault();
  makeTake(settings(), prompt);
};
$("#stop").onclick = () => {
  request?.abort();
  player.stop();
};
for (const button of document.querySelectorAll(".ab button")) {
  button.onclick = () => playSide(button.value);
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) choosePrompt(file, file.name);
});

showSeconds();
showModel();
idle(request);
document.body.dataset.ready = "yes";
