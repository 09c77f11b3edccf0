// A sound on the page: its picture, its play button, and where it plays.

import { bytesOf, facts } from "/api.js";
import { Picture } from "/picture.js";
import { Player } from "/player.js";

const views = new Set();
const listeners = new Set();
let frame = 0;
export const player = new Player(refreshAll);
export const $ = (place, root = document) => root.querySelector(place);
export const from = (id) => $(`#${id}`).content.firstElementChild.cloneNode(true);
export const clock = (n) => `${(n / facts.rate_hz).toFixed(1)} s`;
export const onPlayer = (listener) => listeners.add(listener);

function refreshAll() {
  for (const view of views) view.refresh();
  for (const listener of listeners) listener();
  cancelAnimationFrame(frame);
  if (player.state !== "idle") frame = requestAnimationFrame(refreshAll);
}

export class View {
  constructor(place, title, sound, picture, start = () => 0) {
    Object.assign(this, { sound, start, root: from("sound-template") });
    $(".title", this.root).textContent = title;
    place.append(this.root);
    this.picture = new Picture($("canvas", this.root), sound, picture);
    $("canvas", this.root).setAttribute("aria-label", `${title}: waveform and log-mel`);
    $("canvas", this.root).onclick = (event) => this.seek(event.offsetX);
    $(".play", this.root).onclick = () =>
      player.sound === sound ? player.stop() : player.play(sound, this.start());
    views.add(this);
    this.refresh();
  }

  push(pcm, mel, pace) {
    this.sound.push(new Int16Array(bytesOf(pcm)), pace);
    this.picture.push(new Int8Array(bytesOf(mel)));
  }

  seek(x) {
    const sample = this.picture.sampleAt(x);
    if (sample >= 0 && sample < this.sound.length) player.play(this.sound, sample);
  }

  refresh() {
    const mine = player.sound === this.sound;
    const button = $(".play", this.root);
    button.classList.toggle("on", mine && player.state === "playing");
    button.classList.toggle("waiting", mine && player.state === "waiting");
    button.ariaLabel = mine ? "Stop" : "Play";
    button.disabled = !mine && !this.sound.length;
    const head = $(".playhead", this.root);
    head.hidden = !mine;
    if (mine) head.style.left = `${this.picture.xOf(player.position)}px`;
    const base = this.start(false);
    const made = clock(this.sound.length - base);
    $(".clock", this.root).textContent = mine ? `${clock(player.position - base)} / ${made}` : made;
  }

  remove() {
    if (player.sound === this.sound) player.stop();
    views.delete(this);
    this.root.remove();
  }
}
